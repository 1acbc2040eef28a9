"""What is kept of the steps of one stage: log.jsonl, regroup.jsonl, a tracker and a tqdm bar."""

import json
import os
import time

from harness import processes
from inputs.bars import Bar


def stream(run, path, mode="w"):
    """`path` opened for writing on the main process, a sink on the others."""
    if not run.accelerator.is_main_process:
        return open(os.devnull, "w")
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, mode, encoding="utf-8")


class Recorder:
    """A context manager around the steps of one stage."""

    def __init__(self, run, stage):
        self.run, self.stage, self.tokens = run, stage.name, 0
        self.log = stream(run, run.args.output_dir / "log.jsonl", "a")
        self.regroup_log = stream(run, run.args.output_dir / "regroup.jsonl", "a")
        self.bar = Bar(total=stage.steps, initial=run.progress.position.step,
                        desc=f"train {stage.name}", unit="step",
                        disable=not run.accelerator.is_main_process)
        self.start = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for part in (self.bar, self.log, self.regroup_log):
            part.close()

    def add_step(self, line):
        """Keep what one optimizer step gave, which is done."""
        self.tokens += line["tokens"]
        step = self.run.progress.position.step
        self._write(self.log, {"stage": self.stage} | line | {"step": step})
        speed = self.tokens / (time.perf_counter() - self.start)
        self.bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{line['learning_rate']:.1e}",
                             tok_s=f"{speed:.0f}", refresh=False)
        self.bar.update()
        self.run.accelerator.log(line, step=self.run.steps)

    def add_regrouping(self, lines):
        """Keep what a method says of its regrouping, if it says anything."""
        if lines:
            state = self.run.method.state_dict()
            processes.check_equal(self.run.accelerator, state, self.run.steps)
        for line in lines:
            place = {"stage": self.stage, "step": self.run.progress.position.step}
            self._write(self.regroup_log, place | line)

    @staticmethod
    def _write(file, line):
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
