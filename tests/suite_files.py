"""Small task folders for tests of what reads them."""

from conftest import write_json

DEFINITION = "Name the colour."


def item(text="sky", output="blue", **extra):
    """One instance as it stands in the JSON."""
    return {"input": text, "output": output, **extra}


def write_task(root, name, train=None, test=None, **keys):
    """Write <root>/<name>/{train,test}.json -> root; `keys` are further top-level JSON keys."""
    for split, instances in (("train", train or [item()]), ("test", test or [item("sea")])):
        content = {"Definition": [DEFINITION], "Instances": instances, **keys}
        write_json(root / name / f"{split}.json", content)
    return root
