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

    Column "all" is the mean over the columns that have the most seeds for a claim, with equal
    weights. Holm's correction is over that column; all other cells are corrected separately.
    """
    places = [place for path, records in studies.items()
              for place in verdicts.places(records, study=path)]
    cells = {(claim, number): verdict for claim in verdicts.README
             for number, place in enumerate(places) for verdict in verdicts.judge(claim, [place])}
    cells = dict(zip(cells, verdicts.corrected(list(cells.values())), strict=True))
    whole = {claim: verdict for claim in verdicts.README
             for verdict in verdicts.judge(claim, complete(claim, cells, places))}
    whole = dict(zip(whole, verdicts.corrected(list(whole.values())), strict=True))
    shown = [number for number in range(len(places)) if number in {key[1] for key in cells}]
    rows = [[claim.text, overall(whole.get(claim)), *(
        cells[claim, number].brief() if (claim, number) in cells else "not run"
        for number in shown)] for claim in verdicts.README]
    several = len({places[number].model for number in shown}) > 1
    return markdown_table(["claim", "all", *(title(places[number], several) for number in shown)],
                          rows)


def complete(claim, cells, places):
    """Return the places that have the most seeds for a claim."""
    seeds = {number: verdict.seeds for (other, number), verdict in cells.items() if other == claim}
    return [places[number] for number in seeds if seeds[number] == max(seeds.values())]


def overall(verdict):
    """Return the verdict over all columns: its word, corrected p, difference and counts."""
    if verdict is None:
        return "not run"
    judged = f" (p {verdict.corrected:.2g})" if verdict.seeds >= verdicts.FEWEST else ""
    columns = f"{verdict.places} column{'s' * (verdict.places > 1)}"
    return (f"{verdict.word()}{judged}: {verdict.difference()}; {columns}, "
            f"{verdicts.seeds(verdict.seeds)}")


def title(place, several):
    """Return the heading of a column, with the model if there are several."""
    path = place.study
    name = (path.parent if path.is_file() else path).resolve().name
    return f"{name}, {place.setting}" + f", {place.model}" * several
