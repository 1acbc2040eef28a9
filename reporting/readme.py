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
    """Return the table as Markdown: a row a claim, over all comparisons and by setting.

    A comparison is a study with one model and setting; their number is in brackets. A claim is
    judged by the unweighted mean over the comparisons that have the most seeds. Holm's correction
    is over the claims.
    """
    places = [place for path, records in studies.items()
              for place in verdicts.places(records, study=path)]
    compared = {claim: complete(claim, places) for claim in verdicts.README}
    judged = [verdict for claim, where in compared.items()
              if (verdict := verdicts.judge(claim, where))]
    judged = {verdict.claim: verdict for verdict in verdicts.corrected(judged)}
    settings = sorted({place.setting for where in compared.values() for place in where})
    rows = [[claim.text, *overall(judged.get(claim), where),
             *(in_setting(judged.get(claim), where, setting) for setting in settings)]
            for claim, where in compared.items()]
    return markdown_table(["claim", "against", "verdict", "all", *settings], rows)


def complete(claim, places):
    """Return the places that have the most seeds for a claim."""
    found = [verdicts.against_best(claim, [place]) for place in places]
    seeds = [len(each[1][0]) if each else 0 for each in found]
    return [place for place, count in zip(places, seeds, strict=True) if count == max(seeds) > 0]


def overall(verdict, where):
    """Return the rival, the verdict with its corrected p, and the difference over all of `where`.
    """
    if verdict is None:
        return "-", missing(where), "-"
    word = verdict.word()
    word = f"**{word}**" if word in ("shown", "the reverse") else word
    p = f"p {verdict.corrected:.2g}, " if verdict.seeds >= verdicts.FEWEST else ""
    return verdict.against, f"{word} ({p}{verdicts.seeds(verdict.seeds)})", verdict.difference()


def in_setting(everywhere, places, setting):
    """Return the difference to the same rival over the places of one setting, not judged."""
    if everywhere is None:
        return "-"
    claim = everywhere.claim._replace(theirs=(everywhere.against,))
    verdict = verdicts.judge(claim, [place for place in places if place.setting == setting])
    return verdict.difference() if verdict else "-"


def missing(places):
    """Return the cell of a claim that could not be compared at `places`."""
    return "no seed is in all comparisons" if places else "not run"
