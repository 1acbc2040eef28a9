"""Write the table of claims between two markers of a Markdown file."""

from inputs.errors import InputError
from inputs.files import read_text, write_text
from reporting import verdicts
from reporting.tables import markdown_table

START, END = "<!-- results -->", "<!-- /results -->"


def update(file, studies):
    """Write the table of `studies` {path: records} between the markers of `file`.

    Raises InputError if the markers are not there.
    """
    try:
        before, rest = read_text(file).split(START)
        _, after = rest.split(END)
    except ValueError:
        raise InputError(f"{file} needs {START} and, below it, {END}, each once") from None
    write_text(file, f"{before}{START}\n{claims_table(studies)}\n{END}{after}")


def claims_table(studies):
    """Return the table as Markdown: a row a claim, a column each study and setting with one.

    Holm's correction is over all cells of the table.
    """
    found = {(verdict.claim, path, verdict.model, verdict.setting): verdict
             for path, records in studies.items()
             for verdict in verdicts.verdicts(records, verdicts.README)}
    found = dict(zip(found, verdicts.corrected(list(found.values())), strict=True))
    models = dict.fromkeys(model for _, _, model, _ in found)
    columns = {column: f"{(path.parent if path.is_file() else path).resolve().name}, {setting}"
               + f", {model}" * (len(models) > 1)
               for path in studies for model in models for setting in ("mixed", "sequential")
               if (column := (path, model, setting)) in {key[1:] for key in found}}
    return markdown_table(["claim", *columns.values()], [
        [claim.text, *(found[claim, *column].brief() if (claim, *column) in found else "not run"
                       for column in columns)] for claim in verdicts.README])
