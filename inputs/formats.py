"""Read JSON and text files. Files that others may have written are checked against a shape."""

import json
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from inputs.errors import InputError
from inputs.files import read_text

Score = Annotated[float, Meta(ge=0, le=100)]
Amount = Annotated[float, Meta(ge=-1e100, le=1e100)]  # sums and squares of these are finite
Base = Literal["dense", "int8", "nf4"]  # how a frozen base is stored


class Instance(Struct):
    """One row of a task file."""

    input: str
    output: str | Annotated[list[str], Meta(min_length=1)]
    id: str | int | None = None  # None: it is numbered


class TaskHead(Struct):
    """What a task file says beside its Instances; other keys are not read."""

    Definition: str | list[str]
    Category: str | UnsetType = UNSET
    Categories: str | Annotated[list[str], Meta(min_length=1)] | UnsetType = UNSET
    Metric: str | UnsetType = UNSET


class TaskLine(Instance):
    """A line of a task file of JSON lines; all lines share the instruction."""

    instruction: str = ""


class AdapterConfig(Struct, forbid_unknown_fields=True):
    """adapter_config.json of this program; format 1 lacks the fields with defaults."""

    format: int
    method: str
    settings: dict[str, Any]
    base_sha256: str
    model_type: str
    chat_template: bool
    peft_type: str | None = None
    model: str | None = None
    base: Base = "dense"
    trained_on: dict[str, Any] = {}  # flags that --eval_only takes over


class Prediction(Struct):
    """A line of predictions/*.jsonl, as far as a report reads it."""

    task: str
    id: str
    prompt: str
    prediction: str
    references: Annotated[list[str], Meta(min_length=1)]
    scores: dict[str, dict[str, Score]]  # by metric, then by "best" and "first" reference


class Question(Struct):
    """A line of generate.py's --prompts; other keys are copied to its output."""

    prompt: Annotated[str, Meta(min_length=1)]
    definition: str | UnsetType = UNSET


class LogLine(Struct):
    """A line of log.jsonl, as far as a report reads it."""

    loss: Amount


def read_lines(path, kind):
    """Return the lines of a JSON-lines file as plain values; raises as `numbered_lines`."""
    return [value for _, value in numbered_lines(path, kind)]


def numbered_lines(path, kind):
    """Yield (number, plain value) of every line of a JSON-lines file that is not blank.

    Raises InputError naming a line that is not JSON, or of another shape.
    """
    for number, line in enumerate(text(path).split("\n"), start=1):  # texts hold other breaks
        if line.strip():
            where = f"{path}, line {number}"
            value = _parse(line, where)
            convert(value, kind, where, verdict="")
            yield number, value


def load(path):
    """Return the content of a JSON file of any shape.

    Raises InputError for a file that cannot be read or is not JSON, and for repeated keys and NaN,
    which Python's reader accepts.
    """
    return _parse(text(path), path)


def load_keys(path, keys):
    """Return the JSON object in a file that this program wrote. Raises InputError without a key."""
    content = load(path)
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise InputError(f"{path} has no {key!r}: it is damaged, or of another version of this "
                             "program")
    return content


def convert(value, kind, source, verdict=" is damaged, or of another version of this program"):
    """Return plain values as a `kind`. Raises InputError where they have another shape.

    It also refuses half of a surrogate pair, which Python accepts. The message begins with
    `source`, such as a file, and `verdict`.
    """
    try:
        converted = msgspec.convert(value, kind)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        before = error.object[max(0, error.start - 40):error.start]
        raise InputError(f"{source}: half of a surrogate pair after "
                         f"{before!r}") from None
    except RecursionError as error:
        raise InputError(f"{source} is not readable JSON: {error}") from None
    except msgspec.ValidationError as error:
        raise InputError(f"{source}{verdict}: {error}") from None
    return converted


def text(path):
    """Return the text of a UTF-8 file. Raises InputError where it cannot be read as one."""
    try:
        return read_text(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None


def _parse(content, source):
    try:
        return json.loads(content, object_pairs_hook=_refuse_repeats,
                          parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not readable JSON: {error}") from None


def _refuse_repeats(pairs):
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return dict(pairs)


def _refuse_constant(name):
    raise ValueError(f"{name} is not a number in JSON")
