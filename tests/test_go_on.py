"""train.py --adapter: training a finished adapter further equals training without a stop."""

import json
import shutil

import pytest
from conftest import (
    NO_EVAL,
    SMALL,
    Killed,
    adapter_of,
    failing,
    lines_of,
    refused,
    results_of,
    run,
    succeed,
    write_json,
)
from tiny import assert_same

from harness import checkpoint
from harness.adapter_config import read_adapter_config
from harness.arguments import parse_flags
from inputs.errors import InputError

ORDER = ("say_both", "colour_name", "which_is")
STEPS = ("--epochs", 2, "--max_train_per_task", 8, "--batch_size", 4, "--learning_rate", 0.01)
VARIANTS = {name: ("--method", name) for name in ("badit", "lora", "olora", "gainlora")}


def sequential(*tasks):
    return ("--setting", "sequential", "--tasks", *tasks, "--task_order", *tasks, *STEPS)


@pytest.fixture(scope="module")
def first(trained_run):
    """Return the folder of a variant's run on the first task, made once."""
    return lambda variant: trained_run(*VARIANTS[variant], *sequential(ORDER[0]), *NO_EVAL)


def log_of(folder, *stages):
    """The lines of log.jsonl and regroup.jsonl of some stages."""
    return [line for name in ("log.jsonl", "regroup.jsonl") if (folder / name).exists()
            for line in lines_of(folder / name) if line["stage"] in stages]


def test_validation_warns_of_rows_that_the_adapter_knows(first, tiny, tmp_path):
    said = succeed(*tiny, *SMALL[-4:], "--eval_only", "--adapter", first("lora") / "adapter",
                   "--validation", 6, "--tasks", *ORDER, "--output_dir", tmp_path / "one")
    assert any("trained on rows that are evaluated" in line for line in said.out)
    said = succeed(*tiny, *SMALL[-4:], "--eval_only", "--adapter", first("lora") / "adapter",
                   "--validation", 2, "--tasks", ORDER[0], "--output_dir", tmp_path / "two")
    assert not any("trained on rows" in line for line in said.out)  # it was trained on the first 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_going_on_is_not_stopping(variant, tiny, first, tmp_path):
    """A task, then two more, to the bit: steps, regroupings, weights and predictions."""
    flags = (*tiny, *SMALL, *VARIANTS[variant])
    succeed(*flags, *sequential(*ORDER), "--output_dir", tmp_path / "whole")
    words = (*tiny, *SMALL[-4:], *sequential(*ORDER[1:]), "--adapter",
             first(variant) / "adapter", "--output_dir", tmp_path / "rest")
    succeed(*words)
    assert_same(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "rest"))
    logs = [log_of(tmp_path / name, *ORDER[1:]) for name in ("whole", "rest")]
    assert logs[0] == logs[1] != []
    whole, rest = (results_of(tmp_path / name) for name in ("whole", "rest"))
    assert [row[1:] for row in whole["scores"]["best"][1:]] == rest["scores"]["best"]
    assert whole["settings"] == rest["settings"] and whole["went_on_from"] is None
    assert rest["went_on_from"] == {"adapter": str(first(variant) / "adapter"),
                                    "sha256": rest["read_files"]["adapter"]}
    assert "--adapter" in rest["comparable"] and "--adapter" not in whole["comparable"]


@pytest.mark.parametrize("variant", ["badit", "gainlora"])
def test_a_run_that_went_on_resumes(variant, tiny, first, tmp_path):
    """From a checkpoint, to the bit; its adapter names all tasks that it was trained on."""
    words = (*tiny, *SMALL[-4:], *sequential(*ORDER[1:]), *NO_EVAL, "--checkpoint_every", 1,
             "--adapter", first(variant) / "adapter")
    succeed(*words, "--output_dir", tmp_path / "whole")
    with failing(checkpoint, "save", 4), pytest.raises(Killed):
        run(*words, "--output_dir", tmp_path / "cut")
    succeed(*words, "--output_dir", tmp_path / "cut", "--resume")
    assert_same(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "cut"))
    assert log_of(tmp_path / "cut", *ORDER) == log_of(tmp_path / "whole", *ORDER)
    for name in ("whole", "cut"):
        config, _ = read_adapter_config(tmp_path / name / "adapter")
        assert config.trained_on["tasks"] == list(ORDER)


def test_another_seed_setting_and_schedule(tiny, first, tmp_path):
    """Those are the new run's own; row 0 is the adapter's score, and each task alone starts there.
    """
    source = first("badit") / "adapter"
    for setting in ("mixed", "single"):
        folder = tmp_path / setting
        succeed(*tiny, *SMALL[-4:], *STEPS, "--setting", setting, "--adapter", source, "--seed", 7,
                "--learning_rate", 0.003, "--eval_before", "--output_dir", folder)
        results = results_of(folder)
        assert results["rows"][0] == "before" and results["args"]["seed"] == 7
        inner = folder / "adapter" / ("" if setting == "mixed" else ORDER[0])
        _, settings = read_adapter_config(inner)
        _, saved = read_adapter_config(source)
        assert settings.seed == 7 and saved.seed == 1 and settings.rank == saved.rank == 2
    succeed(*tiny, *SMALL[-4:], "--eval_only", "--adapter", source, "--seed", 7, "--output_dir",
            tmp_path / "eval")
    before = results_of(tmp_path / "mixed")["scores"]["best"][0]
    assert before == results_of(tmp_path / "eval")["scores"]["best"][0]


def test_settings_are_those_of_the_adapter(first, tiny, tmp_path):
    """They may be typed again, not changed; the default folder says `-on`."""
    source = str(first("badit") / "adapter")
    args, _ = parse_flags(["--adapter", source, "--rank", "2", "--epochs", "3"])
    assert (args.method, args.rank, args.alpha, args.epochs) == ("badit", 2, 16.0, 3)
    assert str(args.output_dir) == "runs/badit-mixed-on-llama-seed1"
    for words, named in ((("--rank", "4"), "here 2"),
                         (("--method", "lora"), "trained with --method badit"),
                         (("--orth_weight", "1"), "has no effect"),
                         (("--target_modules", "up_proj"), "gate_proj")):
        with pytest.raises(InputError, match=named):
            parse_flags(["--adapter", source, *words])
    shutil.copytree(source, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    write_json(file, json.loads(file.read_text()) | {"chat_template": True})
    refused("--chat_template", *tiny, *SMALL[-4:], "--adapter", tmp_path / "adapter",
            "--output_dir", tmp_path / "out")
    refused("no adapter at", "--adapter", tmp_path, "--output_dir", tmp_path / "out")


def test_an_adapter_of_another_base_is_refused(first, checkpoints, suite, tmp_path):
    line = refused("another base model", "--model", checkpoints["qwen3"], "--suite", suite,
                   *SMALL[-4:], "--adapter", first("lora") / "adapter", "--output_dir",
                   tmp_path / "out")
    assert str(first("lora")) in line and not (tmp_path / "out").exists()
