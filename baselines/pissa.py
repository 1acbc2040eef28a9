"""PiSSA (Meng et al. 2024): LoRA that starts from the leading singular triplets of the base weight.

Axis names as in decomposition.py; r is the rank.
"""

from baselines.lora import Lora, LoraLinear
from decomposition import InitialBank


class PissaLinear(InitialBank, LoraLinear):
    """Compute y = residual x + s B A dropout(x), from s B0 A0 = the r leading triplets of W0.

    PiSSA's Eq. (2) to (4), with s: A0 = sqrt(S / s) V', B0 = U sqrt(S / s), residual =
    W0 - s B0 A0, so the layer starts equal to `base`. `svd=None` leaves that to `restore`.
    Raises InputError for a rank outside 1 .. min(in, out).
    """

    def __init__(self, base, rank=4, alpha=32, dropout=0.05, svd="exact"):
        super().__init__(base, rank, alpha, dropout)
        # Deviation: triplets get BADIT's sign convention; their products are the same.
        self.add_initial_bank(base, svd)


class Pissa(Lora):
    """Decompose once, before the first task, then train as LoRA does."""

    # Deviation: its authors use no dropout, which drops principal parts of W0. All methods have the
    # same default dropout here.
    name = "pissa"

    def build_layer(self, linear, fresh):
        read = self.settings
        return PissaLinear(linear, read.rank, read.alpha, read.dropout,
                           read.svd if fresh else None)
