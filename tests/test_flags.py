"""What follows from the row of a flag: which sets it is in, and that files and words agree."""

import ast
import inspect
import typing
from pathlib import Path
from types import UnionType

import pytest

from harness.arguments import (
    ALL_FLAGS,
    RUN_FLAGS,
    as_argv,
    build_parser,
    comparable,
    from_values,
    names,
    parse_flags,
)
from harness.identity import ROOT, TRAINS
from inputs.errors import InputError
from inputs.numbers import Fraction, NonNegative, Positive, PositiveInt, Seed
from inputs.settings import Flag, Parser, add_flags
from registry import METHODS, method_class

DEFAULTS = vars(build_parser().parse_args([]))
EVALUATED = "base max_eval_per_task validation max_length max_new_tokens chat_template".split()
TRAINED = [*EVALUATED, *"epochs learning_rate warmup_ratio max_grad_norm max_train_per_task sample "
           "target_modules dropout".split()]


@pytest.mark.parametrize("kind, flags", [
    ({"of_training": True}, "setting task_order epochs max_train_per_task sample batch_size "
     "gradient_accumulation_steps learning_rate warmup_ratio max_grad_norm gradient_checkpointing "
     "eval_tasks eval_before paper_metrics single_task_results plan"),
    ({"of_run": True}, "from_results output_dir overwrite resume checkpoint_every allow_other "
     "report_to shard_base plan"),
    ({"is_path": True}, "model suite data_dir adapter single_task_results"),
    ({"of_study": True}, "method model seed setting suite tasks output_dir resume overwrite "
     "from_results eval_only adapter plan"),
    ({"needs_setting": ("sequential",)}, "task_order"),
    ({"needs_setting": ("mixed", "sequential")}, "single_task_results paper_metrics"),
    ({"alone": "nothing"}, "setting task_order eval_tasks eval_before paper_metrics "
     "single_task_results"),
    ({"alone": "differ"}, "suite data_dir tasks eval_batch_size batch_size "
     "gradient_accumulation_steps"),
], ids=str)
def test_flags_of_a_kind(kind, flags):
    """Each property of a row holds for these flags and for no other."""
    assert names(**kind) == set(flags.split())


@pytest.mark.parametrize("words", [["1", "15"], ["1,15"]], ids=str)
def test_commas_separate_numbers(words):
    """As they separate words."""
    parser = Parser()
    add_flags(parser, [Flag("layers", tuple[PositiveInt, ...], (), "layers")])
    assert parser.parse_args(["--layers", *words]).layers == [1, 15]
    with pytest.raises(InputError, match="'x' is not a whole number"):
        parser.parse_args(["--layers", "1,x"])


def test_flags_of_methods():
    """All settings but the seed, which a run reads anyway; most of them tell variants apart."""
    fields = {field.name: field for entry in METHODS.values()
              for field in entry.settings.__dataclass_fields__.values()}
    assert names(of_method=True) == fields.keys() - {"seed"}
    shared = {name for name, field in fields.items() if not field.metadata["names_variant"]}
    assert shared == {"seed", "target_modules", "dropout", "regroup_every", "svd"}


@pytest.mark.parametrize("setting", ["mixed", "sequential", "single"])
@pytest.mark.parametrize("method", METHODS)
def test_flags_that_runs_of_one_table_share(method, setting):
    """Those of the evaluation; of trained runs the schedule, and what their method reads of it."""
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
    """Flags that some files read as args.x or settings.x, or by name from a tuple of names."""
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
    """Its settings decide what is refused, so none may be one that the method ignores."""
    files = {Path(inspect.getfile(cls)) for cls in method_class(name).__mro__[:-1]}
    assert set(METHODS[name].settings.names()) <= set(flags_read(files))


# --- values in files ----------------------------------------------------------------------------

OTHER = {PositiveInt: 7, Positive: 1e-7, NonNegative: 0.25, Fraction: 0.125, Seed: 9, bool: True,
         str: "-x y"}


def another_value(flag):
    """A value that the flag takes, other than its default."""
    kind = flag.type
    if isinstance(kind, UnionType) or typing.get_origin(kind) is typing.Union:
        kind = typing.get_args(kind)[0]
    if flag.name == "balance_types":
        return ["a=0", "b=1"]
    if typing.get_origin(kind) is typing.Literal:
        return next(value for value in typing.get_args(kind) if value != flag.default)
    if typing.get_origin(kind) is tuple:
        choices = typing.get_args(typing.get_args(kind)[0])
        return list(choices[1:3]) or ["a", "b c"]
    return OTHER[kind]


@pytest.mark.parametrize("flag", ALL_FLAGS.values(), ids=lambda flag: flag.name)
def test_words_and_values_agree(flag):
    """What is recorded gives the words, and the words what is recorded."""
    value = another_value(flag)
    changed = DEFAULTS | {flag.name: value}
    assert vars(build_parser().parse_args(as_argv({flag.name: value}))) == changed
    recorded = {name: value for name, value in changed.items() if name not in RUN_FLAGS}
    recorded = {name: list(value) if isinstance(value, tuple) else value
                for name, value in recorded.items()}
    assert vars(from_values(recorded, "results.json")) == recorded


def test_defaults_need_no_words():
    args, typed = parse_flags([])
    assert typed == set() and as_argv(vars(args) | {"output_dir": None}) == []
    whole = vars(args) | {"alpha": 8, "output_dir": None}
    recorded = {name: value for name, value in whole.items() if name not in RUN_FLAGS}
    assert type(from_values(recorded, "x").alpha) is float  # as typed, also where JSON has 8


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
    """Of another type, out of bounds or without words; in results.json and in an adapter alike."""
    recorded = {key: list(default) if isinstance(default, tuple) else default
                for key, default in DEFAULTS.items() if key not in RUN_FLAGS}
    readers = [lambda: from_values(recorded | {name: value}, "a.json")]
    for cls in {entry.settings for entry in METHODS.values() if name in entry.settings.names()}:
        settings = {key: recorded[key] for key in cls.names()} | {name: value}
        readers.append(lambda cls=cls, settings=settings: cls.from_values(settings, "a.json"))
    for read in readers:
        with pytest.raises(InputError, match=rf"^a\.json: .* is no value of --{name} \(.+\)$"):
            read()


@pytest.mark.parametrize("change", [{"made_up": 1}, {"output_dir": "x"}], ids=str)
def test_other_flags_are_of_another_version(change):
    recorded = {key: value for key, value in DEFAULTS.items() if key not in RUN_FLAGS}
    for values in (recorded | change, {key: recorded[key] for key in list(recorded)[1:]}, {}):
        with pytest.raises(InputError, match="another version of this program, with other flags"):
            from_values(values, "a.json")
