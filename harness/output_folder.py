"""The folder of a run: whether a run may use it, what it holds, and the lock on it."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

import filelock

from inputs.errors import InputError

LOCK = ".lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of file systems without locks
LOGS = ("log.jsonl", "regroup.jsonl")
SIGNS = ("results.json", "log.jsonl", "checkpoints")  # a folder with a run has one of these
# In the order in which they are deleted; report.py --unpack writes items.json.
OUTPUTS = ("results.json", "items.json", "regroup.jsonl", "figure.png", "report.html",
           "predictions", "adapter", "tracking", "checkpoints", "log.jsonl")


def check(args, path_flags):
    """Raise InputError for an --output_dir that is in use, unwritable, or holds an input."""
    folder = args.output_dir
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        raise InputError(f"--output_dir {folder}: {standing} is not a writable folder")
    if standing != folder or not any(folder.iterdir()):
        return
    if not (args.overwrite or args.resume):
        raise InputError(f"--output_dir {folder} is not empty: name another folder, or give "
                         "--resume to continue the run in it, or --overwrite to delete that run")
    if args.overwrite and not (any((folder / name).exists() for name in SIGNS)
                               or any(folder.glob("predictions/*.partial"))):  # an evaluation
        raise InputError(f"--output_dir {folder} is not empty and holds no run that --overwrite "
                         f"could replace: it has none of {', '.join(SIGNS)}")
    for flag in sorted(path_flags):
        path = getattr(args, flag)
        if path and Path(path).exists() and any(
                Path(path).resolve().is_relative_to((folder / name).resolve()) for name in OUTPUTS):
            raise InputError(f"--{flag} {path} is in --output_dir {folder}, where the run could "
                             "delete it: name another --output_dir")


def clear(folder):
    """Delete what a run wrote into `folder`.

    results.json goes first and log.jsonl last: after a kill the rest does not look finished, and
    --overwrite still finds a run.
    """
    for path in (folder / name for name in OUTPUTS):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    delete_temporary(folder)


def delete_temporary(folder):
    """Delete the temporary files and checkpoints that a kill left."""
    for path in folder.rglob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def listing(folder):
    """Return the names and times of change of a run's files in `folder`."""
    return {(str(path), path.stat().st_mtime_ns) for name in OUTPUTS
            for path in (folder / name, *(folder / name).rglob("*")) if path.is_file()}


@contextlib.contextmanager
def reserved(run, files_at_start):
    """A context in which no other run uses this run's --output_dir; the main process locks it.

    Raises InputError where another run is writing, or has written since `files_at_start`.
    """
    folder = run.args.output_dir
    if not run.accelerator.is_main_process:
        yield
        return
    # The system releases the lock when this process ends; a soft lock would survive a kill.
    lock = filelock.FileLock(folder / LOCK, blocking=False, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"--output_dir {folder}: another run is writing there; stop it first, or "
                         "name another folder") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"--output_dir {folder} cannot be written: {error.strerror}") from None
        run.print(f"--output_dir {folder}: its file system has no locks ({error.strerror}); start "
                  "no second run there")
    try:
        if listing(folder) != files_at_start:
            raise InputError(f"--output_dir {folder}: another run has written there since this "
                             "one started")
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
