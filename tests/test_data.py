"""Suites, task orders, prompts, encoding, batches and the download (sections 6 and 7)."""

import collections
import hashlib
import http.server
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import data
from harness.checks import check_encoded
from inputs.errors import InputError
from inputs.task_files import LONGEST

ROOT = pathlib.Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data" / "SuperNI"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/SuperNI")

SUPERNI = """
task1687_sentiment140_classification task1729_personachat_generate_next
task748_glucose_reverse_cause_event_detection task1510_evalution_relation_extraction
task363_sst2_polarity_classification task639_multi_woz_user_utterance_generation
task1572_samsum_summary task511_reddit_tifu_long_text_summarization
task1590_diplomacy_text_generation task1290_xsum_summarization
task073_commonsenseqa_answer_generation task181_outcome_extraction
task002_quoref_answer_generation task875_emotion_classification task591_sciq_answer_generation
""".split()
BY_NUMBER = {re.match(r"task(\d+)_", name)[1]: name for name in SUPERNI}
ACCURACY = {BY_NUMBER[number] for number in ("363", "875", "1687")}
SEED_ORDERS = {
    1: "591 073 1687 875 1572 639 1510 1590 511 181 363 1729 002 1290 748",
    2: "1290 1510 1572 002 073 511 1590 363 748 639 181 1729 1687 591 875",
    3: "002 073 1572 181 591 1687 363 1729 511 875 639 748 1590 1290 1510",
    4: "1290 875 639 1590 591 073 1687 002 748 511 1572 181 1729 363 1510",
    5: "748 1510 875 002 591 1729 1572 511 1687 1590 073 639 181 363 1290",
}
CATEGORIES = ["073 002 591", "1290 1572 511", "363 875 1687", "639 1590 1729", "181 748 1510"]

DEFINITION = "Name the colour."
HEAD = DEFINITION + "\n\nNow complete the following example -\nInput: "
TAIL = "\nOutput: "
FRAME = len(HEAD) + len(TAIL)  # characters, bytes and tokens of the byte tokenizer alike
BOS, EOS = "<s>", "</s>"
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)
# Merges over the seams of the frame: "Input: a..." and "...b\nOutput" change tokens with the input.
SEAMS = [("Ġ", "a"), ("a", "b"), ("b", "Ċ"), ("ab", "ab"), ("Ġ", "b"), ("c", "c"), ("cc", "cc")]


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No test sees the user's caches, data folder or proxies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("BADIT_DATA", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("no_proxy", "*")


def byte_tokenizer(bos=False, pad=None, chat=None, merges=(), eos=EOS, swapped=False, end=""):
    """One token per byte (before merges), so lengths in tokens can be worked out by hand."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = symbols[::-1] if swapped else symbols
    pieces = [BOS, EOS, "<end>", *symbols, *(a + b for a, b in merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocabulary, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if bos or end:
        inner.post_processor = processors.TemplateProcessing(
            single=[*[BOS] * bos, "$A", *end.split()],
            special_tokens=[(name, vocabulary[name]) for name in (BOS, EOS)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS if bos else None,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat
    return tokenizer


def item(text="sky", output="blue", **extra):
    """One instance as it stands in the JSON."""
    return {"input": text, "output": output, **extra}


def write_task(root, name, train=None, test=None, **keys):
    """Write <root>/<name>/{train,test}.json; `keys` are further top-level JSON keys."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, instances in (("train", train or [item()]), ("test", test or [item("sea")])):
        content = {"Definition": [DEFINITION], "Instances": instances, **keys}
        (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def encode(root, tokenizer, max_length=1000, **options):
    """Load the folder `root` and encode it."""
    return data.encode_suite(data.load_suite(str(root)), tokenizer, max_length, **options)


def refused(call, *args, **options):
    """The message of the InputError that the call raises, which is one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message.strip() and "\n" not in message.strip()
    return message


def split_target(row):
    """Prompt ids and target ids of a train row."""
    ids = list(row["input_ids"])
    return ids[: -row["num_targets"]], ids[-row["num_targets"] :]


# Loading


@pytest.mark.parametrize("as_path", [str, pathlib.Path])
def test_load_suite_from_a_folder(tmp_path, as_path):
    """Section 7: definition, instances with a list of references, metric and category."""
    train = [item("a", "x", id="first"), item("b", ["y", "z"], id="second"), item("c", "", id="n")]
    keys = {"Metric": "accuracy", "Category": "Toys", "Domains": ["ignored"]}
    write_task(tmp_path / "toys", "alpha", train, [item("d", [""], id="t")], **keys)
    write_task(tmp_path / "toys", "beta")
    (tmp_path / "toys" / "README.md").write_text("not a task")
    suite = data.load_suite(as_path(tmp_path / "toys"))
    assert isinstance(suite.name, str) and set(suite.tasks) == {"alpha", "beta"}
    task = suite.tasks["alpha"]
    assert (task.name, task.definition) == ("alpha", DEFINITION)
    assert (task.metric, task.category) == ("accuracy", "Toys")
    assert task.train == [
        {"id": "first", "input": "a", "outputs": ["x"]},
        {"id": "second", "input": "b", "outputs": ["y", "z"]},
        {"id": "n", "input": "c", "outputs": [""]},
    ]
    assert task.test == [{"id": "t", "input": "d", "outputs": [""]}]
    assert suite.tasks["beta"].metric == "rouge_l"


@pytest.mark.parametrize(
    "name, keys, metric",
    [
        (BY_NUMBER["363"], {}, "accuracy"),
        (BY_NUMBER["363"], {"Metric": "rouge_l"}, "accuracy"),
        (BY_NUMBER["073"], {}, "rouge_l"),
        (BY_NUMBER["073"], {"Metric": "accuracy"}, "rouge_l"),
        ("task363_other", {}, "rouge_l"),
        ("task363", {}, "rouge_l"),
        ("my_task875_emotion_classification", {}, "rouge_l"),
        ("task363_other", {"Metric": "accuracy"}, "accuracy"),
        ("mine", {"Metric": "rouge_l"}, "rouge_l"),
    ],
)
def test_metric_by_exact_folder_name_or_key(tmp_path, name, keys, metric):
    """Section 7: a table by exact folder name for SuperNI, otherwise the key, else rouge_l."""
    write_task(tmp_path / "s", name, **keys)
    assert data.load_suite(str(tmp_path / "s")).tasks[name].metric == metric


def test_superni_names_carry_metric_and_category(tmp_path):
    """Sections 7, 8: three accuracy tasks; five categories of three tasks each (Table 4)."""
    for name in SUPERNI:
        write_task(tmp_path / "s", name)
    tasks = data.load_suite(str(tmp_path / "s")).tasks
    assert {name for name in tasks if tasks[name].metric == "accuracy"} == ACCURACY
    groups = collections.defaultdict(set)
    for name, task in tasks.items():
        groups[task.category].add(name)
    expected = [{BY_NUMBER[number] for number in line.split()} for line in CATEGORIES]
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, expected))


def test_ids_are_made_where_they_lack(tmp_path):
    """Section 7: an instance may lack an id; one is made from its index, the same every time."""
    train = [item("a"), item("b", id="kept"), item("c"), item("d")]
    write_task(tmp_path / "s", "alpha", train, [item("e"), item("f")])
    first, second = (data.load_suite(str(tmp_path / "s")).tasks["alpha"] for _ in range(2))
    ids = [row["id"] for row in first.train]
    assert ids[1] == "kept" and len(set(ids)) == 4 and all(ids)
    assert [re.sub(r"\D", "", str(ids[i])) for i in (0, 2, 3)] in (list("023"), list("134"))
    assert len({row["id"] for row in first.test}) == 2
    assert (first.train, first.test) == (second.train, second.test)


def without(key):
    """A change that removes a key."""
    return lambda content: content.pop(key)


def having(**values):
    """A change that sets keys."""
    return lambda content: content.update(values)


BAD_FILES = {
    "empty file": b"",
    "blank file": b" \n",
    "malformed": b'{"Definition": ["x"], "Instances": [',
    "trailing comma": b'{"Definition": ["x"], "Instances": [{"input": "a", "output": "b"},]}',
    "array": b"[]",
    "string": b'"text"',
    "null": b"null",
    "not utf-8": b'{"Definition": ["\xff\xfe"], "Instances": [{"input": "a", "output": "b"}]}',
    "no instances key": without("Instances"),
    "empty instances": having(Instances=[]),
    "instances an object": having(Instances={}),
    "instances a string": having(Instances="text"),
    "instances null": having(Instances=None),
}
BAD_DEFINITIONS = {
    "missing": without("Definition"),
    "empty list": having(Definition=[]),
    "number": having(Definition=5),
    "null": having(Definition=None),
    "list of numbers": having(Definition=[5]),
    "lone surrogate": having(Definition=["a \ud800"]),
}
BAD_INSTANCES = {
    "no input": without("input"),
    "input null": having(input=None),
    "input number": having(input=5),
    "input list": having(input=["a"]),
    "input lone surrogate": having(input="a \udc00 b"),
    "no output": without("output"),
    "output null": having(output=None),
    "output number": having(output=5),
    "output object": having(output={"text": "x"}),
    "output empty list": having(output=[]),
    "output list of numbers": having(output=["x", 5]),
    "output list with null": having(output=["x", None]),
    "output nested list": having(output=[["x"]]),
    "output lone surrogate": having(output="\ud83d"),
    "output list lone surrogate": having(output=["x", "\ud83d"]),
}


def break_file(root, split, change):
    """Replace or edit <root>/alpha/<split>.json; return the path as a message should show it."""
    path = root / "alpha" / f"{split}.json"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")
    return os.path.join("alpha", path.name)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_named(tmp_path, split, case):
    """Section 7: a file that is not a task is refused in one line that names it."""
    write_task(tmp_path / "s", "alpha")
    shown = break_file(tmp_path / "s", split, BAD_FILES[case])
    assert shown in refused(data.load_suite, str(tmp_path / "s"))


@pytest.mark.parametrize("case", BAD_DEFINITIONS)
def test_bad_definition_is_named(tmp_path, case):
    """Section 7: a task without a definition in words is refused, naming file and field."""
    write_task(tmp_path / "s", "alpha")
    shown = break_file(tmp_path / "s", "train", BAD_DEFINITIONS[case])
    message = refused(data.load_suite, str(tmp_path / "s"))
    assert shown in message and "Definition" in message


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("level", ["top", "instance"])
def test_repeated_keys_are_refused(tmp_path, split, level):
    """Section 7: of two values for one key, none is dropped without a word."""
    path = write_task(tmp_path / "s", "alpha") / "alpha" / f"{split}.json"
    key, cut, more = {"instance": ("input", -3, ', "input": "other"}]}'),
                      "top": ("Instances", -1, ', "Instances": []}')}[level]
    path.write_text(path.read_text()[:cut] + more)
    message = refused(data.load_suite, str(tmp_path / "s"))
    assert os.path.join("alpha", f"{split}.json") in message and f"{key!r} stands twice" in message


@pytest.mark.parametrize("key, longest", list(LONGEST.items()))
def test_endless_texts_are_refused(tmp_path, key, longest):
    """A text that takes minutes to encode; what is named is its file and how much is allowed."""
    for more in (0, 1):
        text = "x" * (longest + more)
        if key == "Definition":
            write_task(tmp_path / "s", "alpha", Definition=text)
        else:
            write_task(tmp_path / "s", "alpha", [item(id="odd") | {key: text}])
        if not more:
            data.load_suite(str(tmp_path / "s"))
    message = refused(data.load_suite, str(tmp_path / "s"))
    assert os.path.join("alpha", "train.json") in message and f"{longest:,}" in message
    assert key == "Definition" or "odd" in message


@pytest.mark.parametrize("name", ["t" * 201, "a b", "é"])
def test_a_task_whose_name_no_file_of_a_run_can_bear(tmp_path, name):
    """Too long with a number and an ending, or of other characters."""
    write_task(tmp_path / "s", "t" * 200)
    data.load_suite(str(tmp_path / "s"))
    write_task(tmp_path / "s", name)
    assert name in refused(data.load_suite, str(tmp_path / "s"))


def names_instance(message, root, index, name):
    """Whether the message shows the instance by its id or by its index, paths aside."""
    message = message.replace(str(root), "")
    return name in message or re.search(rf"(?<!\d){index}(?!\d)", message) is not None


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("case", BAD_INSTANCES)
def test_bad_instance_is_named(tmp_path, split, case):
    """Section 7: one bad instance among good ones is refused, naming file and instance."""
    rows = [item(text, id=f"good-{text}") for text in "abcdef"]
    rows[4]["id"] = "odd-one"
    write_task(tmp_path / "s", "alpha", rows, rows)
    shown = break_file(
        tmp_path / "s", split, lambda content: BAD_INSTANCES[case](content["Instances"][4])
    )
    message = refused(data.load_suite, str(tmp_path / "s"))
    assert shown in message and names_instance(message, tmp_path, 4, "odd-one")


@pytest.mark.parametrize("bad", ["text", None, 5, ["a", "b"]])
def test_instance_that_is_no_object_is_named(tmp_path, bad):
    """Section 7: an instance is an object; another value is refused by file and index."""
    rows = [item("a", id="x"), item("b", id="y"), item("c", id="z"), item("d", id="w")]
    write_task(tmp_path / "s", "alpha", [*rows, bad])
    message = refused(data.load_suite, str(tmp_path / "s"))
    shown = os.path.join("alpha", "train.json")
    assert shown in message and names_instance(message, tmp_path, 4, "Instances[4]")


@pytest.mark.parametrize("split", ["train", "test"])
def test_duplicate_ids_are_refused(tmp_path, split):
    """Section 7: an id names one instance of a file."""
    rows = [item("a", id="x"), item("b", id="twice"), item("c", id="twice")]
    write_task(tmp_path / "s", "alpha", **{split: rows})
    message = refused(data.load_suite, str(tmp_path / "s"))
    assert os.path.join("alpha", f"{split}.json") in message and "twice" in message


@pytest.mark.parametrize("metric", ["bleu", "ROUGE_L", "", 5, None, ["accuracy"]])
def test_unknown_metric_is_refused(tmp_path, metric):
    """Section 7: the key Metric is rouge_l or accuracy; the message names file and both."""
    write_task(tmp_path / "s", "alpha", Metric=metric)
    message = refused(data.load_suite, str(tmp_path / "s"))
    assert re.search(r"alpha.(train|test)\.json", message)
    assert "Metric" in message
    assert not isinstance(metric, str) or "rouge_l" in message and "accuracy" in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_file_is_named(tmp_path, split):
    """Section 7: a task has a train and a test file."""
    write_task(tmp_path / "s", "alpha")
    write_task(tmp_path / "s", "beta")
    (tmp_path / "s" / "beta" / f"{split}.json").unlink()
    message = refused(data.load_suite, str(tmp_path / "s"))
    assert os.path.join("beta", f"{split}.json") in message


def test_missing_or_empty_suite_is_named(tmp_path):
    """Section 7: a name that is neither a shipped suite nor a folder with tasks is refused."""
    assert "no_such_suite" in refused(data.load_suite, str(tmp_path / "no_such_suite"))
    (tmp_path / "hollow").mkdir()
    assert "hollow" in refused(data.load_suite, str(tmp_path / "hollow"))
    (tmp_path / "plain_file").write_text("{}")
    assert "plain_file" in refused(data.load_suite, str(tmp_path / "plain_file"))


# The shipped suites


@pytest.fixture(scope="module")
def mini():
    """The suite shipped in tasks/mini."""
    return data.load_suite("mini")


def test_mini_suite_shape(mini):
    """Section 7: 15 tasks, three of each of five categories, like SuperNI."""
    assert mini.name == "mini" and len(mini.tasks) == 15
    assert {name: task.name for name, task in mini.tasks.items()} == {n: n for n in mini.tasks}
    counts = collections.Counter(task.category for task in mini.tasks.values())
    assert sorted(counts.values()) == [3] * 5
    assert all(task.metric in ("rouge_l", "accuracy") for task in mini.tasks.values())


def test_mini_suite_sizes_and_disjointness(mini):
    """Section 7: enough instances to train on, and none of the test inputs among them."""
    for task in mini.tasks.values():
        assert len(task.train) >= 24 and len(task.test) >= 8, task.name
        assert task.definition.strip(), task.name
        for rows in (task.train, task.test):
            assert len({row["id"] for row in rows}) == len(rows), task.name
            assert all(row["outputs"] and row["input"].strip() for row in rows), task.name
        seen = {row["input"].strip() for row in task.train}
        assert not seen & {row["input"].strip() for row in task.test}, task.name


def test_mini_suite_is_found_from_any_folder(mini, tmp_path, monkeypatch):
    """Section 7: the suite belongs to the code, not to the working directory."""
    monkeypatch.chdir(tmp_path)
    assert set(data.load_suite("mini").tasks) == set(mini.tasks)


def place_superni(where, tmp_path, monkeypatch, make):
    """Let `make(folder)` fill one of the three places of superni; return data_dir."""
    if where == "download cache":
        make(tmp_path / "xdg" / "badit" / "superni")
        return None
    make(tmp_path / "there")
    if where == "BADIT_DATA":
        monkeypatch.setenv("BADIT_DATA", str(tmp_path / "there"))
        return None
    return str(tmp_path / "there")


PLACES = ["data_dir", "BADIT_DATA", "download cache"]


@pytest.mark.parametrize("where", PLACES)
def test_superni_with_other_content_is_refused(tmp_path, monkeypatch, where):
    """Section 7: files that parse but are not the published split fail their checksum by name."""

    def make(folder):
        for name in SUPERNI:
            write_task(folder, name)

    data_dir = place_superni(where, tmp_path, monkeypatch, make)
    message = refused(data.load_suite, "superni", data_dir=data_dir)
    assert re.search(rf"({'|'.join(SUPERNI)}).(train|test)\.json", message)


def test_superni_that_is_nowhere_is_refused():
    """Section 7: without a folder, a variable or a download there is one line that says so."""
    assert "superni" in refused(data.load_suite, "superni").lower()


def link_real(folder):
    """The 30 files that are used, as links; dev.json is not among them."""
    for name in SUPERNI:
        (folder / name).mkdir(parents=True)
        for split in ("train.json", "test.json"):
            (folder / name / split).symlink_to(REAL / name / split)


@needs_real
@pytest.mark.parametrize("where", PLACES)
def test_real_superni(tmp_path, monkeypatch, where):
    """Section 7: 11,741 train and 1,197 test instances pass the manifest; metrics of section 8."""
    suite = data.load_suite(
        "superni", data_dir=place_superni(where, tmp_path, monkeypatch, link_real)
    )
    assert suite.name == "superni" and set(suite.tasks) == set(SUPERNI)
    assert sum(len(task.train) for task in suite.tasks.values()) == 11_741
    assert sum(len(task.test) for task in suite.tasks.values()) == 1_197
    assert {n for n, task in suite.tasks.items() if task.metric == "accuracy"} == ACCURACY
    assert sorted(collections.Counter(t.category for t in suite.tasks.values()).values()) == [3] * 5
    sizes = {"073": (975, 100), "181": (338, 43), "1572": (160, 20), "639": (142, 18)}
    for number, name in BY_NUMBER.items():
        expected = {**sizes, "1590": (126, 16)}.get(number, (1000, 100))
        assert (len(suite.tasks[name].train), len(suite.tasks[name].test)) == expected
    empty = [row for row in suite.tasks[BY_NUMBER["511"]].train if row["outputs"] == [""]]
    assert len(empty) == 6
    several = {n: sum(len(r["outputs"]) > 1 for r in t.test) for n, t in suite.tasks.items()}
    several = {n: count for n, count in several.items() if count}
    assert several == {BY_NUMBER["002"]: 17, BY_NUMBER["748"]: 23}


@needs_real
@pytest.mark.parametrize("split", ["train.json", "test.json"])
def test_real_superni_with_one_byte_more_is_refused(tmp_path, split):
    """Section 7: every file is checked; one blank more, still the same JSON, is named."""
    link_real(tmp_path / "there")
    path = tmp_path / "there" / BY_NUMBER["875"] / split
    content = path.read_bytes() + b"\n"
    path.unlink()
    path.write_bytes(content)
    message = refused(data.load_suite, "superni", data_dir=str(tmp_path / "there"))
    assert os.path.join(BY_NUMBER["875"], split) in message


@needs_real
def test_data_dir_comes_before_the_variable(tmp_path, monkeypatch):
    """Section 7: the flag wins over $BADIT_DATA, which here holds other content."""
    for name in SUPERNI:
        write_task(tmp_path / "wrong", name)
    monkeypatch.setenv("BADIT_DATA", str(tmp_path / "wrong"))
    assert len(data.load_suite("superni", data_dir=str(REAL)).tasks) == 15


# Choosing and ordering tasks


@pytest.fixture
def numbered(tmp_path):
    """A suite of four folders with numbers and one without."""
    for name in ("task363_x", "task073_y", "task1729_z", "task7_w", "plain"):
        write_task(tmp_path / "numbered", name)
    return data.load_suite(str(tmp_path / "numbered"))


@pytest.mark.parametrize(
    "names, expected",
    [
        (["plain"], {"plain"}),
        (["T363"], {"task363_x"}),
        (["363", "T073"], {"task363_x", "task073_y"}),
        (["073", "task1729_z", "T7"], {"task073_y", "task1729_z", "task7_w"}),
        (
            ["plain", "T1729", "363", "073", "7"],
            set("plain task1729_z task363_x".split()) | {"task073_y", "task7_w"},
        ),
    ],
)
def test_select_tasks(numbered, names, expected):
    """Section 7: folder names or T-numbers; the chosen tasks themselves are unchanged."""
    before = set(numbered.tasks)
    chosen = data.select_tasks(numbered, names)
    assert set(chosen.tasks) == expected
    assert all(chosen.tasks[name] == numbered.tasks[name] for name in expected)
    assert set(numbered.tasks) == before


@pytest.mark.parametrize("unknown", ["T36", "T3631", "1", "plai", "task363", "task363_", "", "T"])
def test_select_unknown_task_is_refused(numbered, unknown):
    """Section 7: no partial matches; the message names the value and every allowed name."""
    message = refused(data.select_tasks, numbered, ["plain", unknown])
    assert unknown in message and all(name in message for name in numbered.tasks)


@pytest.mark.parametrize(
    "names", [["plain", "plain"], ["T363", "363"], ["073", "plain", "task073_y"]]
)
def test_select_duplicate_task_is_refused(numbered, names):
    """Section 7: one task under one or two names counts once."""
    message = refused(data.select_tasks, numbered, names)
    assert any(name in message for name in names)


def test_select_ambiguous_number_is_refused(tmp_path):
    """Section 7: a number that two folders carry chooses neither."""
    for name in ("task5_a", "task5_b"):
        write_task(tmp_path / "s", name)
    suite = data.load_suite(str(tmp_path / "s"))
    assert "5" in refused(data.select_tasks, suite, ["T5"])
    assert set(data.select_tasks(suite, ["task5_b"]).tasks) == {"task5_b"}


@pytest.mark.parametrize("arrange", [list, sorted, lambda names: names[::-1]])
@pytest.mark.parametrize("seed", SEED_ORDERS)
def test_paper_task_orders(seed, arrange):
    """Section 7: the five orders, whatever order the names come in."""
    expected = [BY_NUMBER[number] for number in SEED_ORDERS[seed].split()]
    assert data.task_order(arrange(SUPERNI), seed) == expected


def test_task_order_of_another_seed():
    """Section 7: the same list, shuffled by Python's generator with that seed."""
    expected = list(SUPERNI)
    random.Random(17).shuffle(expected)
    assert data.task_order(sorted(SUPERNI), 17) == expected


@pytest.mark.parametrize("seed", SEED_ORDERS)
def test_subset_keeps_the_paper_order(seed):
    """Section 7: leaving tasks out does not reorder the others."""
    kept = {BY_NUMBER[number] for number in ("363", "002", "1590", "748", "181", "073")}
    expected = [BY_NUMBER[n] for n in SEED_ORDERS[seed].split() if BY_NUMBER[n] in kept]
    assert data.task_order(sorted(kept), seed) == expected


@pytest.mark.parametrize(
    "names",
    [["delta", "alpha", "echo", "charlie", "bravo"], [*SUPERNI[:6], "mine"], ["only"]],
    ids=["other", "superni and one more", "one"],
)
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_order_of_other_suites(names, seed):
    """Section 7: sorted names shuffled by random.Random(seed); the argument is left alone."""
    given, expected = list(names), sorted(names)
    random.Random(seed).shuffle(expected)
    assert data.task_order(given, seed) == expected
    assert given == names


def test_explicit_task_order():
    """Section 7: an explicit order of names or T-numbers is taken as it is, for every seed."""
    names = sorted(BY_NUMBER[number] for number in ("363", "002", "1590"))
    expected = [BY_NUMBER["1590"], BY_NUMBER["002"], BY_NUMBER["363"]]
    for seed in (1, 2):
        assert data.task_order(names, seed, explicit=expected) == expected
        assert data.task_order(names, seed, explicit=["T1590", "002", expected[2]]) == expected
    assert data.task_order(["b", "a"], 1, explicit=["b", "a"]) == ["b", "a"]


@pytest.mark.parametrize(
    "explicit, named",
    [
        (["a", "b"], "c"),
        (["a", "b", "c", "d"], "d"),
        (["a", "b", "d"], "d"),
        (["a", "b", "b"], "b"),
        (["a", "b", "c", "a"], "a"),
        (["a", "b", "T363"], "T363"),
    ],
    ids=["too few", "too many", "unknown", "duplicate", "duplicate more", "unknown number"],
)
def test_explicit_order_must_be_a_permutation(explicit, named):
    """Section 7: --task_order takes each name of the suite once."""
    assert named in refused(data.task_order, ["a", "b", "c"], 1, explicit=explicit)


# Prompts


@pytest.mark.parametrize(
    "definition, text, expected",
    [
        (
            "Name the colour.",
            "sky",
            "Name the colour.\n\nNow complete the following example -\nInput: sky\nOutput: ",
        ),
        ("D", "", "D\n\nNow complete the following example -\nInput: \nOutput: "),
        ("D", " a\tb ", "D\n\nNow complete the following example -\nInput:  a\tb \nOutput: "),
        ("D", "Output: x", "D\n\nNow complete the following example -\nInput: Output: x\nOutput: "),
        (
            "Keep {input} and {0} and %s.",
            "{definition} \\n $1",
            "Keep {input} and {0} and %s.\n\nNow complete the following example -\n"
            "Input: {definition} \\n $1\nOutput: ",
        ),
        (
            "Zwei\nZeilen über 色",
            "naïve 😀",
            "Zwei\nZeilen über 色\n\nNow complete the following example -\n"
            "Input: naïve 😀\nOutput: ",
        ),
    ],
)
def test_build_prompt(definition, text, expected):
    """Section 7: the frame byte for byte; nothing inside the texts is interpreted."""
    assert data.build_prompt(definition, text).encode() == expected.encode()


# Encoding


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("merges", [(), SEAMS], ids=["bytes", "merges"])
def test_rows(tmp_path, bos, merges):
    """Section 7: prompt with specials and target without, tokenised apart, then EOS."""
    tokenizer = byte_tokenizer(bos=bos, merges=merges)
    train = [item("abab", ["blue", "azure"], id="r1"), item("ccab\n", "ab\ncc", id="r2")]
    test = [item("ab", ["red", "cc"], id="t1"), item("grün", "", id="t2")]
    encoded = encode(write_task(tmp_path / "s", "alpha", train, test), tokenizer)
    assert set(encoded.train) == set(encoded.test) == {"alpha"}
    assert [row["id"] for row in encoded.train["alpha"]] == ["r1", "r2"]
    assert [row["id"] for row in encoded.test["alpha"]] == ["t1", "t2"]
    for row, text, target in zip(
        encoded.train["alpha"], ["abab", "ccab\n"], ["blue", "ab\ncc"], strict=True
    ):
        prompt_ids = tokenizer(data.build_prompt(DEFINITION, text)).input_ids
        target_ids = tokenizer(target, add_special_tokens=False).input_ids
        assert prompt_ids.count(0) == bos  # the fixture itself: BOS has id 0
        assert list(row["input_ids"]) == prompt_ids + target_ids + [tokenizer.eos_token_id]
        assert row["num_targets"] == len(target_ids) + 1
        assert row["task"] == "alpha"
    for row, source in zip(encoded.test["alpha"], test, strict=True):
        prompt = data.build_prompt(DEFINITION, source["input"])
        assert row["prompt"] == prompt
        assert list(row["input_ids"]) == tokenizer(prompt).input_ids
    references = [list(row["references"]) for row in encoded.test["alpha"]]
    assert references == [["red", "cc"], [""]]
    assert list(encoded.left_out) == [] and encoded.shortened == {"train": 0, "test": 0}


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("end", [EOS, f"{EOS} {EOS}"])
def test_no_prompt_ends_with_what_the_tokenizer_appends(tmp_path, bos, end):
    """Section 7: the answer follows the prompt; the only EOS is the target's."""
    root = write_task(tmp_path / "s", "alpha", [item("a", "blue")], [item("b" * 50)])
    limit = bos + FRAME + 20
    plain_rows, rows = (
        encode(root, byte_tokenizer(bos=bos, end=end), limit) for end in ("", end)
    )
    assert plain(rows) == plain(plain_rows)
    assert rows.train["alpha"][0]["input_ids"].count(1) == 1
    assert len(rows.test["alpha"][0]["input_ids"]) == limit  # cut for the prompt's own tokens
    encoded = encode(root, byte_tokenizer(bos=bos, end=end, chat=CHAT + EOS), chat_template=True)
    assert encoded.test["alpha"][0]["input_ids"][-1] == 1  # the template's own stays


def test_a_tokenizer_that_knows_no_unknown_word(tmp_path):
    """What its library raises is one line that names the task."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({EOS: 0}, unk_token="nope")), eos_token=EOS
    )
    message = refused(encode, write_task(tmp_path / "s", "alpha"), tokenizer)
    assert "alpha" in message and "[UNK]" in message


def test_empty_target_is_eos_alone(tmp_path):
    """Section 7: an empty string as an output is valid; its target is EOS alone."""
    tokenizer = byte_tokenizer()
    train = [item("a", "", id="e"), item("b", ["", "x"], id="f")]
    rows = encode(write_task(tmp_path / "s", "alpha", train), tokenizer).train["alpha"]
    for row, text in zip(rows, "ab", strict=True):
        prompt_ids = tokenizer(data.build_prompt(DEFINITION, text)).input_ids
        assert row["num_targets"] == 1
        assert list(row["input_ids"]) == [*prompt_ids, tokenizer.eos_token_id]


@pytest.mark.parametrize("over", [0, 1, 7, 19, 20])
@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
def test_long_inputs_are_shortened(tmp_path, over, bos):
    """Section 7: prompt + target just fit; the input gives way, the rest stays, test apart."""
    tokenizer = byte_tokenizer(bos=bos)
    text, target = "abcdefghijklmnopqrst", "blue"  # 20 and 4 bytes
    max_length = bos + FRAME + 20 + 4 + 1 - over
    test = [item("A" * (20 + 5 - over), id="fits"), item("B" * (20 + 5 - over + 3), id="long")]
    root = write_task(tmp_path / "s", "alpha", [item(text, target, id="r")], test)
    encoded = encode(root, tokenizer, max_length)
    (row,) = encoded.train["alpha"]
    prompt_ids, target_ids = split_target(row)
    assert len(row["input_ids"]) == max_length
    assert target_ids == [*tokenizer(target, add_special_tokens=False).input_ids, 1]
    prompt = tokenizer.decode(prompt_ids[bos:])
    assert prompt == HEAD + text[: 20 - over] + TAIL
    assert prompt_ids[:bos] == [0] * bos
    for row, letter in zip(encoded.test["alpha"], "AB", strict=True):  # bounded by the prompt alone
        assert len(row["input_ids"]) == max_length
        assert tokenizer.decode(row["input_ids"][bos:]) == HEAD + letter * (25 - over) + TAIL
        assert list(tokenizer(row["prompt"]).input_ids) == list(row["input_ids"])
    assert encoded.shortened == {"train": int(over > 0), "test": 1}
    assert list(encoded.left_out) == []


@pytest.mark.parametrize("merges", [(), SEAMS], ids=["bytes", "merges"])
def test_shortening_with_any_tokens(tmp_path, merges):
    """Section 7: tokens across the seams or inside a character never break bound or frame."""
    tokenizer = byte_tokenizer(bos=True, merges=merges)
    rng = random.Random(3)
    texts = ["".join(rng.choices("ab cé😀\n", k=rng.randint(1, 60))) for _ in range(40)]
    targets = ["".join(rng.choices("abc ", k=rng.randint(0, 12))) for _ in range(40)]
    rows = [
        item(text, target, id=f"n{i}")
        for i, (text, target) in enumerate(zip(texts, targets, strict=True))
    ]
    root = write_task(tmp_path / "s", "alpha", rows, rows)
    max_length = len(tokenizer(HEAD + TAIL).input_ids) + 30
    encoded = encode(root, tokenizer, max_length)
    shortened = {"train": 0, "test": 0}
    for split, encoded_rows in (("train", encoded.train["alpha"]), ("test", encoded.test["alpha"])):
        for row, text, target in zip(encoded_rows, texts, targets, strict=True):
            whole = tokenizer(HEAD + text + TAIL).input_ids
            target_ids = [*tokenizer(target, add_special_tokens=False).input_ids, 1]
            target_ids = target_ids if split == "train" else []
            ids = list(row["input_ids"])
            prompt_ids = ids[: len(ids) - len(target_ids)]
            assert ids[len(prompt_ids) :] == target_ids and len(ids) <= max_length
            if len(whole) + len(target_ids) <= max_length:
                assert prompt_ids == whole
                continue
            shortened[split] += 1
            prompt = tokenizer.decode(prompt_ids[1:])
            assert prompt.startswith(HEAD) and prompt.endswith(TAIL)
            kept = prompt[len(HEAD) : len(prompt) - len(TAIL)]
            assert text.startswith(kept) and len(kept) < len(text)
    assert encoded.shortened == shortened and min(shortened.values()) > 3


def test_left_out_training_instances(tmp_path):
    """Section 7: what does not fit with an empty input is left out, counted and named."""
    train = [
        item("a" * 9, "x" * 5, id="short"),
        item("b" * 9, "x" * 6, id="exact"),  # fits with an empty input
        item("c" * 9, "x" * 7, id="over"),  # one token too many
        item("", "x" * 7, id="empty and over"),
        item("", "x" * 6, id="empty and exact"),
    ]
    test = [item("d" * 99, "y" * 500, id="t1"), item("e", "y", id="t2")]
    root = write_task(tmp_path / "s", "alpha", train, test)
    write_task(root, "beta", [item("f", "x" * 99, id="over"), item("g", "x", id="fine")], test)
    encoded = encode(root, byte_tokenizer(), FRAME + 6 + 1)
    kept = [row["id"] for row in encoded.train["alpha"]]
    assert kept == ["short", "exact", "empty and exact"]
    assert sorted(map(tuple, encoded.left_out)) == [
        ("alpha", "empty and over"),
        ("alpha", "over"),
        ("beta", "over"),
    ]
    for name in ("alpha", "beta"):
        assert [row["id"] for row in encoded.test[name]] == ["t1", "t2"]
    assert [row["id"] for row in encoded.train["beta"]] == ["fine"]
    # short and exact lost input, in training; t1 in both tasks; g has room for its one letter.
    assert encoded.shortened == {"train": 2, "test": 2}


def test_evaluation_instances_are_never_left_out(tmp_path):
    """Section 7: a prompt whose input must shrink to nothing is still evaluated."""
    tokenizer = byte_tokenizer()
    root = write_task(tmp_path / "s", "alpha", [item("a", "", id="r")], [item("😀" * 9, id="t")])
    encoded = encode(root, tokenizer, FRAME + 1)  # room for one of the four bytes
    (row,) = encoded.test["alpha"]
    assert tokenizer.decode(row["input_ids"]) == HEAD + TAIL
    assert encoded.shortened == {"train": 1, "test": 1}


def test_what_the_model_has_no_room_for_is_refused(tmp_path):
    """A prompt beyond the positions, and a token beyond the embedding; named with the limit."""
    tokenizer = byte_tokenizer()
    root = write_task(tmp_path / "s", "alpha", [item("a", "")], [item("b" * 9, id="long")])
    encoded = encode(root, tokenizer, FRAME + 1)
    length = len(encoded.test["alpha"][0]["input_ids"])
    largest = max(encoded.train["alpha"][0]["input_ids"] + encoded.test["alpha"][0]["input_ids"])
    check_encoded(encoded, length, largest + 1)
    message = refused(check_encoded, encoded, length - 1, largest + 1)
    assert all(word in message for word in ("alpha", "long", str(length), str(length - 1)))
    message = refused(check_encoded, encoded, length, largest)
    assert "alpha" in message and str(largest) in message


def test_task_without_training_instances_is_refused(tmp_path):
    """Section 7: the error names the task and the smallest max_length that is enough."""
    train = [item("a", "x" * 20), item("b" * 30, "x" * 10), item("c", "x" * 15)]
    root = write_task(tmp_path / "s", "alpha", train)
    write_task(root, "roomy", [item("a", "")])
    enough = FRAME + 10 + 1
    for max_length in (enough - 1, FRAME + 1):
        message = refused(encode, root, byte_tokenizer(), max_length)
        assert "alpha" in message
        assert str(enough) in re.findall(r"\d+", message.replace(str(tmp_path), ""))
    assert len(encode(root, byte_tokenizer(), enough).train["alpha"]) == 1


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("cut", [0, 5])
def test_chat_template(tmp_path, bos, cut):
    """Section 7: --chat_template wraps the prompt as the user's turn, one BOS at most."""
    tokenizer = byte_tokenizer(bos=bos, chat=("{{ bos_token }}" if bos else "") + CHAT)
    root = write_task(
        tmp_path / "s", "alpha", [item("abcdefgh", "blue")], [item("x" * 13, ["u", "v"])]
    )
    wrapping = len("[user][/][bot]")
    encoded = encode(root, tokenizer, bos + wrapping + FRAME + 8 + 5 - cut, chat_template=True)
    (train_row,), (test_row,) = encoded.train["alpha"], encoded.test["alpha"]
    prompt_ids, target_ids = split_target(train_row)
    assert target_ids == [*tokenizer("blue", add_special_tokens=False).input_ids, 1]
    kept = ["abcdefgh"[: 8 - cut], "x" * (13 - cut)]
    for ids, text in zip((prompt_ids, test_row["input_ids"]), kept, strict=True):
        assert list(ids).count(0) == bos and list(ids[:bos]) == [0] * bos
        assert tokenizer.decode(ids[bos:]) == f"[user]{HEAD}{text}{TAIL}[/][bot]"
    assert encoded.shortened == {"train": int(cut > 0), "test": int(cut > 0)}
    assert list(test_row["references"]) == ["u", "v"]


def test_chat_template_that_is_not_there_is_refused(tmp_path):
    """Section 7: --chat_template with a tokenizer that has none."""
    root = write_task(tmp_path / "s", "alpha")
    assert "template" in refused(encode, root, byte_tokenizer(), chat_template=True)


def plain(encoded):
    """Everything an Encoded holds, as plain values to compare."""

    def rows(split):
        return {
            task: [{k: list(v) if k == "input_ids" else v for k, v in row.items()} for row in rows]
            for task, rows in split.items()
        }

    left_out = sorted(map(tuple, encoded.left_out))
    return rows(encoded.train), rows(encoded.test), left_out, dict(encoded.shortened)


# Planning


def draw_lengths(count, seed=0):
    """Random lengths of 5 to 400 tokens."""
    rng = random.Random(seed)
    return [rng.randint(5, 400) for _ in range(count)]


@pytest.mark.parametrize(
    "count, size", [(1, 1), (1, 8), (7, 8), (8, 8), (9, 8), (64, 8), (103, 8), (103, 1), (250, 32)]
)
def test_plan_covers_every_row_once(count, size):
    """Section 7: batches of the global size, each row once, only the last one filled with -1."""
    plan = data.plan_epoch(draw_lengths(count), size, 1, "mixed", 0)
    assert len(plan) == -(-count // size)
    assert all(len(batch) == size for batch in plan)
    assert sorted(i for batch in plan for i in batch if i != -1) == list(range(count))
    assert [batch.count(-1) for batch in plan] == [0] * (len(plan) - 1) + [-count % size]


def test_plan_depends_on_its_arguments_alone():
    """Section 7: the same for the same arguments, whatever the global generator does."""
    lengths = draw_lengths(100)
    random.seed(1)
    first = data.plan_epoch(lengths, 8, 3, "task002", 2)
    random.seed(2)
    torch.manual_seed(5)
    assert data.plan_epoch(list(lengths), 8, 3, "task002", 2) == first
    assert lengths == draw_lengths(100)
    others = [
        data.plan_epoch(lengths, 8, *other)
        for other in [(4, "task002", 2), (3, "task073", 2), (3, "task002", 3)]
    ]
    assert all(other != first for other in others)
    assert all(a != b for a, b in zip(others, others[1:] + others[:1], strict=True))


def test_plan_is_the_same_in_every_process():
    """Section 7: ranks and resumed runs agree, so no salted hash of the stage's name."""
    script = (
        "import data, json, random; r = random.Random(0);"
        "lengths = [r.randint(5, 400) for _ in range(100)];"
        "print(json.dumps(data.plan_epoch(lengths, 8, 3, 'task002', 2)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = data.plan_epoch(draw_lengths(100), 8, 3, "task002", 2)
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def padding(plan, lengths):
    """Tokens of padding when each batch is padded to its longest row."""
    total = 0
    for batch in plan:
        sizes = [lengths[i] for i in batch if i != -1]
        total += max(sizes) * len(sizes) - sum(sizes)
    return total


@pytest.mark.parametrize("count", [200, 1000])
def test_plan_groups_by_length(count):
    """Section 7: total padding is at most half of that of a random order."""
    lengths = draw_lengths(count)
    shuffled = list(range(count))
    random.Random(1).shuffle(shuffled)
    by_chance = padding([shuffled[i : i + 8] for i in range(0, count, 8)], lengths)
    for epoch in range(3):
        plan = data.plan_epoch(lengths, 8, 1, "mixed", epoch)
        assert padding(plan, lengths) < 0.5 * by_chance


# Collation

PAD = 9


def make_row(prompt, target):
    """A train row from its prompt and target ids."""
    return {"task": "a", "id": "r", "input_ids": prompt + target, "num_targets": len(target)}


def naive_batch(rows):
    """The batch of section 7 written cell by cell with explicit left padding."""
    k = 1 + max([row["num_targets"] for row in rows if row is not None], default=0)
    width = max(len(row["input_ids"]) for row in rows if row is not None)
    ids, mask, positions, labels = [], [], [], []
    for row in rows:
        tokens = [] if row is None else row["input_ids"]
        gap = width - len(tokens)
        start = width - (0 if row is None else row["num_targets"])
        full = [-100] * width
        for column in range(start, width):
            full[column] = tokens[column - gap]
        ids.append([PAD] * gap + tokens)
        mask.append([0] * gap + [1] * len(tokens))
        positions.append(list(range(len(tokens))))
        labels.append(full[width - k :])
    return k, width, ids, mask, positions, labels


ROWS = {
    "one": [make_row([1, 2, 3], [4, 5])],
    "mixed lengths": [make_row([1, 2], [4]), make_row([1, 2, 3, 4], [6, 7, 8]), make_row([3], [5])],
    "pad id as text and target": [make_row([PAD, 2, PAD], [4, PAD]), make_row([1], [PAD])],
    "filler last": [make_row([1, 2, 3], [4, 5]), None, None],
    "filler first": [None, make_row([1, 2, 3], [4, 5]), make_row([1], [2])],
    "equal lengths": [make_row([1, 2], [3, 4]), make_row([5, 6, 7], [8])],
}


@pytest.mark.parametrize("case", ROWS)
def test_collate(case):
    """Section 7: left padding, masks from lengths, labels of the last k positions."""
    rows = ROWS[case]
    k, width, ids, mask, positions, labels = naive_batch(rows)
    batch = data.collate(rows, PAD, 17)
    tensors = ("input_ids", "attention_mask", "position_ids", "labels")
    assert set(batch) == {*tensors, "logits_to_keep", "num_items_in_batch"}
    assert batch["logits_to_keep"] == k and batch["num_items_in_batch"] == 17
    assert isinstance(batch["logits_to_keep"], int) and isinstance(batch["num_items_in_batch"], int)
    assert all(isinstance(batch[name], torch.Tensor) for name in tensors)
    assert all(batch[n].dtype == torch.int64 for n in ("input_ids", "position_ids", "labels"))
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].tolist() == mask
    assert batch["labels"].tolist() == labels
    assert batch["labels"].shape == (len(rows), k)
    assert batch["position_ids"].shape == (len(rows), width)
    for got, expected in zip(batch["position_ids"].tolist(), positions, strict=True):
        assert got[width - len(expected) :] == expected
        assert all(0 <= position < max(width, 2) for position in got)  # in range on padding too


def test_collate_of_fillers_alone():
    """Section 7: a process whose share of a short last batch is empty still gets a batch."""
    batch = data.collate([None, None], PAD, 5)
    width = batch["input_ids"].shape[1]
    assert width >= 1 and batch["input_ids"].tolist() == [[PAD] * width] * 2
    assert not batch["attention_mask"].any()
    assert batch["position_ids"].shape == batch["attention_mask"].shape == (2, width)
    assert batch["logits_to_keep"] == 1 and batch["labels"].tolist() == [[-100]] * 2
    assert batch["num_items_in_batch"] == 5


def test_collated_loss_equals_row_by_row_loss():
    """Section 7: on a tiny Llama, summed target loss over the given count, gradients finite."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).double()
    rows = [*ROWS["mixed lengths"], *ROWS["pad id as text and target"], None]
    total = torch.zeros((), dtype=torch.float64)
    for row in rows[:-1]:
        ids = torch.tensor([row["input_ids"]])  # (1, seq), no padding at all
        log_probs = model(ids).logits.log_softmax(-1)  # (1, seq, vocabulary)
        for column in range(ids.shape[1] - row["num_targets"], ids.shape[1]):
            total = total - log_probs[0, column - 1, ids[0, column]]
    loss = model(**data.collate(rows, PAD, 13)).loss
    assert loss.item() == pytest.approx((total / 13).item(), abs=1e-5)  # the loss is in float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# Download


class Server:
    """A loopback server: contents by path, faults by path, and what was asked for."""

    def __init__(self):
        self.files, self.faults, self.asked = {}, {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                path = self.path.removeprefix("/base/")
                outer.asked.append(path)
                body, fault = outer.files.get(path), outer.faults.get(path)
                if fault == "dropped":
                    return  # the connection closes without an answer
                if body is None or fault == "not found":
                    self.send_error(404)
                    return
                if fault == "server error":
                    self.send_error(500)
                    return
                if fault == "wrong checksum":
                    body = body[::-1]
                if callable(fault):
                    fault(self)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if fault == "truncated" else body)

            def log_message(self, *args):
                """Say nothing."""

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/base/"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        """Stop answering."""
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server():
    """A server with three files, one of them larger than a read buffer."""
    running = Server()
    running.files = {
        "alpha/train.json": b'{"a": 1}\n',
        "alpha/test.json": random.Random(0).randbytes(300_000),
        "beta/train.json": b'{"b": "\xc3\xa9"}\n',
    }
    yield running
    running.close()


def manifest_of(files):
    """Relative path to SHA-256."""
    return {path: hashlib.sha256(body).hexdigest() for path, body in files.items()}


def stored(folder):
    """Relative path to content of every file below the folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_download(server, tmp_path):
    """Section 7: every file of the manifest, checked, nothing else; then nothing left to ask."""
    manifest = manifest_of(server.files)
    target = tmp_path / "deep" / "superni"
    data.download(target, base_url=server.url, manifest=manifest)
    assert stored(target) == server.files
    assert sorted(server.asked) == sorted(server.files)
    server.asked.clear()
    data.download(str(target), base_url=server.url, manifest=manifest)
    assert server.asked == [] and stored(target) == server.files


def test_download_replaces_only_what_is_wrong(server, tmp_path):
    """Section 7: a right file is kept without a request, a wrong or missing one is fetched."""
    write = tmp_path / "superni" / "alpha"
    write.mkdir(parents=True)
    (write / "train.json").write_bytes(server.files["alpha/train.json"])
    (write / "test.json").write_bytes(server.files["alpha/test.json"][:1000])
    data.download(tmp_path / "superni", base_url=server.url, manifest=manifest_of(server.files))
    assert sorted(server.asked) == ["alpha/test.json", "beta/train.json"]
    assert stored(tmp_path / "superni") == server.files


@pytest.mark.parametrize(
    "fault", ["wrong checksum", "truncated", "dropped", "not found", "server error"]
)
@pytest.mark.parametrize("path", ["alpha/test.json", "beta/train.json"])
def test_download_failure_then_retry(server, tmp_path, fault, path):
    """Section 7: a fault names the file and leaves nothing at its name; a re-run completes."""
    manifest = manifest_of(server.files)
    server.faults[path] = fault
    message = refused(data.download, tmp_path / "d", base_url=server.url, manifest=manifest)
    assert path in message
    kept = {name for name in manifest if (tmp_path / "d" / name).exists()}
    assert path not in kept
    assert all((tmp_path / "d" / name).read_bytes() == server.files[name] for name in kept)
    server.faults.clear()
    server.asked.clear()
    data.download(tmp_path / "d", base_url=server.url, manifest=manifest)
    assert set(server.asked) == set(manifest) - kept
    assert {name: stored(tmp_path / "d").get(name) for name in manifest} == server.files


def bad_redirect(handler):
    """To an address that is none."""
    handler.send_response(302)
    handler.send_header("Location", "http://[::1")
    handler.end_headers()


def bad_length(text):
    """An answer with this Content-Length."""
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", text)
        handler.end_headers()
        handler.wfile.write(b"abc")
    return answer


@pytest.mark.parametrize("fault, named", [
    (bad_redirect, "could not download"), (bad_length("abc"), "'abc'"),
    (bad_length("3, 3"), "'3, 3'"), (bad_length("9" * 5000), "5000 digits"),
], ids=["redirect", "abc", "3, 3", "digits"])
def test_download_from_a_strange_server(server, tmp_path, fault, named):
    """Section 7: one line that names the file, and nothing of it on the disk."""
    manifest = manifest_of({"alpha/train.json": b"abc"})
    server.files, server.faults = {"alpha/train.json": b"abc"}, {"alpha/train.json": fault}
    message = refused(data.download, tmp_path / "d", base_url=server.url, manifest=manifest)
    assert "alpha/train.json" in message and named in message and stored(tmp_path / "d") == {}


def test_verify_shows_any_folder_in_one_line(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"a\nb\x1b\xff")
    assert data.main(["verify", "superni", "--data_dir", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and r"a\nb\x1b\udcff" in err


def test_download_without_a_server(tmp_path):
    """Section 7: a refused connection is one line that names the file, too."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/base/"
        manifest = {"alpha/train.json": "0" * 64}
        message = refused(data.download, tmp_path / "d", base_url=url, manifest=manifest)
    assert "alpha/train.json" in message and not (tmp_path / "d" / "alpha" / "train.json").exists()
