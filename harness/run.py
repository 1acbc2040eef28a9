"""The parts of one run, by how long they live, and its logs.

`Setup` is fixed before the first step, `Progress` is what a checkpoint holds, the model is loaded
anew for some stages, a `Recorder` logs the steps of one stage.
"""

import argparse
import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from tqdm import tqdm

from data import Encoded
from harness import processes
from harness.signals import StopSignals
from inputs.errors import Interrupted, one_line
from inputs.task_files import Task
from method import Stage, method_of


class Position(NamedTuple):
    """How far a run has come: stages trained and evaluated, optimizer steps of the next one."""

    stage: int
    step: int


class Seconds:
    """Seconds by part of a run, including the parts under way."""

    def __init__(self):
        self.done, self.started = {}, {}

    @contextlib.contextmanager
    def timed(self, part):
        self.started[part] = time.perf_counter()
        yield
        start = self.started.pop(part)
        self.done[part] = self.done.get(part, 0.0) + time.perf_counter() - start

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
    stages: list[Stage]  # empty where nothing is trained
    provenance: dict  # of identity.provenance
    identity: dict  # of identity.identity


@dataclass
class Progress:
    """How far a run has come; a checkpoint holds these fields, and `Setup.identity`."""

    position: Position = Position(0, 0)
    rows: list = field(default_factory=list)  # of the score matrix, so far
    files: list = field(default_factory=list)  # finished ones, relative to --output_dir
    hashes: dict = field(default_factory=dict)  # of the base model
    allowed_differences: set = field(default_factory=set)  # that --allow_other let pass
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
        print_main(self.accelerator, text)

    def predictions_file(self, number, name):
        """Return the path of row `number`'s predictions; file names sort as their numbers."""
        width = max(2, len(str(len(self.setup.stages))))
        return self.args.output_dir / "predictions" / f"{number:0{width}d}_{name}.jsonl"

    def finish_file(self, path):
        """Note a file that no later step writes again; a resumed run relies on it."""
        self.progress.files.append(path.relative_to(self.args.output_dir).as_posix())

    def stop_asked(self):
        """Return whether any process got a signal to stop; all processes get the same answer."""
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


class Recorder:
    """A context that logs the steps of one stage: log.jsonl, regroup.jsonl, tracker and bar."""

    def __init__(self, run, stage):
        self.run, self.stage, self.tokens = run, stage.name, 0
        self.log, self.regroup_log = (self._open(name) for name in ("log.jsonl", "regroup.jsonl"))
        self.bar = tqdm(total=stage.steps, initial=run.progress.position.step,
                        desc=f"train {stage.name}", unit="step",
                        disable=not run.accelerator.is_main_process)
        self.start = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for part in (self.bar, self.log, self.regroup_log):
            part.close()

    def add_step(self, line):
        """Log what one finished optimizer step gave."""
        self.tokens += line["tokens"]
        step = self.run.progress.position.step
        self._write(self.log, {"stage": self.stage} | line | {"step": step})
        speed = self.tokens / (time.perf_counter() - self.start)
        self.bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{line['learning_rate']:.1e}",
                             tok_s=f"{speed:.0f}", refresh=False)
        self.bar.update()
        self.run.accelerator.log(line, step=self.run.steps)

    def add_regrouping(self, lines):
        """Log what a method reports about its regrouping, one line per layer."""
        if lines:
            state = self.run.method.state_dict()
            processes.check_equal(self.run.accelerator, state, self.run.steps)
        for line in lines:
            place = {"stage": self.stage, "step": self.run.progress.position.step}
            self._write(self.regroup_log, place | line)

    def _open(self, name):
        main = self.run.accelerator.is_main_process
        return open(self.run.args.output_dir / name if main else os.devnull, "a", encoding="utf-8")

    @staticmethod
    def _write(file, line):
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()


def print_main(accelerator, text):
    """Print on the main process; the text may quote names and data."""
    accelerator.print("\n".join(map(one_line, text.split("\n"))), flush=True)
