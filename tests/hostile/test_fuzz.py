"""Drawn hostile input: a run ends well, or with status 2 and one clear line; no file is lost.

The examples are drawn by hypothesis, the same ones in every run.
"""

import contextlib
import copy
import json
import os
import pickle
import resource
import shutil
import signal
import tempfile
from itertools import chain
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import safetensors.torch
import torch
from conftest import (
    SMALL,
    TASKS,
    instances,
    run,
    snapshot,
    succeed,
    write_json,
    write_suite,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import models
from harness.arguments import ALL_FLAGS
from hostile.conftest import the_line
from registry import METHODS

SECONDS, GIBIBYTES = 15, 4  # that one case may take, beyond what the tests take anyway
SHORT = ("--max_length", 64, "--max_new_tokens", 2)
ONE = ("--tasks", "colour_name", "--max_eval_per_task", 1, *SHORT)  # a quick evaluation


def cases(count, **strategies):
    """Run a test on `count` examples, the same ones every time."""
    fixed = settings(max_examples=count, derandomize=True, deadline=None, database=None,
                     suppress_health_check=list(HealthCheck), phases=set(Phase) - {Phase.explain})
    return lambda test: fixed(given(**strategies)(test))


# --- what is hostile ----------------------------------------------------------------------------

TEXTS = ("", " ", "x", "0", "-1", "1.5", "nan", "inf", "1e999", "9" * 5000, "true", "None", "[]",
         "\0", "a\0b", "a\nb", "a\rb", "\x1b[31m", "\x85", "\u2028", "\udc80", "é", "٣", "🙂",
         "..", "../..", "../tiny/colour_name", "/", "/etc", "/etc/passwd", "~", "file", "file/x",
         "w" * 300, "w" * 5000, "%s%n", "{0}", "$(id)", "--", "-", "=", "colour_name", "T363")
NUMBERS = (None, True, False, 0, -1, 1, 3, 2.5, -0.5, 2**31, 2**63, 10**30, -10**18, 1e308,
           float("nan"), float("inf"), float("-inf"))
DEEP = "nested here"  # stands for lists in lists, which json.dumps could not write
CONTAINERS = ([], [[]], [None], [1, "x"], {}, {"": {}}, {"x": 1}, [[1.5] * 3] * 3, DEEP)
TEXT = st.one_of(st.sampled_from(TEXTS), st.text(max_size=12))
VALUES = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(), st.floats(),
                   st.sampled_from(CONTAINERS).map(copy.deepcopy), st.text(max_size=8))
# What a file system takes as the name of one file, also where it is no UTF-8.
NAMES = st.lists(st.one_of(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"),
    st.characters(max_codepoint=127, exclude_characters="/\0"),
    st.characters(min_codepoint=0xdc80, max_codepoint=0xdcff, categories=["Cs"])),
    min_size=1, max_size=12).map("".join).filter(lambda name: name not in (".", ".."))


@st.composite
def changed(draw, document):
    """A JSON document with one to three changed places."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        document = change_a_place(draw, document)
    return document


def change_a_place(draw, value):
    """Return `value` with itself, or a place in it, replaced, lost, doubled or renamed."""
    inner = list(value) if isinstance(value, dict) else range(
        len(value) if isinstance(value, list) else 0)
    if not inner or draw(st.integers(0, 7)) == 0:
        return draw(VALUES)
    key = draw(st.sampled_from(inner))
    how = draw(st.sampled_from(("deeper", "deeper", "deeper", "lost", "doubled", "renamed")))
    if how == "deeper":
        value[key] = change_a_place(draw, value[key])
    elif how == "lost":
        del value[key]
    elif isinstance(value, list):
        value.append(copy.deepcopy(value[key]))
    else:
        value[draw(TEXT)] = value.pop(key) if how == "renamed" else copy.deepcopy(value[key])
    return value


@st.composite
def json_bytes(draw, document):
    """A JSON file of a changed document."""
    text = json.dumps(draw(changed(document)))
    depth = draw(st.integers(1, 1000)) if DEEP in text else 0
    return text.replace(json.dumps(DEEP), "[" * depth + "]" * depth).encode()


@st.composite
def damaged(draw, content):
    """Bytes that were cut, flipped, filled up or replaced."""
    where = draw(st.integers(0, max(0, len(content) - 1)))
    flipped = bytearray(content)
    flipped[where:where + 1] = bytes(byte ^ 1 << draw(st.integers(0, 7))
                                     for byte in flipped[where:where + 1])
    return draw(st.sampled_from((
        content[:where], bytes(flipped), content[:where] + draw(st.binary()) + content[where:],
        content + draw(st.binary()), draw(st.binary()), b"", b"\xef\xbb\xbf" + content,
        b"[" * 100_000, b"\0" * 1000, pickle.dumps({"x": torch.ones(2)}), content * 2)))


def one_key(document, inside=None):
    """A JSON file of an object with any value at one key, or at one key of its object `inside`."""
    def write(item):
        other = (document if inside is None else document[inside]) | dict([item])
        return json.dumps(other if inside is None else document | {inside: other}).encode()

    keys = sorted(document if inside is None else document[inside])
    return st.tuples(st.sampled_from(keys), VALUES).map(write)


def either(*strategies):
    """One of the strategies, each as often; st.one_of would weigh them by their parts."""
    return st.sampled_from(strategies).flatmap(lambda strategy: strategy)


def hostile(document):
    """Bytes in place of a JSON file: mostly JSON of another shape."""
    whole = json.dumps(document).encode()
    return st.one_of(json_bytes(document), json_bytes(document), one_key(document), damaged(whole))


# --- what must come of it -----------------------------------------------------------------------


class Loaded(BaseException):
    """Raised where weights would be loaded: the checks before it passed."""


class Hang(BaseException):
    """A case takes too long."""


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    """A case that asks for too much memory fails alone."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + GIBIBYTES * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def until_weights(monkeypatch):
    """A run ends where it would load weights, or make those of the embedded model."""
    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "embedded_folder", load)


@contextlib.contextmanager
def fresh_folder():
    """A folder in the current one, entered, with a file of somebody else's in it."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name, contextlib.chdir(name):
        Path("file").write_text("mine")
        yield Path(name)


@contextlib.contextmanager
def time_limit():
    """Raise Hang after SECONDS."""
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again, should one be swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(*argv, watched=()):
    """Call train.main and return its status, or None where weights would be loaded.

    A failure must be one clear line, and leave the current folder and the `watched` ones as they
    were; except that NaN logits are found after "out" was begun.
    """
    watched = (Path.cwd(), *watched)
    before = [contents(folder) for folder in watched]
    outcome = outcome_of(argv)
    status = outcome and outcome.status
    line = the_line(outcome.err) if status == 2 else ""
    if status != 0:
        if "NaN or infinite" in line:
            shutil.rmtree("out")
        assert [contents(folder) for folder in watched] == before, "the disk was changed"
    if outcome:
        "".join(outcome.out).encode()  # as a terminal's stream does, which takes no surrogates
        assert status in (0, 2)
    return status


def contents(folder):
    """Return {path: checksum} of everything below `folder`."""
    return {name: content for name, (content, _) in snapshot(folder).items()}


def outcome_of(argv):
    """Return the outcome of train.main; None where it would load weights or prints help."""
    with time_limit():
        try:
            return run(*argv)
        except Loaded:
            return None
        except SystemExit as end:
            assert end.code == 0 and any(str(word).startswith(("-h", "--h")) for word in argv)
            return None


def check_results(folder):
    """Check that a run that ended well left whole results."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    predictions = list((folder / "predictions").iterdir())
    assert results["metrics"] and predictions
    for path in predictions:
        assert path.suffix == ".jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")
        assert lines.pop() == "" and all(json.loads(line)["id"] for line in lines)


# --- arguments ----------------------------------------------------------------------------------

WORDS = st.one_of(TEXT, st.integers().map(str), st.floats().map(str), st.sampled_from(
    ("badit", "zero_shot", "lora", "../badit", "sequential", "superni", "gate_proj", "../x",
     "out")))
KNOWN = st.sampled_from(sorted(f"--{name}" for name in ALL_FLAGS))
PART = st.one_of(st.tuples(KNOWN, WORDS), st.tuples(KNOWN, WORDS), st.tuples(KNOWN, WORDS, WORDS),
                 st.tuples(st.builds("{}={}".format, KNOWN, WORDS)), st.tuples(KNOWN),
                 st.tuples(TEXT.map("--{}".format), WORDS), st.tuples(WORDS))
SENSIBLE = [
    *(f"--{flag.name}" for flag in ALL_FLAGS.values() if flag.type is bool),
    *(f"--{flag.name}={word}" for flag in ALL_FLAGS.values()
      if get_origin(flag.type) is Literal for word in get_args(flag.type)),
    *(f"--method={name}" for name in METHODS),
    *"""--epochs=1 --rank=1 --rank=64 --top_k=1 --top_k=8 --top_k=9 --num_experts=1 --num_experts=8
    --num_experts=33 --seed=0 --tasks=say_both --tasks=which_is --task_order=say_both
    --threshold=0.5 --orth_weight=0.1 --gradient_accumulation_steps=3
    --gradient_accumulation_steps=8 --adapter=file --adapter=. --suite=superni --suite=.
    --data_dir=. --output_dir=. --output_dir=out --output_dir=file/x --max_length=1 --max_length=8
    --max_length=255 --max_length=256 --target_modules=q_proj --target_modules=lm_head
    --target_modules=*
    --balance_types=say_both=1 --balance_types=x --balance_types== --balance_types=colour_name=99999
    --max_length=-- --epochs=-- --model=-- --seed=""".split()]


TOGETHER = st.lists(st.sampled_from(SENSIBLE), min_size=2, max_size=7)


@cases(130, words=either(
    st.lists(PART, min_size=1, max_size=3).map(lambda parts: [*SMALL, *chain(*parts)]),
    TOGETHER.map(lambda words: [*SHORT, *words])))
def test_any_words_as_arguments(until_weights, llama, suite, words):
    """Unknown flags, wrong types, NUL bytes, paths elsewhere, flags that exclude each other."""
    with fresh_folder():
        attempt("--model", llama, "--suite", suite, *words, watched=(llama, suite))


READ = ("--model", "--suite", "--suite superni --data_dir", "--tasks", "--method",
        "--setting sequential --task_order", "--target_modules", "--eval_only --adapter")
WRITTEN = ("--output_dir", "--overwrite --output_dir", "--resume --output_dir")


@pytest.mark.parametrize("flag", READ + WRITTEN)
@cases(28, name=st.sampled_from(TEXTS))
def test_any_name(until_weights, llama, suite, flag, name):
    """Of models, suites, tasks, methods, layers and files: one is that of a task.

    Or of an --output_dir that exists, cannot be or has no name.
    """
    others = {"--model": llama, "--suite": suite, "--max_length": 64}
    words = [word for key, value in others.items() for word in (key, value)
             if key not in flag]
    with fresh_folder():
        status = attempt(*words, *flag.split(), name, watched=(llama, suite))
    assert status == 2 or flag in WRITTEN or (flag, name) == ("--tasks", "colour_name")


@cases(15, names=st.tuples(NAMES, NAMES, NAMES))
def test_any_names_of_folders(llama, suite, names):
    """Any name that a file system allows for a model, a suite or an output folder."""
    model, tasks, out = names
    with fresh_folder() as folder:
        for parent in ("models", "suites", "runs"):
            os.mkdir(parent)
        shutil.copytree(llama, folder / "models" / model)
        shutil.copytree(suite, folder / "suites" / tasks)
        status = attempt("--method", "zero_shot", "--model", folder / "models" / model, "--suite",
                         folder / "suites" / tasks, *ONE, "--output_dir", folder / "runs" / out)
        if status == 0:
            check_results(folder / "runs" / out)


# --- tasks --------------------------------------------------------------------------------------


@cases(70, data=st.data())
def test_any_task_file(until_weights, llama, data):
    """Keys, types, ids, depth and bytes of one file of a task; its head also in the other."""
    with fresh_folder() as folder:
        task = write_suite(folder / "suite") / data.draw(st.sampled_from(sorted(TASKS)))
        split, other = data.draw(st.permutations(("train", "test")))
        content = data.draw(hostile(json.loads((task / f"{split}.json").read_text())))
        (task / f"{split}.json").write_bytes(content)
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            head = json.loads(content).items()
            rows = json.loads((task / f"{other}.json").read_text())["Instances"]
            (task / f"{other}.json").write_text(json.dumps(dict(head) | {"Instances": rows}))
        attempt("--model", llama, "--suite", "suite", *SMALL)


CHARACTERS = st.lists(st.one_of(
    st.characters(exclude_categories=["Cs"]), st.characters(max_codepoint=32),
    st.sampled_from(("\x85", "\u2028", "\ufeff", "red", "both cat", " ", "{", "</s>"))),
    max_size=12).map("".join)


@cases(12, texts=st.lists(CHARACTERS, min_size=6, max_size=6))
def test_any_text_in_a_task(llama, texts):
    """Control characters, other scripts and empty texts are trained on and scored."""
    with fresh_folder() as folder:
        for split in ("train", "test"):
            rows = instances("say_both", range(4))
            rows[0] |= {"id": texts[0] or "x", "input": texts[1], "output": [texts[2], texts[3]]}
            rows[1] |= {"input": texts[4]}
            write_json(folder / "suite" / "odd" / f"{split}.json",
                       {"Definition": texts[5], "Instances": rows})
        if attempt("--model", llama, "--suite", "suite", *SMALL, "--epochs", 1, "--output_dir",
                   "out") == 0:
            check_results(folder / "out")


FOLDERS = st.one_of(NAMES, st.sampled_from(("a", ".a", "_a", "-a", "a.b", "..a", "A")))


@cases(25, names=st.lists(FOLDERS, min_size=1, max_size=3, unique=True), chosen=WORDS)
def test_any_name_of_a_task(until_weights, llama, suite, names, chosen):
    """Names of task folders, and what is asked for by --tasks."""
    with fresh_folder() as folder:
        for name in names:
            shutil.copytree(suite / "colour_name", folder / "suite" / name)
        attempt("--model", llama, "--suite", "suite", *SMALL, "--tasks", chosen)
        attempt("--model", llama, "--suite", "suite", *SMALL)


# --- adapters -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(llama, suite, tmp_path_factory):
    """Adapter folders by method; GainLoRA's has two branches."""
    root = tmp_path_factory.mktemp("adapters")
    for method in ("badit", "gainlora"):
        succeed("--model", llama, "--suite", suite, "--method", method, *SMALL, "--epochs", 1,
                "--setting", "sequential", "--tasks", "colour_name", "say_both",
                "--max_train_per_task", 4, "--eval_tasks", "none", "--output_dir", root / method)
    return {method: root / method / "adapter" for method in ("badit", "gainlora")}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@cases(40, method=st.sampled_from(("badit", "gainlora")), data=st.data())
def test_any_adapter(llama, suite, adapters, name, method, data):
    """Evaluate a copy of an adapter with other bytes in one of its files."""
    with fresh_folder() as folder:
        shutil.copytree(adapters[method], folder / "adapter")
        content = (folder / "adapter" / name).read_bytes()
        if name == "adapter_config.json":
            other = either(one_key(json.loads(content), "settings"), hostile(json.loads(content)))
        else:
            other = either(damaged(content), other_tensors(safetensors.torch.load(content)))
        (folder / "adapter" / name).write_bytes(data.draw(other))
        if attempt("--eval_only", "--adapter", "adapter", "--model", llama, "--suite", suite, *ONE,
                   "--output_dir", "out", watched=(llama, suite)) == 0:
            check_results(folder / "out")


KINDS = (torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64,
         torch.float8_e4m3fn, torch.uint64)


@st.composite
def other_tensors(draw, tensors):
    """A safetensors file in which one or two tensors are changed."""
    tensors = dict(tensors)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=2,
                              unique=True)):
        tensor = tensors[name]
        kind = draw(st.sampled_from(("lost", "unknown", "shape", "type", "type", "value")))
        if kind == "lost":
            del tensors[name]
        elif kind == "unknown":
            other = draw(st.sampled_from((f"{name}.0", "x", "", "adapter.x", "method.x",
                                          "optimizer.x", "optimizer.x/step", "é\n")))
            tensors[other] = tensor.clone()
        elif kind == "shape":
            tensors[name] = draw(st.sampled_from((
                tensor.flatten(), tensor[None], tensor.flatten()[:1], tensor.flatten()[:0],
                torch.ones(()), torch.atleast_2d(tensor).mT.contiguous()))).clone()
        elif kind == "type":
            tensors[name] = tensor.to(draw(st.sampled_from(KINDS)))
        elif tensor.numel():
            tensors[name] = tensor.clone()
            tensors[name].view(-1)[-1] = draw(st.sampled_from(
                (float("nan"), float("inf"), 3e38, -3e38, 0, 1) if tensor.is_floating_point()
                else (-1, 0, 2**62, -2**62)))
    return safetensors.torch.save(tensors, {"format": "pt"})


# --- models -------------------------------------------------------------------------------------


def evaluate_model(llama, suite, change, *flags):
    """Evaluate a copy of the tiny model that `change(folder)` has spoilt."""
    with fresh_folder() as folder:
        shutil.copytree(llama, folder / "model")
        change(folder / "model")
        if attempt("--method", "zero_shot", "--model", "model", "--suite", suite, *ONE,
                   "--output_dir", "out", *flags, watched=(llama, suite)) == 0:
            check_results(folder / "out")


@cases(50, name=st.sampled_from(("config.json", "config.json", "generation_config.json",
                             "tokenizer.json", "tokenizer_config.json", "model.safetensors")),
       data=st.data())
def test_any_damage_to_a_model(llama, suite, name, data):
    """Its shape, its tokenizer, what it generates with, and its weights."""
    def change(folder):
        content = (folder / name).read_bytes()
        if name == "model.safetensors":
            tensors = safetensors.torch.load_file(folder / name)
            other = data.draw(either(damaged(content), other_tensors(tensors)))
        else:
            document = json.loads(content)
            other = data.draw(either(one_key(document), hostile(document)))
        (folder / name).write_bytes(other)

    evaluate_model(llama, suite, change)


def with_keys(name, **changed):
    """A change of keys in a JSON file of a folder."""
    def change(folder):
        write_json(folder / name, json.loads((folder / name).read_text()) | changed)

    return change


@cases(20, template=st.one_of(VALUES, st.sampled_from((
    "{{ messages[0].content }}", "{% for", "{{ nothing.at.all }}", "{{ 1 / 0 }}", "{{ messages }}",
    "{{ raise_exception('a\\nb') }}", "{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}",
    "{{ messages[9].content }}", "{{ 'x' * 9999 }}", "{{ range(10) | list | tojson(indent=0) }}",
    "{{ x() }}", "{{ '\\x00' }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"))))
def test_any_chat_template(llama, suite, template):
    """A template is a small program: whatever it raises ends in one line."""
    evaluate_model(llama, suite, with_keys("tokenizer_config.json", chat_template=template),
                   "--chat_template")


@cases(10, tokens=st.fixed_dictionaries({}, optional={
    f"{name}_token": st.one_of(st.none(), st.sampled_from(("red", "<new>", "", " ", "<s>")))
    for name in ("eos", "pad", "bos", "unk")}))
def test_any_special_tokens(llama, suite, tokens):
    """A tokenizer without EOS or pad, or with one that the model does not know."""
    evaluate_model(llama, suite, with_keys("tokenizer_config.json", **tokens))
