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
    """Return the table as Markdown: one row per claim; columns: all comparisons, then each setting.

    A comparison is a study with one model and setting. A claim is judged by the unweighted mean
    over the comparisons that have the most seeds. Holm's correction is over the claims.
    """
    places = [place for path, records in studies.items()
              for place in verdicts.places(records, study=path)]
    compared = {claim: complete(claim, places) for claim in verdicts.README}
    judged = [verdict for claim, where in compared.items()
              if (verdict := verdicts.judge(claim, where))]
    judged = {verdict.claim: verdict for verdict in verdicts.corrected(judged)}
    settings = sorted({place.setting for where in compared.values() for place in where})
    rows = [[claim.text, overall(judged.get(claim), where), *(
        in_setting(claim, where, setting) for setting in settings)]
        for claim, where in compared.items()]
    return markdown_table(["claim", "all", *settings], rows)


def complete(claim, places):
    """Return the places that have the most seeds for a claim."""
    found = [verdicts.against_best(claim, [place]) for place in places]
    seeds = [len(each[1][0]) if each else 0 for each in found]
    return [place for place, count in zip(places, seeds, strict=True) if count == max(seeds) > 0]


def overall(verdict, where):
    """Return the verdict over the comparisons `where`: word, corrected p, difference, counts."""
    if verdict is None:
        return missing(where)
    word = verdict.word()
    word = f"**{word}**" if word in ("shown", "the reverse") else word
    judged = f" (p {verdict.corrected:.2g})" if verdict.seeds >= verdicts.FEWEST else ""
    return (f"{word}{judged}: {verdict.difference()}; {comparisons(verdict)}, "
            f"{verdicts.seeds(verdict.seeds)}")


def in_setting(claim, places, setting):
    """Return the difference over the places of one setting, which is not judged."""
    mine = [place for place in places if place.setting == setting]
    verdict = verdicts.judge(claim, mine)
    return f"{verdict.difference()}; {comparisons(verdict)}" if verdict else missing(mine)


def missing(places):
    """Return the cell of a claim that could not be compared at `places`."""
    return "no seed is in all comparisons" if places else "not run"


def comparisons(verdict):
    return f"{verdict.places} comparison{'s' * (verdict.places > 1)}"
