"""PiSSA (Meng et al. 2024): LoRA that starts from the leading singular triplets of the base weight.

Axis names as in decomposition.py; r is the rank.
"""

from baselines.lora import Lora, LoraLinear
from decomposition import InitialBank


class PissaLinear(InitialBank, LoraLinear):
    """y = residual x + s B A dropout(x), started at s B0 A0 = the r leading triplets of W0.

    PiSSA Eq. (2) to (4) with s folded in: A0 = sqrt(S / s) V', B0 = U sqrt(S / s), residual =
    W0 - s B0 A0, so the layer starts as `base`. `svd=None` decomposes nothing and awaits `restore`.
    Raises InputError for a rank outside 1 .. min(in, out).
    """

    def __init__(self, base, rank=4, alpha=32, dropout=0.05, svd="exact"):
        super().__init__(base, rank, alpha, dropout)
        # Deviation: each triplet's sign is fixed, as BADIT's are; the product is the same.
        self.add_initial_bank(base, svd)


class Pissa(Lora):
    """Decomposed once, before the first task, then trained as LoRA is."""

    # Deviation: its authors ask for dropout 0, since dropout here drops principal parts of W0;
    # every method is given the same dropout by default.
    name = "pissa"

    def build_layer(self, linear, fresh):
        read = self.settings
        return PissaLinear(linear, read.rank, read.alpha, read.dropout,
                           read.svd if fresh else None)
