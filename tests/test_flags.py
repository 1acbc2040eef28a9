"""The flags of train.py: their columns, their values in files, hints, and who reads them."""

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import arguments
from harness.arguments import (
    ALL_FLAGS,
    build_parser,
    comparable,
    names,
    parse_flags,
    trained_on,
)
from harness.identity import ROOT, TRAINS
from inputs.errors import InputError
from inputs.numbers import PositiveInt
from inputs.settings import Flag, Parser, add_flags, read_value
from registry import METHODS, method_class

DEFAULTS = vars(build_parser().parse_args([]))
EVALUATED = "base max_eval_per_task validation max_length max_new_tokens chat_template".split()
TRAINED = [*EVALUATED, *"epochs learning_rate warmup_ratio max_grad_norm max_train_per_task "
           "target_modules dropout".split()]


@pytest.mark.parametrize("column, flags", [
    ({"only_training": True}, "setting task_order epochs max_train_per_task batch_size "
     "gradient_accumulation_steps learning_rate warmup_ratio max_grad_norm gradient_checkpointing "
     "eval_tasks eval_before checkpoint_every"),
    ({"not_identity": True}, "output_dir overwrite resume checkpoint_every allow_other report_to "
     "shard_base"),
    ({"is_path": True}, "model suite data_dir adapter"),
    ({"set_by_study": True}, "method model seed setting suite tasks output_dir resume overwrite "
     "eval_only adapter"),
    ({"only_setting": "sequential"}, "task_order"),
    ({"ignored_by_single": True}, "setting task_order eval_tasks eval_before"),
], ids=str)
def test_columns_of_the_flags(column, flags):
    """Each column holds for these flags and for no other."""
    assert names(**column) == set(flags.split())


@pytest.mark.parametrize("words", [["1", "15"], ["1,15"]], ids=str)
def test_commas_separate_numbers(words):
    """As they separate words."""
    parser = Parser()
    add_flags(parser, [Flag("layers", tuple[PositiveInt, ...], (), "layers")])
    assert parser.parse_args(["--layers", *words]).layers == [1, 15]
    with pytest.raises(InputError, match="'x' is not a whole number"):
        parser.parse_args(["--layers", "1,x"])


def test_flags_of_methods():
    """All settings have a flag; five of them do not tell variants apart."""
    fields = {field.name: field for entry in METHODS.values()
              for field in entry.settings.__dataclass_fields__.values()}
    assert names(of_method=True) == fields.keys() - {"seed"}
    shared = {name for name, field in fields.items() if not field.metadata["names_variant"]}
    assert shared == {"seed", "target_modules", "dropout", "regroup_every", "svd"}


@pytest.mark.parametrize("setting", ["mixed", "sequential", "single"])
@pytest.mark.parametrize("method", METHODS)
def test_flags_that_runs_of_one_table_share(method, setting):
    """All runs share the evaluation's flags, trained ones also the schedule's."""
    args = build_parser().parse_args(["--method", method, "--setting", setting])
    assert comparable(args, False) == {f"--{name}": getattr(args, name) for name in EVALUATED}
    if METHODS[method].trains:
        read = METHODS[method].settings.names()
        wanted = {f"--{name}" for name in TRAINED}
        wanted |= {"--svd"} & {f"--{name}" for name in read}
        wanted |= {f"--regroup_every, {setting}"} if "regroup_every" in read else set()
        wanted |= {"--task_order"} if setting == "sequential" else set()
        assert comparable(args, True).keys() == wanted


READERS = ("args", "settings", "read")  # variables and attributes that hold flags


def flags_read(files):
    """Yield the flags that files read as args.x or settings.x, or by name from a tuple."""
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if getattr(owner, "id", getattr(owner, "attr", None)) in READERS:
                yield node.attr
        if isinstance(node, ast.DictComp) and "getattr(self.settings" in ast.unparse(node.value):
            yield from ast.literal_eval(node.generators[0].iter)


def test_every_flag_is_read():
    """No flag is declared, accepted and ignored."""
    files = [path for pattern in TRAINS for path in ROOT.glob(pattern)]
    assert ALL_FLAGS.keys() <= set(flags_read(files))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reads_what_it_claims(name):
    """No setting of a method is ignored by it."""
    files = {Path(inspect.getfile(cls)) for cls in method_class(name).__mro__[:-1]}
    assert set(METHODS[name].settings.names()) <= set(flags_read(files))


# --- values in files ----------------------------------------------------------------------------


@pytest.mark.parametrize("name, value", [
    *((name, value) for name in ("rank", "epochs", "max_length")
      for value in (0, -1, 1.5, 4.0, "4", True, None, [4], 10**7, 10**400)),
    *((name, value) for name in ("learning_rate", "alpha", "max_grad_norm")
      for value in (0, -0.1, float("nan"), float("inf"), "0.1", True, None, 1e39, 10**400)),
    ("router_noise", -0.1), ("dropout", 1), ("dropout", -0.1), ("warmup_ratio", float("nan")),
    ("seed", -1), ("seed", 2**32), ("seed", 0.5), ("max_eval_per_task", 0),
    ("chat_template", 1), ("chat_template", "yes"), ("no_dog", None), ("deterministic", 0),
    ("setting", "both"), ("routing", None), ("eval_tasks", ["all"]), ("match_parameters", "lora"),
    ("model", None), ("model", 5), ("method", ["badit"]), ("data_dir", False),
    ("tasks", []), ("tasks", "all"), ("tasks", ["a", 5]), ("tasks", ["a", "--rank"]),
    ("target_modules", []), ("target_modules", ["-x"]), ("target_modules", None),
    ("balance_types", ["a=0", "b=2"]), ("balance_types", ["a"]), ("balance_types", {"a": 0}),
], ids=lambda part: f"{part!r:.12}")
def test_values_that_no_flag_takes(name, value):
    """Values of another type, out of bounds or without words, in an adapter's configuration."""
    readers = [lambda: read_value(ALL_FLAGS[name], value, "a.json")]
    for cls in {entry.settings for entry in METHODS.values() if name in entry.settings.names()}:
        settings = {key: DEFAULTS[key] for key in cls.names()} | {name: value}
        readers.append(lambda cls=cls, settings=settings: cls.from_values(settings, "a.json"))
    for read in readers:
        with pytest.raises(InputError, match=rf"^a\.json: .* is not a value of --{name} \(.+\)$"):
            read()


# --- hints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, named", [
    ("--lr 1e-4", "did you mean --learning_rate?"),
    ("--learning-rate 1e-4", "did you mean --learning_rate?"),
    ("--model_name x", "did you mean --model?"), ("--zzz", "--zzz; see"),
    ("--method badit-energy", "here --method badit --routing energy; allowed"),
    ("--task_order a b", "has no effect with --setting mixed, only with --setting sequential"),
    ("--eval_tasks none --eval_loss", "--eval_loss has no effect with --eval_tasks none"),
])
def test_hints(words, named):
    """An unknown flag names the nearest one, a study's variant its flags."""
    with pytest.raises(InputError) as caught:
        parse_flags(words.split())
    assert named in str(caught.value)


def test_default_folders_tell_evaluations_apart(tmp_path, monkeypatch):
    """By the run that made the adapter, and by the suite."""
    monkeypatch.setattr(arguments, "take_adapter", lambda *_: None)
    folders = {str(parse_flags(["--eval_only", "--adapter", adapter, "--suite", suite])[0]
                   .output_dir)
               for adapter in ("runs/a/adapter", "runs/b/adapter", "runs/b/adapter/task")
               for suite in ("mini", "superni")}
    assert len(folders) == 6 and "runs/eval-a-superni-seed1" in folders
    assert "runs/eval-b-task-mini-seed1" in folders


def test_changed_tasks_of_an_adapter(tmp_path, monkeypatch):
    """Further training adds the earlier tasks, or under `earlier` those of another suite."""
    earlier = {"suite": "mini", "data_dir": None, "tasks": ["a"], "max_length": 9,
               "max_new_tokens": 5}
    config = SimpleNamespace(trained_on=earlier)
    monkeypatch.setattr(arguments, "read_adapter_config", lambda _: (config, None))
    args = build_parser().parse_args(["--adapter", "x"])
    assert trained_on(args, ["b", "a"])["tasks"] == ["a", "b"]
    assert trained_on(args, None)["tasks"] is None
    args.suite = "superni"
    assert trained_on(args, ["b"]) == {
        "suite": "superni", "data_dir": None, "tasks": ["b"], "max_length": 1024,
        "max_new_tokens": 50, "earlier": earlier}
    args.suite, config.trained_on = "mini", earlier | {"earlier": {"suite": "before"}}
    assert trained_on(args, ["b"])["earlier"] == {"suite": "before"}
