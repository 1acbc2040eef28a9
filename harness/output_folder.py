"""The folder of a run: what is written there, by one run at a time, and what may be deleted."""

import contextlib
import errno
import os
import re
from pathlib import Path

import filelock

from inputs.errors import InputError

LOCK = ".lock"  # there while a run writes, or where one was killed
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what a file system without them says
# What a run writes into its folder, and what --overwrite may delete there.
OUTPUTS = (r"results\.json", r"log\.jsonl", r"regroup\.jsonl", r"figure\.png", r"report\.html",
           r"predictions/\d{2,}_[\w.-]+\.jsonl(\.partial)?",
           r"adapter/([\w.-]+/)?adapter_(model\.safetensors|config\.json)", r"tracking/badit/.+",
           r"checkpoints/\.?\d{6,}(\.\w+\.tmp)?/(tensors\.safetensors|state\.json|SHA256SUMS)",
           # atomic writes that were killed
           r"(.+/)?\.(results\.json|figure\.png|report\.html|\d{2,}_[\w.-]+\.jsonl|adapter_[\w.]+)"
           r"\.\w+\.tmp")
FOLDERS = ("predictions", "adapter", "tracking", "checkpoints")


def check(args):
    """Refuse an --output_dir that is in use, cannot be written, or holds what the run reads."""
    if args.plan:  # which writes nothing
        return
    folder = args.output_dir
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {folder}: {standing} is no folder that can be written to")
    if standing != folder or not any(folder.iterdir()):
        return
    if not (args.overwrite or args.resume):
        raise InputError(f"--output_dir {folder} is not empty: name another, or give --resume to "
                         "go on with the run in it, or --overwrite to replace what this program "
                         "wrote there")
    refuse_obstacles(folder)
    # A run that --resume finds finished deletes nothing.
    for flag in ("adapter", "single_task_results", *(["from_results"] if args.overwrite else ())):
        needed = getattr(args, flag)
        if needed and Path(needed).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--{flag} {needed} lies in --output_dir {folder}, where it could be "
                             "deleted: name another --output_dir")


def refuse_obstacles(folder):
    """Raise InputError for a link, perhaps out of the folder, or what is no file, in the way."""
    for path in places(folder):
        name = path.relative_to(folder).as_posix()
        written = name == LOCK or is_output(name)
        if path.is_symlink() and (name in FOLDERS or written):
            raise InputError(f"{path} is a link: a run writes into its own folder only")
        if written and not path.is_file() and not name.startswith("tracking/"):
            raise InputError(f"{path} is no file: a run writes a file of this name")


def places(folder):
    """Paths where a run may have written: `folder` may hold all else, as / does."""
    if folder.is_dir():
        yield from folder.iterdir()
    for name in FOLDERS:
        yield from (folder / name).rglob("*")


def is_output(name):
    """Whether a path relative to --output_dir is one that a run writes."""
    return any(re.fullmatch(pattern, name) for pattern in OUTPUTS)


def clear(folder, keep=()):
    """Delete the files that this program wrote into `folder` before, but those to `keep`.

    First what would tell of a whole run, as a kill may leave the rest.
    """
    names = [path.relative_to(folder).as_posix() for path in places(folder) if path.is_file()]
    for name in sorted(names, key=lambda name: (
            name != "results.json", not name.startswith("checkpoints/"), name)):
        if is_output(name) and (name.endswith(".tmp") or not name.startswith(keep)):
            (folder / name).unlink()


def check_names(tasks):
    """Raise InputError for a task that bears the name of a file in adapter/."""
    for name in tasks:
        if re.fullmatch(r"adapter_(model\.safetensors|config\.json)", name):
            raise InputError(f"a task cannot be named {name}, as an adapter's file is")


def listing(folder):
    """The names of a run's files in `folder`."""
    names = (path.relative_to(folder).as_posix() for path in places(folder))
    return {name for name in names if is_output(name)}


@contextlib.contextmanager
def reserved(run, there):
    """A context with an --output_dir that no other run enters; held by the main process.

    `there` is the listing at the run's start. Raises InputError where another run is writing, or
    has written since: two would share logs and delete each other's checkpoints.
    """
    folder = run.args.output_dir
    if not run.accelerator.is_main_process:
        yield
        return
    # Held until this process ends or dies: never a lock that is but a file, which a kill leaves.
    lock = filelock.FileLock(folder / LOCK, blocking=False, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"--output_dir {folder}: another run is writing there; let it end, or "
                         "stop it, first") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"--output_dir {folder} cannot be written: {error.strerror}") from None
        run.print(f"--output_dir {folder}: its file system has no locks ({error.strerror}); start "
                  "no second run there")
    try:
        if listing(folder) != there:
            raise InputError(f"--output_dir {folder}: another run has written there since this "
                             "one was started")
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
