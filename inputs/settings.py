"""Settings: values declared once, with type, default and meaning; flags and checks follow from it.

A method's settings are a frozen dataclass whose fields are made by `setting`.
"""

import argparse
import dataclasses
import types
import typing
from typing import Literal

import msgspec

from inputs.errors import InputError
from inputs.numbers import from_text


def setting(default, help, *, metavar=None, check=None, names_variant=True, table=False):
    """A field of a settings class; its type is that of its flag.

    `check(text)` refuses what the type cannot (it raises argparse.ArgumentTypeError).
    `names_variant` False: two runs that differ in it are still of one variant of the method.
    `table`: runs stand in one table of a report only where it is equal; "by setting": only runs of
    one setting (mixed, sequential) need that.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, metavar=metavar, check=check, names_variant=names_variant, table=table))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a method reads. A subclass adds fields; their names are those of the flags."""

    def __post_init__(self):
        self.check()

    def check(self):
        """Raise InputError for values that contradict each other."""

    def unread(self):
        """{what makes it so: names of settings} that have no effect beside the others."""
        return {}

    def refuse_unread(self, typed):
        """Raise InputError where one of the `typed` flags has no effect beside the others."""
        for cause, names in self.unread().items():
            for name in sorted(typed & names):
                raise InputError(f"--{name} is not read with {cause}")

    @classmethod
    def names(cls):
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_values(cls, values, source):
        """The settings with `values` {name: value}, which stand in the file `source`.

        Raises InputError for a missing or unknown name, a wrong type or value.
        """
        unknown = set(values) ^ set(cls.names())
        if unknown:
            raise InputError(f"{source}: settings {sorted(unknown)} do not fit {cls.__name__}, "
                             f"which has {sorted(cls.names())}")
        read = {}
        for field in dataclasses.fields(cls):
            try:
                read[field.name] = msgspec.convert(values[field.name], field.type)
                check_each(field, read[field.name])
            except (msgspec.ValidationError, argparse.ArgumentTypeError) as error:
                raise InputError(f"{source}: {values[field.name]!r:.60} is no value of "
                                 f"--{field.name} ({error})") from None
        return cls(**read)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where to read on."""

    def error(self, message):
        raise InputError(f"{message}; see `python {self.prog} --help`")


class Words(argparse.Action):
    """Takes several words, or one with commas: `a b` is `a,b`."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, [part for word in values for part in word.split(",")])


def check_each(field, value):
    """Refuse a value of the right type that the field's flag could not have been given.

    Raises argparse.ArgumentTypeError for no words at all, one that looks like a flag, and what the
    field's own check refuses.
    """
    check, several = field.metadata["check"], isinstance(value, tuple)
    if several and (not value or any(text.startswith("-") for text in value)):
        raise argparse.ArgumentTypeError("it takes one word or more, none of which is a flag")
    for text in value if several else (value,):
        if check is not None and value is not None:
            check(text)


def add_argument(group, name, kind, default, help, metavar=None, check=None):
    """Declare --name, whose value is of a type: a kind of number, bool, Literal, str, or a tuple.

    `T | None` is T with None as default.
    """
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
    options = dict(default=default, help=help)
    origin = typing.get_origin(kind)
    if kind is bool:
        group.add_argument(f"--{name}", action="store_true", help=help)
        return
    if metavar:
        options["metavar"] = metavar
    if origin is tuple:
        options["nargs"] = "+"
        kind = typing.get_args(kind)[0]
        if kind is str and check is None:  # not of paths, which may hold a comma
            options["action"] = Words
        origin = typing.get_origin(kind)
    if origin is Literal:
        options["choices"] = typing.get_args(kind)
    elif hasattr(kind, "__metadata__"):
        options["type"] = from_text(kind)
    elif check is not None:
        options["type"] = check
    group.add_argument(f"--{name}", **options)
