"""The LoRAMoE layer (Dou et al. 2024): a trained per-token router over randomly initialised LoRAs.

Used by BADIT's ablation `--no_bad`. Axis names as in badit.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from badit import BankLinear, Routing, select_experts


class LoraMoeLinear(BankLinear):
    """y = base(x) + s sum_k g_k B_k A_k u, with g = softmax(x R') over the top_k experts.

    The weights of the top_k experts are renormalised to sum to 1, the others are 0; `top_k` equal
    to `num_experts` is the dense original. A and the router R start Kaiming-uniform, B at zero.
    """

    def __init__(self, base, num_experts=8, rank=4, alpha=32, dropout=0.05, top_k=4):
        super().__init__(base, num_experts, rank, alpha, dropout, top_k)
        self.router = nn.Parameter(self.lora_A.new_empty(num_experts, base.in_features))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))

    def route(self, x):
        """x (..., in) -> Routing over (..., K)."""
        with torch.autocast(x.device.type, enabled=False):  # the router is float32 always
            logits = F.linear(x.to(self.router.dtype), self.router)  # (..., K)
            if self.top_k == self.num_experts:
                g = logits.softmax(dim=-1)
                return Routing(g, g, None)
            active = select_experts(logits, self.top_k)
            g = logits.masked_fill(~active, -torch.inf).softmax(dim=-1)  # renormalised top_k
        # No mask for the gradient: weight 0 already stops it.
        return Routing(g, g, active)
