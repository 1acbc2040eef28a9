"""The files that a run reads and that others may have written: their shapes, and a strict reader.

Each shape is declared once. What no type can say (that scores are from 0 to 100, that parts belong
together) is checked where the file is used.
"""

import json
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from inputs.errors import InputError
from inputs.files import read_text

Score = Annotated[float, Meta(ge=0, le=100)]
Amount = Annotated[float, Meta(ge=-1e100, le=1e100)]  # sums and squares of such are finite


class Instance(Struct):
    """One row of a task file."""

    input: str
    output: str | Annotated[list[str], Meta(min_length=1)]
    id: str | None = None


class TaskFile(Struct):
    """A split of a task in the natural-instructions layout; other keys are not read."""

    Definition: str | list[str]
    Instances: Annotated[list[Instance], Meta(min_length=1)]
    Category: str | None = None
    Metric: str | None = None


class AdapterConfig(Struct, forbid_unknown_fields=True):
    """adapter_config.json of this program."""

    format: int
    method: str
    settings: dict[str, Any]
    base_sha256: str
    model_type: str
    chat_template: bool


class FileSum(Struct, forbid_unknown_fields=True):
    """A file's length and checksum."""

    bytes: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Row(Struct, forbid_unknown_fields=True):
    """Scores per task after one stage, None where not evaluated."""

    name: str
    best: list[Score | None]
    first: list[Score | None]


class CheckpointState(Struct, forbid_unknown_fields=True):
    """state.json of a checkpoint: how far a run has come."""

    position: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]
    rows: list[Row]
    files: dict[str, FileSum]
    identity: dict[str, Any]
    hashes: dict[str, str]
    overruled: list[str]
    seconds: dict[str, Annotated[float, Meta(ge=0, lt=1e10)]]
    rng: list[dict[str, Any]]


class TaskSummary(Struct):
    """What results.json says of a task."""

    category: str
    metric: str
    train: int
    test: int
    sha256: str


class RunInfo(Struct):
    """What differs between equal runs, as far as a report reads it."""

    device: str
    threads: int
    seconds: dict[str, Amount]


class Regrouping(Struct):
    """Means over layers of one regrouping, as far as a report reads them."""

    stage: str
    step: int
    inter_before: Amount | None
    intra_before: Amount | None
    inter_after: Amount | None
    intra_after: Amount | None
    alpha_entropy: Amount | None
    alpha_max: Amount | None


class Results(Struct):
    """results.json of a finished run, as far as anything reads it; other keys are kept, unread."""

    args: dict[str, Any]
    variant: str
    comparable: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    code_sha256: str
    base_sha256: str
    config_sha256: str
    read_files: dict[str, str]
    overruled: list[str]
    precision: str
    processes: int
    compiler: str
    global_batch_size: int
    task_order: Annotated[list[str], Meta(min_length=1)]
    tasks: dict[str, TaskSummary]
    parameters: dict[str, int]
    rows: Annotated[list[str], Meta(min_length=1)]
    scores: dict[str, list[list[Score | None]]]
    metrics: dict[str, Amount | None]
    regroupings: list[Regrouping]
    run: RunInfo


class Prediction(Struct):
    """A line of predictions/*.jsonl, as far as a report reads it."""

    task: str
    id: str
    prompt: str
    prediction: str
    references: Annotated[list[str], Meta(min_length=1)]
    scores: dict[str, dict[str, Score]]


class LogLine(Struct):
    """A line of log.jsonl, as far as a report reads it."""

    loss: Amount


def read(path, kind):
    """(the content of a JSON file as plain values, the same as a `kind`).

    Raises InputError, in one line, for what is no file, no JSON, or of another shape; for a key
    that stands twice, NaN, and half of a surrogate pair, which Python would let pass.
    """
    try:
        text = read_text(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    value = _parse(text, path)
    return value, convert(value, kind, path)


def read_lines(path, kind):
    """The lines of a JSON-lines file, as plain values. Raises InputError as `read` does."""
    try:
        lines = read_text(path).split("\n")  # not splitlines: texts hold other line breaks
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    if lines[-1] == "":
        lines.pop()
    values = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    convert(values, list[kind], path)
    return values


def convert(value, kind, source):
    """Plain values as a `kind`. Raises InputError where they are of another shape."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{source} is damaged, or of another version of this program: {error}"
                         ) from None


def _parse(text, source):
    try:
        value = json.loads(text, object_pairs_hook=_refuse_repeats, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{source}: a text holds half of a surrogate pair, which is no character"
                         ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not readable JSON: {error}") from None
    return value


def _refuse_repeats(pairs):
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return dict(pairs)


def _refuse_constant(name):
    raise ValueError(f"{name} is no number")
