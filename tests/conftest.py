"""Tiny checkpoints, a tiny suite and in-process runs of `train.py`; nothing needs a network."""

import atexit
import contextlib
import functools
import gc
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

# Kept for the worker processes of pytest-xdist, which inherit the change below.
USER_CACHE = Path(os.environ.setdefault("BADIT_TESTS_USER_CACHE", str(
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "badit")))
ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(tempfile.mkdtemp(prefix="badit-tests-"))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
# Set before anything imports the libraries that read them.
os.environ |= {"XDG_CACHE_HOME": str(CACHE), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1",
               "ACCELERATE_USE_CPU": "true"}

import pytest  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from forked import Forks  # noqa: E402
from tokenizers import Tokenizer, pre_tokenizers  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from transformers.models.gemma2 import Gemma2Config  # noqa: E402
from transformers.models.llama import LlamaConfig  # noqa: E402
from transformers.models.qwen3 import Qwen3Config  # noqa: E402

import models  # noqa: E402
import train  # noqa: E402
from inputs import embedded  # noqa: E402
from inputs.errors import InputError  # noqa: E402
from registry import EMBEDDED, METHODS, method_class  # noqa: E402

os.fsync = lambda handle: None  # no test cuts the power, and each call waits 5 ms for the disk
# Tiny models gain nothing from threads, which wait for each other on a busy machine.
torch.set_num_threads(1)
STEPS = 90  # of pre-training for the tiny Llama: it knows the suite in part
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
COLOURS = ("red", "blue", "green", "white")
THINGS = ("cat", "dog", "sky", "sea", "tree", "rose", "snow", "sun", "moon", "leaf", "coal", "milk")
FRAME = "Now complete the following example - Input : Output answer is the and name say both first"
TASKS = {"colour_name": "accuracy", "which_is": None, "say_both": "rouge_l"}
SHAPE = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8,
             max_position_embeddings=256, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
             pad_token_id=None)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE | dict(num_hidden_layers=3)),
    "gemma2": lambda: Gemma2Config(**SHAPE, query_pre_attn_scalar=8, sliding_window=16),
}
ARCHITECTURES = tuple(CONFIGS)
CONFIGS["wide"] = lambda: LlamaConfig(**SHAPE | dict(hidden_size=64, intermediate_size=128,
                                                     head_dim=16))
BRIEF = ("--max_length", "64", "--max_new_tokens", "5")
# A bank of 16 components on layers of 32 x 64: a residual is left.
SMALL = ("--rank", "2", "--alpha", "16", *BRIEF)
QUIET = ("--dropout", "0", "--router_noise", "0")
NO_EVAL = ("--eval_tasks", "none")
TRAINED = [name for name, method in METHODS.items() if method.trains]


def make_tokenizer():
    """A word-level tokenizer with EOS and without a pad token."""
    words = [UNK, BOS, EOS, *FRAME.split(), *COLOURS, *THINGS, *",.?!"]
    words += [f"w{i}" for i in range(300 - len(words))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=UNK, bos_token=BOS,
                                   eos_token=EOS)


def save_checkpoint(folder, architecture, dtype=torch.float32, steps=0):
    """Write a model that asks for sampling, and its tokenizer, into `folder`.

    Random weights, or after some `steps` on the tiny suite, so that scores are not all zero.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=dtype)
    tokenizer = make_tokenizer()
    texts = [prompt_of(task, row) + row["output"][-1] + f" {EOS}"
             for task in TASKS for row in instances(task, range(12))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        ids = torch.tensor([tokenizer(texts[step * 7 % len(texts)]).input_ids])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9, eos_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompt_of(task, row):
    """The prompt of one instance of the tiny suite."""
    return (f"name the {task} .\n\nNow complete the following example -\n"
            f"Input: {row['input']}\nOutput: ")


def instances(task, numbers):
    """Instances in which a model can learn at least the first word of an answer."""
    rows = []
    for i in numbers:
        first, second = THINGS[i % 12], THINGS[(5 * i + 1) % 12]
        colour = COLOURS[i * i % 4]
        rows.append({
            "colour_name": {"input": f"{first} , {second} ?", "output": [colour]},
            "which_is": {"input": f"{first} {second}",
                         "output": [f"the {first} is {second}", f"the answer is {colour}"]},
            "say_both": {"input": f"w{i} {first} and {second} " + "w9 " * (i % 5),
                         "output": [f"both {first} {second}"]},
        }[task] | {"id": f"{task}-{i}"})
    return rows


def write_suite(folder):
    """Three tasks in the natural-instructions layout."""
    for task, metric in TASKS.items():
        for split, numbers in (("train", range(12)), ("test", range(20, 25))):
            content = {"Definition": [f"name the {task} ."], "Instances": instances(task, numbers)}
            write_json(folder / task / f"{split}.json", content | ({"Metric": metric} if metric
                                                                   else {}))
    return folder


def write_json(path, content):
    """Write `content` as JSON, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of tiny float32 checkpoints, by architecture."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {name: save_checkpoint(root / name, name, steps=STEPS if name == "llama" else 0)
               for name in ARCHITECTURES}
    gc.freeze()  # every run collects garbage: half of its time, were it to search the libraries
    return folders


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """The checkpoint of a random Llama whose linear layers all have whole blocks of 64 inputs."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "wide", "wide")


@pytest.fixture(scope="session")
def llama(checkpoints):
    """The checkpoint of most tests."""
    return checkpoints["llama"]


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    """The folder of the tiny suite."""
    return write_suite(tmp_path_factory.mktemp("suites") / "tiny")


@pytest.fixture(scope="session")
def tiny(llama, suite):
    """The flags that name the tiny model and suite."""
    return ("--model", llama, "--suite", suite)


@pytest.fixture(scope="session")
def trained_run(tiny, tmp_path_factory):
    """Call train.main with `tiny`, SMALL and more, once for equal flags -> the output folder.

    What it printed is in the file `printed` beside the folder.
    """
    @functools.cache
    def call(*flags, again=False):
        folder = tmp_path_factory.mktemp("trained") / "out"
        outcome = succeed(*tiny, *SMALL, *flags, "--output_dir", folder)
        folder.with_name("printed").write_text("\n".join(outcome.out))
        return folder
    return call


@pytest.fixture(scope="session")
def smollm2():
    """The name of the embedded model, converted already or now."""
    folder = f"{EMBEDDED}-{embedded.SHA256[:12]}"
    if (USER_CACHE / folder).is_dir() and not (CACHE / "badit" / folder).exists():
        (CACHE / "badit").mkdir(exist_ok=True)
        (CACHE / "badit" / folder).symlink_to(USER_CACHE / folder)
    embedded.embedded_folder(EMBEDDED)
    return EMBEDDED


@pytest.fixture(scope="session")
def six_blocks(smollm2, tmp_path_factory):
    """A checkpoint of the first and last three blocks of the embedded model: real weights, fast."""
    folder = tmp_path_factory.mktemp("blocks") / "six"
    model, tokenizer = models.load(smollm2)
    del model.model.layers[3:27]
    model.config.num_hidden_layers = 6
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def forks():
    """Runs of train.main in separate processes, which can be killed."""
    server = Forks()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate's process-wide state does not outlive a test."""
    yield
    reset_accelerate()


def reset_accelerate():
    """Forget Accelerate's precision, processes and loaders."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def settings_of(method="badit", **changed):
    """A method's default settings with a small bank."""
    cls = METHODS[method].settings
    small = {name: value for name, value in dict(rank=2, alpha=16.0).items()
             if name in cls.names()}
    return cls(**small | changed)


def wrapped(model, method="badit", **changed):
    """`model` with a fresh adapter, in evaluation mode."""
    torch.manual_seed(0)
    method_class(method)(settings_of(method, **changed)).wrap(model)
    return model.eval()


class Outcome(NamedTuple):
    """What a call of train.main did: exit status, and the lines that it printed."""

    status: int
    out: list
    err: list


def run(*argv, main=train.main):
    """Call train.main, or another `main`, in this process and capture all that it prints, logs too.
    """
    out, err = io.StringIO(), io.StringIO()
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    moved = [(handler, handler.setStream(err)) for logger in loggers
             for handler in getattr(logger, "handlers", [])
             if type(handler) is logging.StreamHandler]
    with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          warnings.catch_warnings(record=True) as caught):
        try:
            status = main([str(part) for part in argv])
        finally:
            reset_accelerate()
            for handler, stream in moved:
                handler.setStream(stream)
    for warning in caught:
        err.write(f"\n{warning.category.__name__}: {warning.message}")
    return Outcome(status, out.getvalue().splitlines(), err.getvalue().splitlines())


def succeed(*argv, **more):
    """Call train.main, or another `main`, which must return 0."""
    outcome = run(*argv, **more)
    assert outcome.status == 0, outcome.err
    return outcome


class Killed(BaseException):
    """Raised in place of a kill of this process."""


@contextlib.contextmanager
def failing(owner, name, count, error=Killed):
    """A context in which the `count`-th call of owner.name raises `error`."""
    real, calls = getattr(owner, name), itertools.count(1)

    def counted(*args, **more):
        if next(calls) == count:
            raise error
        return real(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield


def complaint(call, *args, **options):
    """The message of the InputError that the call raises, which is one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message.strip() and "\n" not in message
    return message


def refused(named, *argv, **more):
    """Call train.main, or another `main`, which must say `named` in one line and return 2."""
    outcome = run(*argv, **more)
    assert outcome.status == 2, outcome.err
    (line,) = (line for line in outcome.err if line.startswith("error: "))
    assert named in line and not any("Traceback" in line for line in outcome.err)
    return line


def imported_by(program, *argv, **variables):
    """Run a program of this project in a process of its own -> it, and the modules it imported."""
    done = subprocess.run([sys.executable, ROOT / program, *map(str, argv)], text=True,
                          env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"} | variables,
                          capture_output=True)
    return done, modules_in(done.stderr)


def modules_in(text):
    """The modules that PYTHONPROFILEIMPORTTIME=1 names in a program's stderr."""
    return {line.rpartition("|")[2].strip() for line in text.splitlines() if "import time:" in line}


# --- what a run leaves --------------------------------------------------------------------------


def lines_of(path):
    """The records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results_of(folder):
    """results.json of a run."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def losses_of(folder):
    """The loss of every step."""
    return [line["loss"] for line in lines_of(folder / "log.jsonl")]


def adapter_of(folder):
    """The tensors of a run's adapter, by name."""
    return safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")


def groupings_of(folder):
    """The final groupings, by layer."""
    return {name: tensor.tolist() for name, tensor in adapter_of(folder).items()
            if name.endswith("expert_of")}


def files_of(folder):
    """Content by relative path of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_equal_runs(one, other):
    """Assert equal files; results.json may differ under its key `run`."""
    mine, theirs = files_of(one), files_of(other)
    assert mine.keys() == theirs.keys()
    for files in (mine, theirs):
        files["results.json"] = json.loads(files["results.json"]) | {"run": None}
    for name in mine:
        assert mine[name] == theirs[name], name


def assert_close_runs(one, other, losses=1e-5, weights=None):
    """Assert equal groupings, and close losses, angles and, with a tolerance, weights."""
    assert losses_of(one) == pytest.approx(losses_of(other), abs=losses)
    assert groupings_of(one) == groupings_of(other)
    events = [lines_of(folder / "regroup.jsonl") for folder in (one, other)]
    for mine, theirs in zip(*events, strict=True):
        for key in ("intra_before", "intra_after", "inter_before", "inter_after", "moved"):
            assert mine[key] == pytest.approx(theirs[key], abs=0.05)
    if weights is not None:
        mine, theirs = adapter_of(one), adapter_of(other)
        assert mine.keys() == theirs.keys()
        assert all((mine[name] - theirs[name]).abs().max() <= weights for name in mine)


def snapshot(folder):
    """Everything below `folder`: content and time of change by relative path."""
    return {str(path.relative_to(folder)): (
                hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
                path.lstat().st_mtime_ns if path.is_file() else 0)
            for path in sorted(folder.rglob("*"))}
