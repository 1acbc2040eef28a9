"""Programs that tests start in place of train.py: python programs.py NAME WORDS."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def words(name, *more):
    """The command that runs a function of this file."""
    return [sys.executable, __file__, name, *map(str, more)]


def fail(*_):
    sys.exit(3)


def do_nothing(*_):
    """Exit with status 0, without results."""


def be_killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def finish(_, *flags):
    """Write the results.json of a run with these flags."""
    from harness.arguments import parse_flags, recorded_args  # here, as the others need neither

    args, _ = parse_flags(flags)
    results = {"args": recorded_args(args), "code_sha256": "", "base_sha256": "",
               "config_sha256": "", "variant": "", "precision": "no", "compiler": "no",
               "processes": 1, "global_batch_size": 8, "rows": ["mixed"], "task_order": ["a"],
               "regroupings": [],
               "parameters": dict.fromkeys(("trainable", "stored", "active", "total"), 0),
               "run": {"device": "cpu", "threads": 1, "seconds": {}},
               **{key: {} for key in ("comparable", "settings", "versions", "read_files", "tasks",
                                      "scores", "metrics")}}
    args.output_dir.mkdir(parents=True)
    (args.output_dir / "results.json").write_text(json.dumps(results), encoding="utf-8")


def save_when_stopped(*flags):
    """Hold a run's lock, and take a second to save after a SIGTERM."""
    folder = Path(flags[flags.index("--output_dir") + 1])

    def save(*_):
        time.sleep(1)
        (folder / "saved").touch()
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, save)
    with filelock.FileLock(folder / ".lock"):  # makes the folder
        (folder / "begun").touch()
        time.sleep(60)


def launch(name, *more):
    """Start another of these, and end when a signal comes, passing none on."""
    subprocess.Popen(words(name, *more))
    time.sleep(60)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
