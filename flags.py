"""Types for argparse: numbers that are checked where they are read."""

import argparse
import math

LARGEST = 1e38  # what float32 holds


def _number(kind, text, accepts, wanted):
    try:
        value = kind(text)
        usable = math.isfinite(value) and abs(value) <= LARGEST and accepts(value)
    except (ValueError, OverflowError):
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def positive_int(text):
    return _number(int, text, lambda value: 0 < value <= 10**6, "a whole number from 1 to 1000000")


def positive(text):
    return _number(float, text, lambda value: value > 0, "a finite number above 0")


def non_negative(text):
    return _number(float, text, lambda value: value >= 0, "a finite number, 0 or more")


def fraction(text):
    return _number(float, text, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def seed(text):
    return _number(int, text, lambda value: 0 <= value < 2**32,  # what NumPy takes
                   f"a whole number from 0 to {2**32 - 1}")
