"""OLoRA (Büyükakyüz 2024): LoRA that starts from a QR decomposition of the base weight.

arXiv 2406.01775, PEFT's `init_lora_weights="olora"`. It is not O-LoRA, which is in olora.py. Axis
names as in decomposition.py; r is the rank.
"""

import torch

from baselines.lora import Lora, LoraLinear
from decomposition import InitialBank, residual_weight


def leading_qr(W, r):
    """The first r columns of Q (out, r) and rows of R (r, in) of the reduced QR of W (out, in)."""
    Q, R = torch.linalg.qr(W)  # (out, min), (min, in)
    return Q[:, :r], R[:r]


class OloraQrLinear(InitialBank, LoraLinear):
    """y = residual x + s B A dropout(x), started at B0 = Q_r, A0 = R_r of W0 = Q R.

    residual = W0 - s B0 A0, so the layer starts as `base`. `fresh=False` decomposes nothing and
    awaits `restore`. Raises InputError for a rank outside 1 .. min(in, out).
    """

    def __init__(self, base, rank=4, alpha=32, dropout=0.05, fresh=True):
        super().__init__(base, rank, alpha, dropout)
        self.add_initial_bank(base, svd=None)
        if fresh:
            W0 = base.weight.detach()
            B0, A0 = leading_qr(W0.to(self.lora_A.dtype), rank)
            # As in PEFT, B0 A0 is not divided by s: at s = 8 the adapter's path holds 8 Q_r R_r.
            self.start_from(A0, B0, residual_weight(W0, A0, B0, self.scaling))


class OloraQr(Lora):
    """Decomposed once, before the first task, then trained as LoRA is."""

    name = "olora_qr"

    def build_layer(self, linear, fresh):
        read = self.settings
        return OloraQrLinear(linear, read.rank, read.alpha, read.dropout, fresh)
