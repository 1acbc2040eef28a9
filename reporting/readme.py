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
    """Return the table as Markdown: a row a claim, with all comparisons and those of each setting.

    A comparison is a study with one model and setting; a claim is judged by the mean over those
    with the most seeds, of equal weight. Holm's correction is over the claims.
    """
    places = [place for path, records in studies.items()
              for place in verdicts.places(records, study=path)]
    compared = {claim: complete(claim, places) for claim in verdicts.README}
    judged = {claim: verdict for claim, where in compared.items()
              for verdict in verdicts.judge(claim, where)}
    judged = dict(zip(judged, verdicts.corrected(list(judged.values())), strict=True))
    settings = sorted({place.setting for where in compared.values() for place in where})
    rows = [[claim.text, overall(judged.get(claim)), *(
        in_setting(claim, where, setting) for setting in settings)]
        for claim, where in compared.items()]
    return markdown_table(["claim", "all", *settings], rows)


def complete(claim, places):
    """Return the places that have the most seeds for a claim."""
    seeds = {number: verdict.seeds for number, place in enumerate(places)
             for verdict in verdicts.judge(claim, [place])}
    return [places[number] for number in seeds if seeds[number] == max(seeds.values())]


def overall(verdict):
    """Return the verdict over all comparisons: its word, corrected p, difference and counts."""
    if verdict is None:
        return "not run"
    judged = f" (p {verdict.corrected:.2g})" if verdict.seeds >= verdicts.FEWEST else ""
    return (f"{verdict.word()}{judged}: {verdict.difference()}; {comparisons(verdict)}, "
            f"{verdicts.seeds(verdict.seeds)}")


def in_setting(claim, places, setting):
    """Return the difference over the places of one setting, which is not judged."""
    found = verdicts.judge(claim, [place for place in places if place.setting == setting])
    return "; ".join(f"{verdict.difference()}; {comparisons(verdict)}" for verdict in found
                     ) or "not run"


def comparisons(verdict):
    return f"{verdict.places} comparison{'s' * (verdict.places > 1)}"
