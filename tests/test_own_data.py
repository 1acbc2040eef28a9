"""Data as people have it: other layouts, what texts may spell, and what no score can show."""

import json
import shutil

import pytest
from conftest import (
    SMALL,
    Killed,
    assert_equal_runs,
    complaint,
    failing,
    lines_of,
    run,
    succeed,
    write_json,
)
from suite_files import item, write_task
from test_data import BOS, CHAT, EOS, FRAME, byte_tokenizer, encode, load
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import data
from harness.run import Recorder
from inputs.errors import InputError
from inputs.task_files import LAYOUT

KNOWN = "task073_commonsenseqa_answer_generation"


def described(root, max_length=1000, max_new_tokens=50, suite=None):
    """The lines about a suite, without the first, as the byte tokenizer sees it."""
    suite = suite or load(root)
    encoded = data.encode_suite(suite, byte_tokenizer(), max_length)
    return list(data.describe(suite, encoded, max_length, max_new_tokens))[1:]


# --- layouts ------------------------------------------------------------------------------------


def test_metrics_that_are_not_the_papers_are_named(tmp_path):
    write_task(tmp_path / "s", KNOWN, Metric="accuracy")
    write_task(tmp_path / "s", "task363_sst2_polarity_classification")
    (line,) = described(write_task(tmp_path / "s", "mine"))
    assert line.endswith(f": mine rouge_l, {KNOWN} accuracy")


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))  # blank lines are skipped


def test_json_lines(tmp_path):
    """An instance a line; the definition is the instruction that all lines share."""
    folder = tmp_path / "s" / "alpha"
    for split in ("train", "test"):
        write_lines(folder / f"{split}.jsonl", [
            {"instruction": "Do it.", "input": split, "output": ["a", "b"], "id": 7, "extra": None},
            {"instruction": "Do it.", "input": "", "output": "c"}])
    task = load(tmp_path / "s").tasks["alpha"]
    assert (task.definition, task.metric) == ("Do it.", "rouge_l")
    assert task.test == [{"id": "7", "input": "test", "outputs": ["a", "b"]},
                         {"id": "alpha-test-1", "input": "", "outputs": ["c"]}]
    write_json(folder / "train.json", {"Definition": "Do it.", "Instances": [item("json")]})
    suite = load(tmp_path / "s")
    assert suite.tasks["alpha"].train[0]["input"] == "json"
    assert suite.unread == ("alpha/train.jsonl",)


@pytest.mark.parametrize("rows, named", [
    ([{"instruction": "a", "input": "", "output": "x"},
      {"instruction": "b", "input": "", "output": "x"}], "2 different instructions"),
    ([{"input": "a"}], "output"), ([], "is empty"), ([["a", "b"]], "array"),
])
def test_json_lines_that_are_no_task(tmp_path, rows, named):
    for split in ("train", "test"):
        write_lines(tmp_path / "s" / "alpha" / f"{split}.jsonl", rows)
    message = complaint(load, tmp_path / "s")
    assert "alpha/train.jsonl" in message and named in message


@pytest.mark.parametrize("content", [[{"prompt": "p", "answer": "a"}], {"Instances": []}, "{"])
def test_a_wrong_layout_is_answered_with_the_right_one(tmp_path, content):
    """Three lines below the message, which `error_lines` prints."""
    write_task(tmp_path / "s", "alpha")
    file = tmp_path / "s" / "alpha" / "train.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    (tmp_path / "hollow").mkdir()
    for folder in (tmp_path / "s", tmp_path / "hollow"):
        with pytest.raises(InputError) as caught:
            load(folder)
        assert caught.value.example == LAYOUT and len(LAYOUT) == 3


def test_the_layout_shown_is_one(tmp_path):
    """What a user copies from it loads."""
    text = LAYOUT[1].replace(", ...]", "]").replace("rouge_l or accuracy", "accuracy")
    line = LAYOUT[2].partition("lines ")[2].partition(";")[0]
    for split in ("train", "test"):
        for file, content in (("a", text), ("b", line)):
            path = tmp_path / "s" / file / f"{split}.json{'l' * (file == 'b')}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    tasks = load(tmp_path / "s").tasks
    assert {task.definition for task in tasks.values()} == {"what to do"}
    assert [task.metric for task in tasks.values()] == ["accuracy", "rouge_l"]


def test_files_that_are_not_read_are_named(tmp_path):
    for name in ("alpha", "beta"):
        write_task(tmp_path / "s", name)
        (tmp_path / "s" / name / "dev.json").write_text("no JSON")
    assert described(tmp_path / "s")[1] == "not read: alpha/dev.json, beta/dev.json"
    suite = data.select_tasks(load(tmp_path / "s"), ["beta"])
    assert described(None, suite=suite)[1] == "not read: beta/dev.json"


def test_labels_of_a_task_without_a_metric_are_pointed_at(tmp_path):
    for name, keys in (("alpha", {}), ("beta", {"Metric": "accuracy"})):
        write_task(tmp_path / "s", name, **keys)
        (tmp_path / "s" / name / "labels.json").write_text("[]")
    (line,) = (line for line in described(tmp_path / "s") if "it has a labels.json" in line)
    assert line.startswith("alpha: ") and "data.py convert" in line


# --- special tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("text", [f"a {EOS} b", EOS, f"{BOS}{EOS}x", f"{EOS[:2]} ab", "plain"])
def test_no_text_becomes_a_special_token(tmp_path, chat, text):
    """Neither in definition and input nor in the answer, which ends where it ends."""
    template = BOS + CHAT.replace("[/]", EOS) if chat else None
    tokenizer = byte_tokenizer(bos=True, chat=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[user]"]})
    root = write_task(tmp_path / "s", "alpha", [item(text, text)], [item(text)], Definition=text)
    encoded = encode(root, tokenizer, chat_template=chat)
    (train_row,), (test_row,) = encoded.train["alpha"], encoded.test["alpha"]
    num, user = train_row["num_targets"], tokenizer.convert_tokens_to_ids("[user]")
    target = train_row["input_ids"][-num:]
    assert target[-1] == 1 and 0 not in target and target.count(1) == 1
    assert tokenizer.decode(target[:-1]) == text
    prompt = data.build_prompt(text, text)
    for ids in (train_row["input_ids"][:-num], test_row["input_ids"]):
        if not chat:
            assert ids[0] == 0 and not {0, 1, user} & set(ids[1:])
            assert tokenizer.decode(ids[1:]) == prompt
            continue
        # The template's own: BOS, the user's turn and its end.
        places = [i for i, id in enumerate(ids) if id in (0, 1, user)]
        assert [ids[i] for i in places] == [0, user, 1]
        assert tokenizer.decode(ids[places[1] + 1:places[2]]) == prompt
        assert tokenizer.decode(ids[places[2] + 1:]) == "[bot]"


def test_a_template_that_takes_a_special_text_apart_is_refused(tmp_path):
    """Where the text is not found again, nothing says which tokens are the template's."""
    tokenizer = byte_tokenizer(chat="{{ messages[0]['content'] | upper | replace('X', '') }}"
                                    "{{ messages[0]['content'] | length }}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["AB"]})
    root = write_task(tmp_path / "s", "alpha", [item("ab")])
    assert "template" in complaint(encode, root, tokenizer, chat_template=True)


def test_ordinary_texts_keep_their_tokens_in_a_template(tmp_path):
    """Also those that merge over the seams between template and text."""
    merges = [("]", "N"), ("Ġ", "["), ("d", "]"), ("a", "a")]
    tokenizer = byte_tokenizer(chat=EOS + CHAT, merges=merges)
    root = write_task(tmp_path / "s", "alpha", [item("aaa")])
    row = encode(root, tokenizer, chat_template=True).test["alpha"][0]
    assert row["input_ids"] == tokenizer(row["prompt"], add_special_tokens=False).input_ids
    assert tokenizer.convert_tokens_to_ids("]N") in row["input_ids"]


# --- what no score can show ---------------------------------------------------------------------


def test_references_that_no_answer_can_reach_are_counted(tmp_path):
    """By the shortest reference; one of exactly --max_new_tokens tokens fits."""
    test = [item("a", "x" * 9), item("b", ["x" * 9, "y"]), item("c", "x" * 8), item("d", "x" * 99)]
    root = write_task(tmp_path / "s", "alpha", [item("e")], test)
    assert described(root, max_new_tokens=8)[1:] == [
        "alpha: 2 of 4 test items have no reference of at most 8 tokens (--max_new_tokens): no "
        "answer reaches it"]
    assert described(root, max_new_tokens=99)[1:] == []


def test_labels_that_training_lacks_are_counted(tmp_path):
    train, test = [item(f"a{i}", "0" if i % 2 else "One.") for i in range(4)], [
        item("b", "-1"), item("c", "one"), item("d", ["?", "0"])]
    line = "alpha: 1 of 3 test items have a label that no training item has"
    root = write_task(tmp_path / "s", "alpha", train, test, Metric="accuracy")
    assert line in described(root)
    root = write_task(tmp_path / "t", "alpha", train[:3], test, Metric="accuracy")
    assert line not in described(root)  # answers that do not repeat


def test_empty_answers_are_counted(tmp_path):
    root = write_task(tmp_path / "s", "alpha", [item("a", ""), item("b")],
                      [item("c"), item("d", "")])
    assert described(root)[1:] == [
        "alpha: 1 of 2 training items have an empty answer",
        "alpha: 1 of 2 test items have no reference with anything that rouge_l counts"]


def word_tokenizer(unknown="?"):
    """A tokenizer of four words; `unknown` stands for all others, or they are dropped."""
    words = [EOS, "?", "red", "Now"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)},
                                       unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=unknown, eos_token=EOS)


def test_answers_that_the_tokenizer_cannot_write(tmp_path):
    """They are counted, as are prompts; a task of which none can be written is refused."""
    root = write_task(tmp_path / "s", "alpha", [item("a", "red"), item("b", "blue red")],
                      [item("c", ["blue", "red"]), item("d", "blue")])
    encoded = encode(root, word_tokenizer())
    assert encoded.unwritable == {"train": {"alpha": 1}, "test": {"alpha": 1}}
    assert encoded.unknown == {"train": {"alpha": 2}, "test": {"alpha": 2}}
    lines = list(data.describe(load(root), encoded, 1000, 50))
    assert ("alpha: 1 of 2 training and 1 of 2 test items have no answer that the tokenizer can "
            "write in full") in lines
    write_task(root, "beta", [item("a", "blue"), item("b", "北京")])
    message = complaint(encode, root, word_tokenizer())
    assert "any answer of beta (train), such as 'blue'" in message
    sea = byte_tokenizer()
    assert not any(encode(root, sea).unwritable["train"].values())


def test_a_run_with_a_dated_template_resumes_on_another_day(llama, suite, tmp_path, monkeypatch):
    """A template may write today's date; all runs get the same one, so a resumed run is exact."""
    dated = "{% macro head() %}{{ strftime_now('%d %b %Y') }} {% endmacro %}{{ head() }}" + CHAT
    shutil.copytree(llama, tmp_path / "model")
    tokenizer = tmp_path / "model" / "tokenizer_config.json"
    write_json(tokenizer, json.loads(tokenizer.read_text()) | {"chat_template": dated})
    argv = ("--model", tmp_path / "model", "--suite", suite, *SMALL, "--tasks", "colour_name",
            "--epochs", 2, "--chat_template", "--checkpoint_every", 1, "--max_eval_per_task", 1)
    succeed(*argv, "--output_dir", tmp_path / "whole")
    with failing(Recorder, "add_step", 2), pytest.raises(Killed):
        run(*argv, "--output_dir", tmp_path / "out")
    monkeypatch.setattr(chat_template_utils, "datetime", None)  # the clock
    succeed(*argv, "--output_dir", tmp_path / "out", "--resume")
    assert_equal_runs(tmp_path / "out", tmp_path / "whole")
    (prediction,) = lines_of(next((tmp_path / "out" / "predictions").iterdir()))
    assert prediction["prompt"].startswith("26 Jul 2024 [user]")


def test_shortened_inputs_and_known_ones_are_counted_by_task(tmp_path):
    """A test input that stands in training, of its own task."""
    root = write_task(tmp_path / "s", "alpha", [item("a"), item("b")],
                      [item("b"), item("c"), item("a", "other")])
    write_task(root, "beta", [item("x" * 30), item("c")], [item("y" * 20), item("z"), item("b")])
    assert described(root, FRAME + 15)[1:] == [
        "alpha: 2 of 3 test inputs are in its training data too",
        f"beta: input shortened to fit {FRAME + 15} tokens in 1 of 2 training and 1 of 3 test "
        "items"]
