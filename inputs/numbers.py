"""Define the types of numbers in flags and files, and make seeds of names.

Each is a type for msgspec: one declaration checks a file and, through `from_text`, a flag.
"""

import argparse
import hashlib
import json
from typing import Annotated

import msgspec
from msgspec import Meta

LARGEST = 1e38  # what float32 holds

PositiveInt = Annotated[int, Meta(ge=1, le=10**6,
                                  description="a whole number from 1 to 1000000")]
Seed = Annotated[int, Meta(ge=0, lt=2**32,  # what NumPy takes
                           description=f"a whole number from 0 to {2**32 - 1}")]
Positive = Annotated[float, Meta(gt=0, le=LARGEST, description="a finite number above 0")]
NonNegative = Annotated[float, Meta(ge=0, le=LARGEST, description="a finite number, 0 or more")]
Fraction = Annotated[float, Meta(ge=0, lt=1, description="a number from 0 to below 1")]


def from_text(kind):
    """Return the function with which argparse reads one of the types above."""
    (meta,) = kind.__metadata__

    def read(text):
        try:
            return msgspec.convert(kind.__origin__(text), kind)
        except (ValueError, OverflowError):  # msgspec's own error is a ValueError
            raise argparse.ArgumentTypeError(f"{text!r} is not {meta.description}") from None

    return read


def stable_seed(*parts):
    """Return a 63-bit seed from strings and numbers, the same on every machine."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
