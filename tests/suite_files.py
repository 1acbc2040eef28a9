"""Small task folders for tests of what reads them, and what a refusal looks like."""

import pytest
from conftest import write_json

from inputs.errors import InputError

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


def complaint(call, *args, **options):
    """The message of the InputError that the call raises, which is one line."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message.strip() and "\n" not in message
    return message
