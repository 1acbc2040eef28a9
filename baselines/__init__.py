"""All methods by the name that `--method` takes. A new one is one file and one entry here."""

from badit import Badit
from baselines.base import Base

METHODS = {method.name: method for method in (Base, Badit)}
