"""Why the router of BADIT stays uniform: its gradients and logits, beside the bank's and the noise.

    python scripts/router_signal.py --output_dir runs/signal --regroup_every 15 --epochs 2

trains with these flags of train.py (token routing) and prints, after every regrouping or
measurement, means over layers:

    norm       of the gradient of a step, of router and bank
    cosine     of a step's gradient with that of the step before
    signal     n |mean g|^2 / mean |g|^2 over the n steps so far: 1 for gradients without a common
               direction, n for equal ones
    logits     standard deviation of the router's logits: over experts of their mean over tokens,
               over tokens around that mean; the selection in training sees noise of --router_noise
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import registry  # noqa: E402
import train  # noqa: E402
from badit import Badit  # noqa: E402
from regrouping import probe_rows  # noqa: E402

COLUMNS = ("step", "norm router", "norm bank", "cosine router", "cosine bank", "signal router",
           "signal bank", "logits experts", "logits tokens", "noise")


class Gradients:
    """What the gradients of the steps so far have in common; rows are layers."""

    def __init__(self):
        self.count, self.last, self.sum, self.squares = 0, None, 0, 0

    def add(self, rows):
        """One step's gradients (layers, entries)."""
        before = torch.full_like(rows, torch.nan) if self.last is None else self.last
        self.cosine = F.cosine_similarity(rows, before)
        self.count, self.last = self.count + 1, rows
        self.sum, self.squares = self.sum + rows, self.squares + rows.square().sum(1)

    def signal(self):
        """n |mean g|^2 / mean |g|^2 of every layer: between 0 and n, 1 for pure noise."""
        return self.sum.square().sum(1) / self.squares


class Observed(Badit):
    """BADIT, printing what its routers learn from."""

    def start_stage(self, stage, loader):
        super().start_stage(stage, loader)
        self.seen = {"router": Gradients(), "bank": Gradients()}
        print("  ".join(COLUMNS))

    def after_backward(self):
        super().after_backward()
        layers = self.layers.values()
        self.seen["router"].add(torch.stack([layer.router.grad.flatten() for layer in layers]))
        self.seen["bank"].add(torch.stack([
            torch.cat([layer.lora_A.grad.flatten(), layer.lora_B.grad.flatten()])
            for layer in layers]))

    def after_step(self, batch):
        lines = super().after_step(batch)
        if lines:
            seen = self.seen.values()
            experts, tokens = self.logit_spread(batch)
            noise = next(iter(self.layers.values())).router_noise
            numbers = [*(each.last.norm(dim=1).mean() for each in seen),
                       *(each.cosine.mean() for each in seen),
                       *(each.signal().mean() for each in seen), experts, tokens, noise]
            print("  ".join(f"{number:>{len(name)}.{0 if name == 'step' else 3}f}" for name, number
                            in zip(COLUMNS, [self.regrouper.step, *numbers], strict=True)))
        return lines

    @torch.no_grad()
    def logit_spread(self, batch):
        """Standard deviations of the logits over experts and over tokens, means over layers."""
        batch, spread = probe_rows(batch), []
        tokens = batch["attention_mask"].bool()

        def hook(layer, inputs):
            logits = F.linear(inputs[0][tokens].to(layer.router.dtype), layer.router)
            logits = logits - logits.mean(-1, keepdim=True)  # (tokens, K); softmax sees no more
            mean = logits.mean(0)
            spread.append(torch.stack([mean.std(), (logits - mean).std()]))

        handles = [layer.register_forward_pre_hook(hook) for layer in self.layers.values()]
        self.model.eval()
        self.model(**batch, logits_to_keep=1, use_cache=False)
        self.model.train()
        for handle in handles:
            handle.remove()
        return torch.stack(spread).mean(0).tolist()


def main(argv):
    registry.METHODS["badit"] = registry.METHODS["badit"]._replace(
        where=f"{Path(__file__).stem}:{Observed.__name__}")
    sys.modules[Path(__file__).stem] = sys.modules[__name__]
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
