"""Flags and settings, declared once with type, default and help: parsers and checks follow.

A program's flags are a tuple of `Flag`. A method's settings are a frozen dataclass whose fields are
made by `setting`; train.py has a flag for each of them.
"""

import argparse
import dataclasses
import difflib
import types
import typing
from typing import Literal

import msgspec

from inputs.errors import InputError
from inputs.numbers import from_text


def setting(default, help, *, metavar=None, check=None, names_variant=True, same_in_table=False):
    """Return a field of a settings class; its type is its flag's.

    `check(text)` refuses what the type cannot (it raises argparse.ArgumentTypeError). If
    `names_variant` is False, the value is not part of the variant's name. `same_in_table`: all runs
    of one table of a report share it; "by setting": only runs with the same --setting must.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, metavar=metavar, check=check, names_variant=names_variant,
        same_in_table=same_in_table))


def did_you_mean(word, names):
    """Return ": did you mean NAME?" for the name nearest to `word`, or "" if none is near."""
    near = difflib.get_close_matches(str(word), list(names), n=1)
    return f": did you mean {near[0]}?" if near else ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a method. A subclass adds fields, named as their flags."""

    def __post_init__(self):
        self.check()

    def check(self):
        """Raise InputError for values that contradict each other; called on construction."""

    def derived(self):
        """Return the names of settings whose values follow from others, so that no name holds them.
        """
        return set()

    def has_no_effect(self):
        """Return {cause: names of the settings that have no effect because of it}."""
        return {}

    def refuse_flags_without_effect(self, typed):
        """Raise InputError if one of the `typed` flags has no effect with these settings."""
        for cause, names in self.has_no_effect().items():
            for name in sorted(typed & names):
                raise InputError(f"--{name} has no effect with {cause}: remove it")

    @classmethod
    def names(cls):
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_values(cls, values, source):
        """Return the settings with `values` {name: value}, read from the file `source`.

        Raises InputError for a missing or unknown name, a wrong type or value.
        """
        unknown = set(values) ^ set(cls.names())
        if unknown:
            raise InputError(f"{source}: settings {sorted(unknown)} do not fit {cls.__name__}, "
                             f"which has {sorted(cls.names())}")
        return cls(**{field.name: read_value(field, values[field.name], source)
                      for field in dataclasses.fields(cls)})


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError, and names what an unknown flag or choice may have meant."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):  # argparse calls it for subcommands too
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized argument {unknown[0]}{self._nearest(unknown[0])}")
        return namespace, unknown

    def _nearest(self, word):
        word = word.split("=")[0]
        names = [name for name in self._option_string_actions if name.startswith("--")]
        short_for = [name for name in names
                     if word.lstrip("-") == "".join(part[0] for part in name[2:].split("_"))]
        return did_you_mean(short_for[0] if short_for else word, names)

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(
                action, f"{error.message}{did_you_mean(value, action.choices)}") from None

    def error(self, message):
        raise InputError(f"{message}; see `python {self.prog} --help`")


class Flatten(argparse.Action):
    """Join the lists that `comma_separated` makes of several words: `a b` equals `a,b`."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [part for parts in values for part in parts])


def comma_separated(read):
    """Return a function that splits a text at commas and calls `read` on each part."""
    return lambda text: [read(part) for part in text.split(",")]


def read_value(field, value, source):
    """Return the value of a setting or Flag that the file `source` holds.

    Raises InputError for what the command line would refuse too.
    """
    check = field.metadata["check"]
    try:
        read = msgspec.convert(value, field.type)
        several = isinstance(read, tuple)
        if several and (not read or any(text.startswith("-") for text in read)):
            raise argparse.ArgumentTypeError("expected one or more words that are not flags")
        for text in read if several else (read,):
            if check is not None and read is not None:
                check(text)
    except (msgspec.ValidationError, argparse.ArgumentTypeError) as error:
        raise InputError(f"{source}: {value!r:.60} is not a value of --{field.name} ({error})"
                         ) from None
    return read


REQUIRED = object()  # the default of a flag that must be given


@dataclasses.dataclass(frozen=True)
class Flag:
    """One command-line flag of a program.

    `type` is a number from inputs/numbers.py, str, Path, bool, Literal[...], or a tuple of one of
    these for several words; `T | None` is T with None as its default. `check(text)` refuses what
    the type cannot: it raises argparse.ArgumentTypeError.
    """

    name: str
    type: typing.Any
    default: typing.Any  # REQUIRED for none
    help: str
    metavar: str | None = None
    check: typing.Any = None
    positional: bool = dataclasses.field(default=False, kw_only=True)  # a word without --name

    @property
    def metadata(self):  # as a field of Settings has it
        return {"check": self.check}


def add_flags(parser, flags, group=None):
    """Add `flags` to a parser, under the heading `group` of its --help where one is given."""
    parser = parser.add_argument_group(group) if group else parser
    for flag in flags:
        value_type, required = flag.type, flag.default is REQUIRED
        options = {"help": flag.help, "default": None if required else flag.default,
                   "metavar": flag.metavar}
        if isinstance(value_type, types.UnionType) or typing.get_origin(value_type) is typing.Union:
            (value_type,) = (each for each in typing.get_args(value_type)
                             if each is not types.NoneType)
        if value_type is bool:
            parser.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
            continue
        if typing.get_origin(value_type) is tuple:
            options["nargs"] = "+"
            value_type = typing.get_args(value_type)[0]
        if typing.get_origin(value_type) is Literal:
            options["choices"] = typing.get_args(value_type)
        elif hasattr(value_type, "__metadata__"):
            options["type"] = from_text(value_type)
        elif flag.check is not None:
            options["type"] = flag.check
        elif value_type is not str:
            options["type"] = value_type  # Path
        if "nargs" in options and flag.check is None and (
                value_type is str or hasattr(value_type, "__metadata__")):  # paths may hold a comma
            options |= {"action": Flatten, "type": comma_separated(options.get("type", str))}
        if not flag.positional:
            parser.add_argument(f"--{flag.name}", required=required, **options)
        elif required or "nargs" in options:
            parser.add_argument(flag.name, **options)
        else:
            parser.add_argument(flag.name, **{"nargs": "?"} | options)


def program_parser(program, description, flags=()):
    """Return the parser of a program whose --help shows `description` line by line."""
    parser = Parser(prog=program, description=description,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, flags)
    return parser
