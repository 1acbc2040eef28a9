"""OLoRA (Büyükakyüz 2024): LoRA that starts from a QR decomposition of the base weight.

arXiv 2406.01775, PEFT's `init_lora_weights="olora"`. Not to be confused with O-LoRA, in olora.py.
Axis names as in decomposition.py; r is the rank.
"""

import torch

from baselines.lora import Lora, LoraLinear
from decomposition import InitialBank, residual_weight


class OloraQrLinear(InitialBank, LoraLinear):
    """Compute y = residual x + s B A dropout(x), from B0 = Q_r and A0 = R_r of W0 = Q R.

    residual = W0 - s B0 A0, so the layer starts equal to `base`. With `fresh=False`, `restore` must
    follow.
    """

    def __init__(self, base, rank=4, alpha=32, dropout=0.05, fresh=True):
        super().__init__(base, rank, alpha, dropout)
        self.add_initial_bank(base, svd=None)
        if fresh:
            W0 = base.weight.detach()
            Q, R = torch.linalg.qr(W0.to(self.lora_A.dtype))  # (out, min), (min, in)
            A0, B0 = R[:rank], Q[:, :rank]
            # As in PEFT, B0 A0 is not divided by s: at s = 8 the update starts at 8 Q_r R_r.
            self.start_from(A0, B0, residual_weight(W0, A0, B0, self.scaling))


class OloraQr(Lora):
    """Decompose once, before the first task, then train as LoRA does."""

    name = "olora_qr"

    def build_layer(self, linear, fresh):
        read = self.settings
        return OloraQrLinear(linear, read.rank, read.alpha, read.dropout, fresh)
