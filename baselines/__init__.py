"""All methods by the name that `--method` takes. A new one is one file and one entry here."""

from badit import Badit
from baselines.base import Base
from baselines.gainlora import GainLora
from baselines.lora import Lora
from baselines.loramoe import LoraMoe
from baselines.olora import Olora
from baselines.pissa import Pissa

METHODS = {method.name: method
           for method in (Base, Lora, Pissa, Olora, LoraMoe, GainLora, Badit)}
