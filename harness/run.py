"""What the parts of one run share, by how long it lives.

`Setup` is fixed before the first step, `Progress` is what a checkpoint holds, the model comes and
goes with the stages.
"""

import argparse
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from data import Encoded
from harness.signals import StopSignals
from inputs.errors import Interrupted, one_line
from inputs.files import sha256_file
from inputs.task_files import Task
from method import Stage, method_of


class Position(NamedTuple):
    """How far a run has come: stages trained and evaluated, optimizer steps of the next one."""

    stage: int
    step: int


class Seconds:
    """Seconds by part of a run, with those of the parts under way."""

    def __init__(self):
        self.done, self.started = {}, {}

    @contextlib.contextmanager
    def timed(self, part):
        self.started[part] = time.perf_counter()
        yield
        start = self.started.pop(part)
        self.done[part] = self.done.get(part, 0.0) + time.perf_counter() - start

    def after(self, before):
        """These seconds in a run that had come so far {part: seconds} before, and lost the rest."""
        self.done |= before
        return self

    def so_far(self):
        now = time.perf_counter()
        return self.done | {part: self.done.get(part, 0.0) + now - start
                            for part, start in self.started.items()}


@dataclass(frozen=True)
class Setup:
    """What is fixed before the first step."""

    args: argparse.Namespace
    accelerator: Accelerator
    stop: StopSignals
    tasks: dict[str, Task]  # cut to the rows that are used
    order: list[str]
    tokenizer: Any
    encoded: Encoded
    stages: list[Stage]  # none where nothing is trained
    provenance: dict  # what it is made with: identity.provenance
    identity: dict  # what makes it this run: identity.identity
    single: Any  # results_file.SingleTaskScores, or None
    known_hashes: dict = field(default_factory=dict)  # of the model of the run that is repeated


@dataclass
class Progress:
    """How far a run has come; a checkpoint holds these fields, and `Setup.identity`."""

    position: Position = Position(0, 0)
    rows: list = field(default_factory=list)  # of the score matrix, so far
    files: dict = field(default_factory=dict)  # finished ones, with their checksums
    hashes: dict = field(default_factory=dict)  # of the base model
    overruled: set = field(default_factory=set)  # what --allow_other has let differ
    seconds: Seconds = field(default_factory=Seconds)


class Run:
    """A run under way."""

    def __init__(self, setup, progress):
        self.setup, self.progress, self.model = setup, progress, None
        self.args, self.accelerator = setup.args, setup.accelerator

    @property
    def method(self):
        return method_of(self.model)

    @property
    def global_batch(self):
        """Rows of one optimizer step, over all micro-batches and processes."""
        return self.args.batch_size * self.micro_batches

    @property
    def micro_batches(self):
        """Micro-batches of one optimizer step, over all processes."""
        return self.accelerator.num_processes * self.args.gradient_accumulation_steps

    @property
    def steps(self):
        """Optimizer steps so far, in all stages."""
        stage, step = self.progress.position
        return step + sum(each.steps for each in self.setup.stages[:stage])

    def step_done(self):
        """Count an optimizer step."""
        stage, step = self.progress.position
        self.progress.position = Position(stage, step + 1)

    def print(self, text):
        say(self.accelerator, text)

    def finish_file(self, path):
        """Note a file that no later step writes again; a resumed run relies on it."""
        if self.accelerator.is_main_process:
            name = path.relative_to(self.args.output_dir).as_posix()
            self.progress.files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}

    def stop_asked(self):
        """Whether any process got a signal that asks to stop; all processes get the same answer."""
        stop = self.setup.stop
        number = torch.tensor([stop.received or 0], device=self.accelerator.device)
        number = int(self.accelerator.gather(number).max())
        if number:
            stop.note(number)
        return number > 0

    def end_together(self):
        """Raise Interrupted once all processes are here: a launcher kills those that are late."""
        self.accelerator.wait_for_everyone()
        raise Interrupted


def say(accelerator, text):
    """Print on the main process; the text may quote names and data."""
    accelerator.print("\n".join(map(one_line, text.split("\n"))), flush=True)
