"""Flags that are wrong, alone or together: status 2 and one line, before weights are loaded."""

import contextlib
import importlib.util
import io
import os
import re
import shutil

import pytest
from conftest import SMALL, instances, prompt_of, succeed
from transformers import AutoTokenizer

import train
from harness import launch
from hostile.conftest import rejected

WHOLE = ("epochs", "batch_size", "gradient_accumulation_steps", "max_train_per_task",
         "max_eval_per_task", "validation", "max_length", "max_new_tokens",
         "eval_batch_size", "rank", "num_experts", "top_k", "regroup_every")
BAD_NUMBERS = {
    **{name: ("0", "-1", "1.5", "nan", "inf", "many", "") for name in WHOLE},
    "seed": ("-1", "0.5", "nan", "inf", "one", str(2**32), "9" * 20),
    **{name: ("0", "-0.1", "nan", "inf", "-inf", "1e999", "high")
       for name in ("learning_rate", "alpha", "max_grad_norm")},
    "router_noise": ("-0.1", "nan", "inf", "much"),
    "dropout": ("1", "1.5", "-0.1", "nan", "inf", "half"),
    "warmup_ratio": ("1", "2", "-0.1", "nan", "inf", "short"),
}
ENDLESS = ("9" * 400, "1e400", "1_0000000000")  # neither an overflow nor an allocation


@pytest.fixture
def start(no_weights, llama, suite):
    """Flags of a valid run."""
    return ("--model", llama, "--suite", suite, *SMALL)


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_NUMBERS.items()
                                         for value in values]
                         + [("batch_size", value) for value in ENDLESS])
def test_bad_numbers(no_weights, name, value):
    """Zero, negative or non-finite where that makes no sense; the flag and the value are named."""
    rejected(f"--{name}={value}", named=(f"--{name}", repr(value), "--help"))


@pytest.mark.parametrize("flags, named", [
    ("--epoch 3", "--epoch"),  # no abbreviations
    ("--epochs", "--epochs"),
    ("--setting both", "'both'"),
    ("--routing random", "'random'"),
    ("--grouping kmeans", "'kmeans'"),
    ("--inactive freeze", "'freeze'"),
    ("--svd slow", "'slow'"),
    ("--eval_tasks some", "'some'"),
    ("--report_to paper", "'paper'"),
    ("--tasks", "--tasks"),
    ("--target_modules", "--target_modules"),
    ("--no_dog yes", "yes"),
    ("extra", "extra"),
])
def test_argparse_errors_are_one_line(no_weights, flags, named):
    """No usage text; the line points to --help."""
    assert "--help" in rejected(*flags.split(), named=named)


# The last word is what is named.
@pytest.mark.parametrize("flags", [
    "--method zero_shot --rank 4 : --rank",
    "--method zero_shot --epochs 3 : --epochs",
    "--method zero_shot --setting sequential : --setting",
    "--method zero_shot --learning_rate 1e-3 : --learning_rate",
    "--method zero_shot --eval_before : --eval_before",
    "--method zero_shot --adapter somewhere : no adapter at somewhere",
    "--adapter somewhere : no adapter at somewhere",
    "--eval_only : --adapter",
    "--task_order T1 : --task_order",
    "--setting single --task_order T1 : --task_order",
    "--routing static --top_k 2 : --top_k",
    "--routing static --router_noise 0.1 : --router_noise",
    "--routing static --inactive drop : --inactive",
    "--top_k 8 --router_noise 0.1 : --router_noise",
    "--top_k 8 --inactive drop : --inactive",
    "--no_bad --routing token : --routing",
    "--no_bad --router_noise 0.1 : --router_noise",
    "--no_bad --inactive keep : --inactive",
    "--no_bad --svd fast : --svd",
    "--no_dog --grouping random : --grouping",
    "--data_dir somewhere : --data_dir",
    "--suite . --data_dir somewhere : --data_dir",
])
def test_flags_that_would_be_ignored_are_refused(no_weights, llama, flags):
    """A flag that the method or the setting does not read, also with its default as value."""
    flags, named = flags.split(" : ")
    rejected("--model", llama, *flags.split(), named=named)


@pytest.mark.parametrize("flags", [
    "--rank 4", "--epochs 10", "--target_modules gate_proj", "--no_dog", "--setting mixed",
    "--top_k 4", "--gradient_checkpointing", "--eval_tasks all", "--method zero_shot"])
def test_evaluation_reads_no_training_flags(no_weights, finished, flags):
    """With --eval_only the adapter's own method and settings count."""
    named = ("zero_shot", "badit") if "zero_shot" in flags else flags.split()[0]
    rejected("--eval_only", "--adapter", finished / "adapter", *flags.split(), named=named)


@pytest.mark.parametrize("flags, named", [
    (["--method", "lora2"], "lora2 badit"),
    (["--method", "../badit"], "../badit badit"),
    (["--model", "gpt-5"], "gpt-5 smollm2-135m qwen3-8b"),
    (["--model", "no/such/folder"], "no/such/folder smollm2-135m"),
    (["--model", ""], "model"),
    (["--suite", "maxi"], "maxi mini superni"),
    (["--suite", "superni"], "download"),
    (["--suite", "superni", "--data_dir", "nowhere"], "nowhere"),
    (["--tasks", "colour"], "colour colour_name"),
    (["--setting", "sequential", "--task_order", "colour_name"], "which_is"),
    (["--setting", "sequential", "--tasks", "colour_name", "--task_order", "which_is"],
     "which_is"),
    (["--rank", "4", "--num_experts", "9"], "9 36 32"),
    (["--rank", "33", "--num_experts", "1", "--top_k", "1"], "33 32"),
    (["--top_k", "9"], "9 8"),
    (["--num_experts", "2"], "4 2"),  # top_k stays at 4
    (["--target_modules", "gate"], "gate gate_proj up_proj down_proj q_proj k_proj v_proj o_proj"),
    (["--target_modules", "lm_head"], "lm_head output gate_proj"),
    (["--target_modules", "gate_proj", "mlp.up_proj"], "mlp.up_proj up_proj"),
    (["--target_modules", "norm"], "norm gate_proj"),
    (["--max_length", "252"], "252 256"),  # with 5 new tokens more than 256 positions
    (["--gradient_accumulation_steps", "3"], "3 8 --batch_size"),
    (["--chat_template"], "--chat_template"),
])
def test_unknown_names_and_impossible_sizes(start, flags, named):
    """What is wrong is named, with what is allowed; of flags given twice the last counts."""
    rejected(*start, *flags, named=named.split())


def test_the_smallest_max_length_is_named(llama, suite):
    """A task left with no training instance: the number given lets one in, one less does not."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    enough = min(len(tokenizer(prompt_of("say_both", row | {"input": ""})).input_ids)
                 + len(tokenizer(row["output"][0]).input_ids) + 1
                 for row in instances("say_both", range(12)))
    argv = ("--model", llama, "--suite", suite, *SMALL, "--tasks", "say_both", "--max_length")
    for length in (1, enough - 1):
        line = rejected(*argv, length, named=("say_both", "--max_length"))
        assert str(enough) in re.findall(r"\d+", line)
    succeed(*argv, enough, "--epochs", 1, "--eval_tasks", "none")


# --- the output folder --------------------------------------------------------------------------


def test_an_output_folder_in_use(finished, start, tmp_path):
    """Refused without --overwrite, for any file in it; an empty folder is free."""
    rejected(*start, "--output_dir", finished, named=(str(finished), "--overwrite"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / ".hidden").write_text("mine")
    rejected(*start, "--output_dir", "used", named="used")


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("folder", ["file", "file/below", "file/deep/below"])
def test_an_output_folder_that_cannot_be(start, tmp_path, folder, flags):
    """A file is in the way."""
    (tmp_path / "file").write_text("mine")
    rejected(*start, "--output_dir", folder, *flags, named="file")


@pytest.mark.parametrize("flags", [["--tasks", "no_such_task"], ["--target_modules", "gate"],
                                   ["--suite", "nowhere"], ["--max_length", "1"]])
def test_overwrite_with_bad_input_loses_nothing(finished, start, tmp_path, flags):
    """What is on disk stays until a run can start."""
    shutil.copytree(finished, tmp_path / "out")
    rejected(*start, "--output_dir", "out", "--overwrite", *flags, named=flags[1])


# --- the launcher and the environment -----------------------------------------------------------


def test_a_tracker_that_is_not_installed(start, monkeypatch):
    """Named with what to install, before data or weights are read."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "wandb" else found(name, *rest))
    rejected(*start, "--report_to", "wandb", named=("wandb", "pip install"))


@pytest.mark.parametrize("variables, named", [
    ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 bf16"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--gradient_accumulation_steps"),
    *(({variable: "true"}, f"{name}|--use_fsdp|Eq. 8")
      for variable, name in launch.SHARDED.items()),
    *((variables, "Accelerate does not start|") for variables in (
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "abc"}, {"ACCELERATE_USE_CPU": "maybe"},
        {"ACCELERATE_DYNAMO_BACKEND": "abacus"}, {"WORLD_SIZE": "2"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "some"})),
], ids=str)
def test_what_the_launcher_cannot_ask_for(start, variables, named):
    """Another precision, accumulation or sharding, whatever is installed; and invalid values."""
    before = dict(os.environ)  # to which Accelerate adds
    os.environ.update(variables)
    try:
        rejected(*start, named=named.split("|") if "|" in named else named.split())
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.parametrize("variable", launch.SHARDED)
def test_sharding_that_is_not_asked_for(monkeypatch, variable):
    monkeypatch.setenv(variable, "false")
    launch.refuse_sharding()


def test_names_that_a_terminal_cannot_show(llama, suite, tmp_path):
    """They are escaped in ASCII, and the run succeeds."""
    shutil.copytree(suite, tmp_path / "suit\u00e9")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert train.main(["--model", str(llama), "--suite", "suit\u00e9", "--method", "zero_shot",
                           "--max_length", "64", "--output_dir", "o\u00fct\x1b[31m"]) == 0
    out.flush()
    shown = out.buffer.getvalue()
    assert b"suit\\xe9" in shown and b"results in o\\xfct\\x1b[31m" in shown
