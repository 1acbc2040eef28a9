"""Suites, task orders, prompts, encoding and batches."""

import collections
import json
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import complaint
from suite_files import DEFINITION, item, write_task
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import data
from harness.checks import check_encoded
from inputs.suites import SUPERNI

BY_NUMBER = {re.match(r"task(\d+)_", name)[1]: name for name in SUPERNI}
SEED_ORDERS = {
    1: "591 073 1687 875 1572 639 1510 1590 511 181 363 1729 002 1290 748",
    2: "1290 1510 1572 002 073 511 1590 363 748 639 181 1729 1687 591 875",
    3: "002 073 1572 181 591 1687 363 1729 511 875 639 748 1590 1290 1510",
    4: "1290 875 639 1590 591 073 1687 002 748 511 1572 181 1729 363 1510",
    5: "748 1510 875 002 591 1729 1572 511 1687 1590 073 639 181 363 1290",
}
CATEGORIES = ["073 002 591", "1290 1572 511", "363 875 1687", "639 1590 1729", "181 748 1510"]

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
    monkeypatch.setenv("no_proxy", "*")


def names(numbers):
    """Folder names of SuperNI tasks from their numbers, as words of a text."""
    return [BY_NUMBER[number] for number in numbers.split()]


def load(root):
    """The suite in the folder `root`, by its path as text."""
    return data.load_suite(str(root))


# --- suites -------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_path", [str, Path])
def test_load_suite_from_a_folder(tmp_path, as_path):
    """Definition, instances with a list of references, metric and category."""
    train = [item("a", "x", id="first"), item("b", ["y", "z"], id="second"), item("c", "", id="n")]
    keys = {"Metric": "accuracy", "Category": "Toys", "Domains": ["ignored"]}
    write_task(tmp_path / "toys", "alpha", train, [item("d", [""], id="t")], **keys)
    write_task(tmp_path / "toys", "beta")
    (tmp_path / "toys" / "README.md").write_text("not a task")
    suite = data.load_suite(as_path(tmp_path / "toys"))
    assert suite.name == "toys" and set(suite.tasks) == {"alpha", "beta"}
    task = suite.tasks["alpha"]
    assert task[:4] == ("alpha", DEFINITION, "Toys", "accuracy")
    assert task.train == [
        {"id": "first", "input": "a", "outputs": ["x"]},
        {"id": "second", "input": "b", "outputs": ["y", "z"]},
        {"id": "n", "input": "c", "outputs": [""]},
    ]
    assert task.test == [{"id": "t", "input": "d", "outputs": [""]}]
    assert suite.tasks["beta"].metric == "rouge_l"


@pytest.mark.parametrize("name, keys, category, metric", [
    (BY_NUMBER["363"], {}, *SUPERNI[BY_NUMBER["363"]]),
    (BY_NUMBER["363"], {"Metric": "rouge_l"}, "sentiment analysis", "rouge_l"),
    (BY_NUMBER["073"], {"Metric": "accuracy", "Category": "mine"}, "mine", "accuracy"),
    (BY_NUMBER["073"], {"Categories": ["Finer"]}, *SUPERNI[BY_NUMBER["073"]]),
    ("task363_other", {"Categories": ["Toys", "Games"]}, "Toys", "rouge_l"),
    ("mine", {"Categories": "Toys"}, "Toys", "rouge_l"),
    ("mine", {"Metric": "accuracy"}, "other", "accuracy"),
])
def test_metric_and_category(tmp_path, name, keys, category, metric):
    """What the file says wins; then SuperNI's table, by exact folder name; then the defaults."""
    task = load(write_task(tmp_path / "s", name, **keys)).tasks[name]
    assert (task.category, task.metric) == (category, metric)


def test_a_definition_as_text_equals_its_lines(tmp_path):
    folder = write_task(tmp_path / "s", "mine", Definition=["Say", "it."])
    file = folder / "mine" / "test.json"
    content = json.loads(file.read_text()) | {"Definition": "Say\nit."}
    file.write_text(json.dumps(content))
    assert load(folder).tasks["mine"].definition == "Say\nit."


def test_superni_names_carry_metric_and_category():
    """Three accuracy tasks; five categories of three tasks each (Table 4)."""
    accuracy = {name for name, (_, metric) in SUPERNI.items() if metric == "accuracy"}
    assert accuracy == set(names("363 875 1687"))
    groups = collections.defaultdict(set)
    for name, (category, _) in SUPERNI.items():
        groups[category].add(name)
    assert sorted(map(sorted, groups.values())) == sorted(sorted(names(g)) for g in CATEGORIES)


def test_ids(tmp_path):
    """A missing or null one is made of the row's index; a number becomes text: 1 is "1"."""
    train = [item("a"), item("b", id="kept"), item("c", id=10**12), item("d", id=None)]
    write_task(tmp_path / "s", "alpha", train)
    first, second = (load(tmp_path / "s").tasks["alpha"] for _ in range(2))
    assert [row["id"] for row in first.train] == [
        "alpha-train-0", "kept", str(10**12), "alpha-train-3"]
    assert (first.train, first.test) == (second.train, second.test)
    write_task(tmp_path / "s", "alpha", [item("a", id=1), item("b", id="1")])
    assert "the same id" in complaint(load, tmp_path / "s")


def test_mini_suite(tmp_path, monkeypatch):
    """Shaped like SuperNI, found from any folder; no test input is trained on."""
    monkeypatch.chdir(tmp_path)
    mini = data.load_suite("mini")
    assert mini.name == "mini" and len(mini.tasks) == 15
    counts = collections.Counter(task.category for task in mini.tasks.values())
    assert sorted(counts.values()) == [3] * 5
    for name, task in mini.tasks.items():
        assert task.name == name and task.definition.strip()
        assert task.metric in ("rouge_l", "accuracy")
        assert len(task.train) >= 24 and len(task.test) >= 8, name
        for rows in (task.train, task.test):
            assert len({row["id"] for row in rows}) == len(rows), name
            assert all(row["outputs"] and row["input"].strip() for row in rows), name
        seen = {row["input"].strip() for row in task.train}
        assert not seen & {row["input"].strip() for row in task.test}, name


# --- choosing and ordering tasks ----------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path):
    """A suite of folders with numbers, two with the same one, and one without."""
    for name in ("task363_x", "task073_y", "task1729_z", "task7_w", "plain", "task5_a", "task5_b"):
        write_task(tmp_path / "numbered", name)
    return load(tmp_path / "numbered")


def test_select_tasks(numbered):
    """Folder names or T-numbers; the tasks themselves and the whole suite are unchanged."""
    before = dict(numbered.tasks)
    chosen = data.select_tasks(numbered, ["073", "task1729_z", "T7", "task5_b", "plain"])
    assert chosen.tasks == {name: before[name] for name in (
        "task073_y", "task1729_z", "task7_w", "task5_b", "plain")}
    assert numbered.tasks == before


def test_select_unknown_or_repeated_task_is_refused(numbered):
    """No partial matches, no number of two tasks, no task twice; the allowed names are listed."""
    for wrong in ("T36", "T3631", "1", "plai", "task363", "task363_", "", "T", "T5", "plain"):
        message = complaint(data.select_tasks, numbered, ["plain", wrong])
        assert repr(wrong) in message
        assert wrong == "plain" or all(name in message for name in numbered.tasks)
    assert "'363'" in complaint(data.select_tasks, numbered, ["T363", "363"])


@pytest.mark.parametrize("seed", SEED_ORDERS)
def test_paper_task_orders(seed):
    """The five orders, whatever order the names come in; a subset keeps them."""
    kept = names("363 002 1590 748 181 073")
    expected = [name for name in names(SEED_ORDERS[seed]) if name in kept]
    for arrange in (list, sorted, reversed):
        assert data.task_order(list(arrange(list(SUPERNI))), seed) == names(SEED_ORDERS[seed])
        assert data.task_order(list(arrange(kept)), seed) == expected


@pytest.mark.parametrize("given, listed, seed", [
    (["delta", "alpha", "echo", "bravo"], ["alpha", "bravo", "delta", "echo"], 5),
    ([*list(SUPERNI)[:6], "mine"], sorted([*list(SUPERNI)[:6], "mine"]), 0),
    (sorted(SUPERNI), list(SUPERNI), 17),
])
def test_order_of_other_suites_and_seeds(given, listed, seed):
    """Sorted names (SuperNI: its list) shuffled by random.Random(seed); `given` is left alone."""
    before, expected = list(given), list(listed)
    random.Random(seed).shuffle(expected)
    assert data.task_order(given, seed) == expected and given == before


def test_explicit_task_order():
    """Names or T-numbers are taken as they are, for every seed."""
    expected = names("1590 002 363")
    for seed in (1, 2):
        assert data.task_order(sorted(expected), seed, expected) == expected
        assert data.task_order(expected, seed, ["T1590", "002", expected[2]]) == expected
    assert data.task_order(["b", "a"], 1, ["b", "a"]) == ["b", "a"]


@pytest.mark.parametrize("explicit, named", [
    ("a b", "c"), ("a b c d", "d"), ("a b c a", "a"), ("a b T363", "T363")])
def test_explicit_order_must_be_a_permutation(explicit, named):
    """--task_order takes each name of the suite once."""
    assert named in complaint(data.task_order, ["a", "b", "c"], 1, explicit.split())


# --- prompts and rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("definition, text", [
    ("D", ""), ("Keep {input} and {0} and %s.", "{definition} \\n $1"),
    ("Zwei\nZeilen über 色", " naïve\t😀 Output: ")])
def test_build_prompt(definition, text):
    """The frame byte for byte; nothing inside the texts is interpreted."""
    frame = "\n\nNow complete the following example -\nInput: ", "\nOutput: "
    assert data.build_prompt(definition, text) == definition + frame[0] + text + frame[1]


def byte_tokenizer(bos=False, chat=None, merges=(), end=""):
    """One token per byte (before merges), so lengths in tokens can be worked out by hand."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(
        [BOS, EOS, *symbols, *(a + b for a, b in merges)])}
    inner = Tokenizer(models.BPE(vocabulary, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if bos or end:
        inner.post_processor = processors.TemplateProcessing(
            single=[*[BOS] * bos, "$A", *end.split()],
            special_tokens=[(name, vocabulary[name]) for name in (BOS, EOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BOS if bos else None, eos_token=EOS,
        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = chat
    return tokenizer


def encode(root, tokenizer, max_length=1000, **options):
    """Load the folder `root` and encode it."""
    return data.encode_suite(load(root), tokenizer, max_length, **options)


def totals(encoded):
    """Instances with a cut input, by split."""
    return {split: sum(counts.values()) for split, counts in encoded.shortened.items()}


def target_of(tokenizer, text):
    """The ids of a target: its own and EOS."""
    return [*tokenizer(text, add_special_tokens=False).input_ids, 1]


def split_target(row):
    """Prompt ids and target ids of a train row."""
    return row["input_ids"][:-row["num_targets"]], row["input_ids"][-row["num_targets"]:]


BOS_OR_NOT = pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])


@BOS_OR_NOT
@pytest.mark.parametrize("merges", [(), SEAMS], ids=["bytes", "merges"])
def test_rows(tmp_path, bos, merges):
    """Prompt with specials and target without, tokenised apart, then EOS; that alone if empty."""
    tokenizer = byte_tokenizer(bos=bos, merges=merges)
    train = [item("abab", ["blue", "azure"], id="r1"), item("ccab\n", "ab\ncc", id="r2"),
             item("a", "", id="r3"), item("b", ["", "x"], id="r4")]
    test = [item("ab", ["red", "cc"], id="t1"), item("grün", "", id="t2")]
    encoded = encode(write_task(tmp_path / "s", "alpha", train, test), tokenizer)
    assert set(encoded.train) == set(encoded.test) == {"alpha"}
    for row, source, target in zip(encoded.train["alpha"], train, ["blue", "ab\ncc", "", ""],
                                   strict=True):
        prompt_ids = tokenizer(data.build_prompt(DEFINITION, source["input"])).input_ids
        assert prompt_ids.count(0) == bos  # the fixture itself: BOS has id 0
        target_ids = target_of(tokenizer, target)
        assert row == {"task": "alpha", "id": source["id"], "num_targets": len(target_ids),
                       "input_ids": prompt_ids + target_ids}
    for row, source, references in zip(encoded.test["alpha"], test, [["red", "cc"], [""]],
                                       strict=True):
        prompt = data.build_prompt(DEFINITION, source["input"])
        assert row == {"task": "alpha", "id": source["id"], "prompt": prompt,
                       "input_ids": tokenizer(prompt).input_ids, "references": references,
                       "target_tokens": len(target_of(tokenizer, references[0]))}
    assert encoded.left_out == [] and totals(encoded) == {"train": 0, "test": 0}


@BOS_OR_NOT
@pytest.mark.parametrize("end", [EOS, f"{EOS} {EOS}"])
def test_no_prompt_ends_with_what_the_tokenizer_appends(tmp_path, bos, end):
    """The answer follows the prompt; the only EOS is the target's."""
    root = write_task(tmp_path / "s", "alpha", [item("a", "blue")], [item("b" * 50)])
    limit = bos + FRAME + 20
    rows = encode(root, byte_tokenizer(bos=bos, end=end), limit)
    assert rows == encode(root, byte_tokenizer(bos=bos), limit)
    assert rows.train["alpha"][0]["input_ids"].count(1) == 1
    assert len(rows.test["alpha"][0]["input_ids"]) == limit  # cut for the prompt's own tokens
    encoded = encode(root, byte_tokenizer(bos=bos, end=end, chat=CHAT + EOS), chat_template=True)
    assert encoded.test["alpha"][0]["input_ids"][-1] == 1  # the template's own stays


@BOS_OR_NOT
@pytest.mark.parametrize("merges", [(), SEAMS], ids=["bytes", "merges"])
def test_long_inputs_are_shortened(tmp_path, bos, merges):
    """The input gives way, by no character too many; the rest stays, whatever the tokens.

    Tokens may lie across the seams of the frame or inside a character.
    """
    tokenizer, rng = byte_tokenizer(bos=bos, merges=merges), random.Random(3)
    texts = ["".join(rng.choices("ab cé😀\n", k=rng.randint(1, 60))) for _ in range(40)]
    targets = ["".join(rng.choices("abc ", k=rng.randint(0, 12))) for _ in range(40)]
    rows = [item(text, target) for text, target in zip(texts, targets, strict=True)]
    limit = len(tokenizer(HEAD + TAIL).input_ids) + 30
    encoded = encode(write_task(tmp_path / "s", "alpha", rows, rows), tokenizer, limit)
    shortened = {"train": 0, "test": 0}
    for split in shortened:
        for row, text, target in zip(getattr(encoded, split)["alpha"], texts, targets, strict=True):
            prompt_ids, target_ids = split_target(row) if split == "train" else (
                row["input_ids"], [])
            assert target_ids == (target_of(tokenizer, target) if split == "train" else [])
            prompt, room = tokenizer.decode(prompt_ids[bos:]), limit - len(target_ids)
            assert len(prompt_ids) <= room and prompt_ids[:bos] == [0] * bos
            assert prompt.startswith(HEAD) and prompt.endswith(TAIL)
            kept = len(prompt) - len(HEAD) - len(TAIL)
            assert prompt == HEAD + text[:kept] + TAIL == row.get("prompt", prompt)
            assert prompt_ids == tokenizer(prompt).input_ids
            if kept < len(text):
                shortened[split] += 1
                assert len(tokenizer(HEAD + text[:kept + 1] + TAIL).input_ids) > room
    assert totals(encoded) == shortened and min(shortened.values()) > 3


def test_left_out_training_instances(tmp_path):
    """What does not fit with an empty input is left out, counted and named; in training alone."""
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
    assert sorted(encoded.left_out) == [("alpha", "empty and over"), ("alpha", "over"),
                                        ("beta", "over")]
    kept = {name: [row["id"] for row in rows] for name, rows in encoded.train.items()}
    assert kept == {"alpha": ["short", "exact", "empty and exact"], "beta": ["fine"]}
    for rows in encoded.test.values():
        assert [row["id"] for row in rows] == ["t1", "t2"]
    # short and exact lost input, in training; t1 in both tasks; g has room for its one letter.
    assert totals(encoded) == {"train": 2, "test": 2}


def test_evaluation_instances_are_never_left_out(tmp_path):
    """A prompt whose input must shrink to nothing is still evaluated."""
    tokenizer = byte_tokenizer()
    root = write_task(tmp_path / "s", "alpha", [item("a", "", id="r")], [item("😀" * 9, id="t")])
    encoded = encode(root, tokenizer, FRAME + 1)  # room for one of the four bytes
    (row,) = encoded.test["alpha"]
    assert tokenizer.decode(row["input_ids"]) == HEAD + TAIL
    assert totals(encoded) == {"train": 1, "test": 1}


def test_an_empty_input_is_not_shortened(tmp_path):
    """Though its prompt is too long."""
    root = write_task(tmp_path / "s", "alpha", [item("a", "")], [item("", id="t")])
    encoded = encode(root, byte_tokenizer(), FRAME - 3, splits=("test",))
    assert len(encoded.test["alpha"][0]["input_ids"]) > FRAME - 3
    assert encoded.shortened["test"] == {"alpha": 0}


def test_what_the_model_has_no_room_for_is_refused(tmp_path):
    """A prompt beyond the positions, and a token beyond the embedding; named with the limit."""
    root = write_task(tmp_path / "s", "alpha", [item("a", "")], [item("b" * 9, id="long")])
    encoded = encode(root, byte_tokenizer(), FRAME + 1)
    length = len(encoded.test["alpha"][0]["input_ids"])
    largest = max(encoded.train["alpha"][0]["input_ids"] + encoded.test["alpha"][0]["input_ids"])
    check_encoded(encoded, length + 5, 5, False, largest + 1)
    message = complaint(check_encoded, encoded, length + 4, 5, False, largest + 1)
    assert all(word in message for word in ("alpha", "long", str(length), str(length - 1)))
    needed = encoded.test["alpha"][0]["target_tokens"]
    assert needed == len("blue") + 1  # EOS
    check_encoded(encoded, length + needed, 1, True, largest + 1)
    message = complaint(check_encoded, encoded, length + needed - 1, 1, True, largest + 1)
    assert "alpha, long: --eval_loss reads" in message and f"of {length} tokens" in message
    message = complaint(check_encoded, encoded, length + 5, 5, False, largest)
    assert "alpha" in message and str(largest) in message


def test_task_without_training_instances_is_refused(tmp_path):
    """The error names the task and the smallest max_length that is enough."""
    train = [item("a", "x" * 20), item("b" * 30, "x" * 10), item("c", "x" * 15)]
    root = write_task(tmp_path / "s", "alpha", train)
    write_task(root, "roomy", [item("a", "")])
    enough = FRAME + 10 + 1
    for max_length in (enough - 1, FRAME + 1):
        message = complaint(encode, root, byte_tokenizer(), max_length)
        assert "alpha" in message and str(enough) in re.findall(r"\d+", message)
    assert len(encode(root, byte_tokenizer(), enough).train["alpha"]) == 1


@BOS_OR_NOT
@pytest.mark.parametrize("cut", [0, 5])
def test_chat_template(tmp_path, bos, cut):
    """--chat_template wraps the prompt as the user's turn, one BOS at most."""
    tokenizer = byte_tokenizer(bos=bos, chat=("{{ bos_token }}" if bos else "") + CHAT)
    root = write_task(tmp_path / "s", "alpha", [item("abcdefgh", "blue")],
                      [item("x" * 13, ["u", "v"])])
    wrapping = len("[user][/][bot]")
    encoded = encode(root, tokenizer, bos + wrapping + FRAME + 8 + 5 - cut, chat_template=True)
    (train_row,), (test_row,) = encoded.train["alpha"], encoded.test["alpha"]
    prompt_ids, target_ids = split_target(train_row)
    assert target_ids == target_of(tokenizer, "blue")
    kept = ["abcdefgh"[:8 - cut], "x" * (13 - cut)]
    for ids, text in zip((prompt_ids, test_row["input_ids"]), kept, strict=True):
        assert ids.count(0) == bos and ids[:bos] == [0] * bos
        assert tokenizer.decode(ids[bos:]) == f"[user]{HEAD}{text}{TAIL}[/][bot]"
    assert totals(encoded) == {"train": int(cut > 0), "test": int(cut > 0)}
    assert test_row["references"] == ["u", "v"]


def test_tokenizers_of_no_use_are_refused(tmp_path):
    """Without a template or EOS where needed, or failing at an unknown word; the task is named."""
    root = write_task(tmp_path / "s", "alpha")
    assert "template" in complaint(encode, root, byte_tokenizer(), chat_template=True)
    unknown = Tokenizer(models.WordLevel({EOS: 0}, unk_token="nope"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unknown, eos_token=EOS)
    message = complaint(encode, root, tokenizer)
    assert "alpha" in message and "[UNK]" in message
    tokenizer.eos_token = None
    assert "EOS" in complaint(encode, root, tokenizer)


# --- batches ------------------------------------------------------------------------------------


def draw_lengths(count):
    """Random lengths of 5 to 400 tokens."""
    rng = random.Random(0)
    return [rng.randint(5, 400) for _ in range(count)]


@pytest.mark.parametrize("count, size", [(1, 8), (8, 8), (9, 8), (103, 8), (103, 1), (250, 32)])
def test_plan_covers_every_row_once(count, size):
    """Batches of the global size, each row once, only the last one filled with -1."""
    plan = data.plan_epoch(draw_lengths(count), size, 1, "mixed", 0)
    assert len(plan) == -(-count // size) and all(len(batch) == size for batch in plan)
    assert sorted(i for batch in plan for i in batch if i != -1) == list(range(count))
    assert [batch.count(-1) for batch in plan] == [0] * (len(plan) - 1) + [-count % size]


def test_plan_depends_on_its_arguments_alone():
    """Whatever the global generator does, and in every process: no salted hash of a name."""
    known = [[1, 0, 4, 3], [9, 8, 7, 6], [5, 2, -1, -1]]
    assert data.plan_epoch([5] * 10, 4, 3, "task002", 2) == known
    lengths = draw_lengths(100)
    random.seed(1)
    first = data.plan_epoch(lengths, 8, 3, "task002", 2)
    random.seed(2)
    torch.manual_seed(5)
    assert data.plan_epoch(list(lengths), 8, 3, "task002", 2) == first
    assert lengths == draw_lengths(100)
    plans = [first, *(data.plan_epoch(lengths, 8, *other) for other in [
        (4, "task002", 2), (3, "task073", 2), (3, "task002", 3)])]
    assert len({str(plan) for plan in plans}) == 4


def padding(plan, lengths):
    """Tokens of padding when each batch is padded to its longest row."""
    sizes = [[lengths[i] for i in batch if i != -1] for batch in plan]
    return sum(max(batch) * len(batch) - sum(batch) for batch in sizes)


def test_plan_groups_by_length():
    """Total padding is at most half of that of a random order."""
    lengths, shuffled = draw_lengths(200), list(range(200))
    random.Random(1).shuffle(shuffled)
    by_chance = padding([shuffled[i:i + 8] for i in range(0, 200, 8)], lengths)
    for epoch in range(3):
        plan = data.plan_epoch(lengths, 8, 1, "mixed", epoch)
        assert padding(plan, lengths) < 0.5 * by_chance


PAD = 9


def make_row(prompt, target):
    """A train row from its prompt and target ids."""
    return {"task": "a", "id": "r", "input_ids": prompt + target, "num_targets": len(target)}


ROWS = {
    "one": [make_row([1, 2, 3], [4, 5])],
    "mixed lengths": [make_row([1, 2], [4]), make_row([1, 2, 3, 4], [6, 7, 8]), make_row([3], [5])],
    "pad id as text and target": [make_row([PAD, 2, PAD], [4, PAD]), make_row([1], [PAD])],
    "fillers": [None, make_row([1, 2, 3], [4, 5]), make_row([1], [2]), None],
    "fillers alone": [None, None],  # the share of a process in a short last batch
}


def test_the_micro_batches_of_an_epoch():
    """Parts of the planned global batches, with the counts of the whole; a new plan per epoch."""
    rows = [make_row([1] * (3 + i), [2] * (1 + i % 3)) for i in range(11)]
    lengths, plan = [len(row["input_ids"]) for row in rows], data.EpochPlan(rows, 4, 2, 7, "mixed")
    for epoch in (0, 2):
        plan.set_epoch(epoch)
        wholes = [[None if row < 0 else rows[row] for row in batch]
                  for batch in data.plan_epoch(lengths, 4, 7, "mixed", epoch)]
        assert list(plan) == [
            (whole[first:first + 2], sum(row["num_targets"] for row in whole if row),
             sum(len(row["input_ids"]) for row in whole if row))
            for whole in wholes for first in (0, 2)]
    batch = data.collate_micro_batch([data.MicroBatch([rows[3], None], 9, 40)], PAD)
    assert batch.pop("tasks") == ["a", None] and batch.pop("num_tokens") == 40
    assert str(batch) == str(data.collate([rows[3], None], PAD, 9))


@pytest.mark.parametrize("case", ROWS)
def test_collate(case):
    """Left padding, masks from lengths, labels of the last k positions; written cell by cell."""
    rows, batch = ROWS[case], data.collate(ROWS[case], PAD, 17)
    k = 1 + max((row["num_targets"] for row in rows if row), default=0)
    width = max((len(row["input_ids"]) for row in rows if row), default=1)
    assert batch.pop("num_items_in_batch") == 17
    assert batch.pop("logits_to_keep").tolist() == list(range(width - k, width))
    assert batch.keys() == {"input_ids", "attention_mask", "position_ids", "labels"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["labels"].shape == (len(rows), k)
    for index, row in enumerate(rows):
        tokens = row["input_ids"] if row else []
        gap, start = width - len(tokens), width - (row["num_targets"] if row else 0)
        labels = [tokens[column - gap] if column >= start else -100 for column in range(width)]
        assert batch["input_ids"][index].tolist() == [PAD] * gap + tokens
        assert batch["attention_mask"][index].tolist() == [0] * gap + [1] * len(tokens)
        assert batch["labels"][index].tolist() == labels[width - k:]
        positions = batch["position_ids"][index].tolist()
        assert positions[gap:] == list(range(len(tokens)))
        assert all(0 <= position < max(width, 2) for position in positions)  # on padding too
