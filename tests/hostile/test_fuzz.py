"""Drawn hostile files of strangers: a run ends well, or with status 2 and one clear line.

Task files, model folders and adapters. hypothesis draws the same examples in every run.
"""

import contextlib
import copy
import json
import pickle
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import SMALL, TASKS, instances, run, snapshot, write_json, write_suite
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import models
from hostile.conftest import the_line

SECONDS, GIBIBYTES = 15, 4  # limits of one case, beyond what the tests use anyway
# A quick evaluation.
ONE = ("--tasks", "colour_name", "--max_eval_per_task", 1, "--max_length", 64, "--max_new_tokens",
       2, "--output_dir", "out")


def cases(count, **strategies):
    """Run a test on `count` examples, the same ones every time."""
    fixed = settings(max_examples=count, derandomize=True, deadline=None, database=None,
                     suppress_health_check=list(HealthCheck),
                     phases=set(Phase) - {Phase.explain, Phase.shrink})
    return lambda test: fixed(given(**strategies)(test))


# --- what is hostile ----------------------------------------------------------------------------

TEXTS = ("", " ", "x", "-1", "1.5", "nan", "1e999", "9" * 5000, "true", "None", "[]", "\0", "a\nb",
         "\x1b[31m", "\u2028", "\udc80", "é", "٣", "🙂", "..", "/etc/passwd", "w" * 300, "%s%n",
         "{0}", "$(id)", "--", "colour_name", "T363")
NUMBERS = (None, True, False, 0, -1, 1, 3, 2.5, -0.5, 2**31, 2**63, 10**30, -10**18, 1e308,
           float("nan"), float("inf"), float("-inf"))
CONTAINERS = ([], [[]], [None], [1, "x"], {}, {"": {}}, {"x": 1}, [[1.5] * 3] * 3)
VALUES = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.integers(), st.floats(),
                   st.sampled_from(CONTAINERS).map(copy.deepcopy), st.text(max_size=8))


@st.composite
def changed(draw, document):
    """A JSON file of a document with one to three changed places."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        document = change_a_place(draw, document)
    return json.dumps(document).encode()


def change_a_place(draw, value):
    """Return `value` with itself, or a place in it, replaced, removed, doubled or renamed."""
    inner = list(value) if isinstance(value, dict) else range(
        len(value) if isinstance(value, list) else 0)
    if not inner or draw(st.integers(0, 7)) == 0:
        return draw(VALUES)
    key = draw(st.sampled_from(inner))
    how = draw(st.sampled_from(("deeper", "deeper", "deeper", "removed", "doubled", "renamed")))
    if how == "deeper":
        value[key] = change_a_place(draw, value[key])
    elif how == "removed":
        del value[key]
    elif isinstance(value, list):
        value.append(copy.deepcopy(value[key]))
    else:
        other = draw(st.sampled_from(TEXTS))
        value[other] = value.pop(key) if how == "renamed" else copy.deepcopy(value[key])
    return value


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
    return either(changed(document), changed(document), one_key(document), damaged(whole))


KINDS = (torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64,
         torch.float8_e4m3fn, torch.uint64)


@st.composite
def other_tensors(draw, tensors):
    """A safetensors file in which one or two tensors are changed."""
    tensors = dict(tensors)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=2,
                              unique=True)):
        tensor = tensors[name]
        kind = draw(st.sampled_from(("removed", "unknown", "shape", "type", "type", "value")))
        if kind == "removed":
            del tensors[name]
        elif kind == "unknown":
            tensors[draw(st.sampled_from((f"{name}.0", "x", "", "adapter.x", "é\n")))] = (
                tensor.clone())
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


@contextlib.contextmanager
def fresh_folder():
    """Enter a new folder."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name, contextlib.chdir(name):
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


def attempt(*argv):
    """Call train.main. A failure is one clear line and leaves the current folder as it was.

    But NaN logits are found after "out" was begun.
    """
    before = snapshot(Path.cwd())
    with time_limit():
        outcome = run(*argv)
    assert outcome.status in (0, 2)
    if outcome.status == 2:
        if "NaN or infinite" in the_line(outcome.err):
            shutil.rmtree("out")
        assert snapshot(Path.cwd()) == before, "the disk was changed"
    elif Path("out").exists():
        check_results(Path("out"))


def check_results(folder):
    """Check that a run that ended well left whole results."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    predictions = list((folder / "predictions").iterdir())
    assert results["metrics"] and predictions
    for path in predictions:
        lines = path.read_text(encoding="utf-8").split("\n")
        assert lines.pop() == "" and all(json.loads(line)["id"] for line in lines)


# --- tasks --------------------------------------------------------------------------------------


@cases(25, data=st.data())
def test_any_task_file(monkeypatch, llama, data):
    """Keys, types, ids and bytes of one file of a task; its head also in the other."""
    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(models, "load", load)
    with fresh_folder() as folder, contextlib.suppress(Loaded):
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


@cases(3, texts=st.lists(CHARACTERS, min_size=6, max_size=6))
def test_any_text_in_a_task(llama, texts):
    """Control characters, other scripts and empty texts are trained on and scored."""
    with fresh_folder() as folder:
        for split in ("train", "test"):
            rows = instances("say_both", range(4))
            rows[0] |= {"id": texts[0] or "x", "input": texts[1], "output": [texts[2], texts[3]]}
            rows[1] |= {"input": texts[4]}
            write_json(folder / "suite" / "odd" / f"{split}.json",
                       {"Definition": texts[5], "Instances": rows})
        attempt("--model", llama, "--suite", "suite", *SMALL, "--epochs", 1, "--output_dir", "out")


# --- adapters -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(trained_run):
    """Adapter folders by method; GainLoRA's has two branches."""
    return {method: trained_run("--method", method, "--epochs", 1, "--setting", "sequential",
                                "--tasks", "colour_name", "say_both", "--max_train_per_task", 4,
                                "--eval_tasks", "none") / "adapter"
            for method in ("badit", "gainlora")}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@cases(10, method=st.sampled_from(("badit", "gainlora")), data=st.data())
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
        attempt("--eval_only", "--adapter", "adapter", "--model", llama, "--suite", suite, *ONE)


# --- models -------------------------------------------------------------------------------------


def evaluate_model(llama, suite, name, change, *flags):
    """Evaluate a copy of the tiny model whose file `name` holds change(its bytes)."""
    with fresh_folder() as folder:
        shutil.copytree(llama, folder / "model")
        (folder / "model" / name).write_bytes(change((folder / "model" / name).read_bytes()))
        attempt("--method", "zero_shot", "--model", "model", "--suite", suite, *ONE, *flags)


@cases(20, name=st.sampled_from(("config.json", "config.json", "generation_config.json",
                                 "tokenizer.json", "tokenizer_config.json", "model.safetensors")),
       data=st.data())
def test_any_damage_to_a_model(llama, suite, name, data):
    """Its shape, its tokenizer, its generation settings, and its weights."""
    def change(content):
        if name == "model.safetensors":
            tensors = safetensors.torch.load(content)
            return data.draw(either(damaged(content), other_tensors(tensors)))
        return data.draw(either(one_key(json.loads(content)), hostile(json.loads(content))))

    evaluate_model(llama, suite, name, change)


@cases(12, template=st.sampled_from((
    None, 5, [[]], "{{ messages[0].content }}", "{% for", "{{ nothing.at.all }}", "{{ 1 / 0 }}",
    "{{ raise_exception('a\\nb') }}", "{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}",
    "{{ 'x' * 9999 }}", "{{ '\\x00' }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}")))
def test_any_chat_template(llama, suite, template):
    """A template is a small program: any error in it ends in one line."""
    evaluate_model(llama, suite, "tokenizer_config.json", lambda content: json.dumps(
        json.loads(content) | {"chat_template": template}).encode(), "--chat_template")


@cases(4, tokens=st.fixed_dictionaries({}, optional={
    f"{name}_token": st.one_of(st.none(), st.sampled_from(("red", "<new>", "", " ", "<s>")))
    for name in ("eos", "pad", "bos", "unk")}))
def test_any_special_tokens(llama, suite, tokens):
    """A tokenizer without EOS or pad, or with one that the model does not know."""
    evaluate_model(llama, suite, "tokenizer_config.json", lambda content: json.dumps(
        json.loads(content) | tokens).encode())
