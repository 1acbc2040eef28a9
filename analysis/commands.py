"""The analyses by the names that the command line has."""

from analysis import gradients, routing, units
from analysis.session import check_folder

__all__ = ["check_folder", "run"]
COMMANDS = {"sharing": units.run, "experts": routing.run_experts, "mmlu": routing.run_mmlu,
            "conflict": gradients.run}


def run(args):
    """Carry out args.command; what it finds is in args.out."""
    COMMANDS[args.command](args)
