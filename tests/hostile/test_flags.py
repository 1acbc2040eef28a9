"""Flags that are wrong, alone or together: status 2 and one line, before weights are loaded."""

import contextlib
import importlib.util
import io
import os
import shutil

import pytest
from conftest import SMALL

import train
from harness import launch
from hostile.conftest import rejected

# Every kind of bad value for one flag of a type, one for the others of that type.
BAD_NUMBERS = {
    **dict.fromkeys(("epochs", "gradient_accumulation_steps", "max_train_per_task",
                     "max_eval_per_task", "validation", "max_length", "max_new_tokens",
                     "eval_batch_size", "rank", "num_experts", "top_k", "regroup_every",
                     "alpha", "max_grad_norm"), ("0",)),
    # The last three: neither an overflow nor an allocation.
    "batch_size": ("0", "-1", "1.5", "nan", "inf", "many", "", "9" * 400, "1e400", "1_0000000000"),
    "seed": ("-1", "0.5", "nan", str(2**32), "9" * 20),
    "learning_rate": ("0", "-0.1", "nan", "inf", "-inf", "1e999", "high"),
    "router_noise": ("-0.1", "nan", "inf"),
    "dropout": ("1", "-0.1", "nan"),
    "warmup_ratio": ("1", "-0.1", "nan"),
}


@pytest.fixture
def start(no_weights, llama, suite):
    """Flags of a valid run."""
    return ("--model", llama, "--suite", suite, *SMALL)


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_NUMBERS.items()
                                         for value in values])
def test_bad_numbers(no_weights, name, value):
    """Zero, negative or non-finite where that makes no sense; the flag and the value are named."""
    rejected(f"--{name}={value}", named=(f"--{name}", repr(value), "--help"))


@pytest.mark.parametrize("flags, named", [
    ("--epoch 3", "--epoch"),  # no abbreviations
    ("--epochs", "--epochs"),
    ("--setting both", "'both'"),
    ("--tasks", "--tasks"),
    ("--no_dog yes", "yes"),
    ("extra", "extra"),
])
def test_argparse_errors_are_one_line(no_weights, flags, named):
    """No usage text; the line points to --help."""
    assert "--help" in rejected(*flags.split(), named=named)


# The last word is what is named.
@pytest.mark.parametrize("flags", [
    "--method zero_shot --epochs 3 : --epochs",
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


@pytest.mark.parametrize("flags", ["--rank 4", "--epochs 10", "--setting mixed",
                                   "--method zero_shot"])
def test_evaluation_reads_no_training_flags(no_weights, finished, flags):
    """With --eval_only the adapter's own method and settings count."""
    named = ("zero_shot", "badit") if "zero_shot" in flags else flags.split()[0]
    rejected("--eval_only", "--adapter", finished / "adapter", *flags.split(), named=named)


@pytest.mark.parametrize("flags, named", [
    (["--method", "lora2"], "lora2 badit"),
    (["--model", "gpt-5"], "gpt-5 smollm2-135m qwen3-8b"),
    (["--model", "no/such/folder"], "no/such/folder smollm2-135m"),
    (["--model", ""], "model"),
    (["--suite", "maxi"], "maxi mini superni"),
    (["--suite", "superni", "--data_dir", "nowhere"], "nowhere"),
    (["--tasks", "colour"], "colour colour_name"),
    (["--setting", "sequential", "--task_order", "colour_name"], "which_is"),
    (["--setting", "sequential", "--tasks", "colour_name", "--task_order", "which_is"],
     "which_is"),
    (["--rank", "4", "--num_experts", "9"], "9 36 32"),
    (["--num_experts", "2"], "4 2"),  # top_k stays at 4
    (["--target_modules", "gate"], "gate gate_proj up_proj down_proj q_proj k_proj v_proj o_proj"),
    (["--target_modules", "lm_head"], "lm_head output gate_proj"),
    (["--target_modules", "gate_proj", "mlp.up_proj"], "mlp.up_proj up_proj"),
    (["--max_length", "252"], "252 256"),  # with 5 new tokens more than 256 positions
    (["--gradient_accumulation_steps", "3"], "3 8 --batch_size"),
    (["--chat_template"], "--chat_template"),
])
def test_unknown_names_and_impossible_sizes(start, flags, named):
    """What is wrong is named, with what is allowed; of flags given twice the last counts."""
    rejected(*start, *flags, named=named.split())


# --- the output folder --------------------------------------------------------------------------


def test_an_output_folder_in_use(finished, start, tmp_path):
    """Refused without --overwrite, for any file in it; an empty folder is free."""
    rejected(*start, "--output_dir", finished, named=(str(finished), "--overwrite"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / ".hidden").write_text("mine")
    rejected(*start, "--output_dir", "used", named="used")
    rejected(*start, "--output_dir", "used", "--overwrite", named="holds no run")
    (tmp_path / "used" / "predictions").mkdir()
    (tmp_path / "used" / "predictions" / "00_before.jsonl.partial").touch()  # a killed evaluation
    rejected(*start, "--output_dir", "used", "--overwrite", "--model", "nowhere", named="nowhere")


def test_an_output_folder_that_cannot_be(start, tmp_path):
    """A file is in the way."""
    (tmp_path / "file").write_text("mine")
    rejected(*start, "--output_dir", "file", "--overwrite", named="file")
    rejected(*start, "--output_dir", "file/deep/below", named="file")


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
    *(({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | more, f"{named}|")
      for more, named in (
          ({"FSDP_VERSION": "1"}, "give --fsdp_version 2"),
          ({"FSDP_OFFLOAD_PARAMS": "true"}, "--base nf4 or int8"),
          ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "give --gradient_checkpointing"),
          ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend inductor"))),
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
