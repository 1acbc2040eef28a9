"""Files that are whole or absent, checksums, the cache folder, seeds from names, and signals."""

import contextlib
import errno
import hashlib
import io
import json
import os
import signal
import stat
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch

LARGEST_TEXT = 2**30  # bytes
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ECHO = 3  # seconds


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success rename it over `path`, both on the disk.

    An exception, a full disk, a kill or a power failure leaves whatever was at `path` before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(temporary)
        # mkstemp makes files private to the user; give them the mode an ordinary open() would.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def fsync(path):
    """Return when the file `path`, or the names in the folder `path`, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, value):
    """Write `value` as sorted, indented JSON, atomically. Raises ValueError on NaN or infinity."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_tensors(path, tensors):
    """Write {name: tensor} as safetensors, in place. Raises OSError where that fails."""
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    try:
        # One metadata key only: safetensors writes several in random order.
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


def open_file(path):
    """`path` opened for reading bytes. Raises OSError for a pipe or a device: it might not end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(handle, "rb")


def read_text(path):
    """The UTF-8 text of a file. Raises OSError, also for what is no file or far too large."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_TEXT:
            raise OSError(errno.EINVAL, f"larger than {LARGEST_TEXT:,} bytes", str(path))
        return file.read().decode("utf-8")


def read_json_lines(path):
    """The values of a JSON-lines file. Raises OSError or ValueError."""
    lines = read_text(path).split("\n")  # not splitlines: texts hold other line breaks
    return [json.loads(line) for line in (lines[:-1] if lines[-1] == "" else lines)]


def sha256_file(path):
    """SHA-256 of a file's bytes, as lower-case hexadecimal digits."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def print_anything():
    """Let no run end at what it prints: an odd name is escaped, a closed stream is no other file.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # else a log would take its place
        pass
    os.close(handle)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def cache_dir():
    """The folder for converted models, downloads and tokenised data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "badit"


def stable_seed(*parts):
    """A 63-bit seed from strings and numbers, equal on every machine and in every process."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class StopSignals:
    """A context in which SIGTERM, SIGHUP and Ctrl-C ask to stop: at once or, if `deferred`, later.

    A deferred signal is found in `received`. Another stops at once, by KeyboardInterrupt, unless it
    comes within ECHO seconds: launchers pass on what their processes have got themselves.
    """

    def __init__(self):
        self.received, self.since, self.deferred = None, None, False

    def __enter__(self):
        self.before = receive_stops(self._receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number):
        """Take a signal, of this process or another one of the run, as received now."""
        self.received, self.since = signal.Signals(number), time.monotonic()

    def _receive(self, number, frame):
        again = self.received is not None
        if again and time.monotonic() - self.since < ECHO:
            return
        self.note(number)
        if number == signal.SIGHUP:
            leave_terminal()
        if again or not self.deferred:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):  # not print: the signal may come in the middle of one
            os.write(2, f"\n{self.received.name}: stopping at the next checkpoint; another, after "
                        f"{ECHO} seconds, stops at once\n".encode())


def receive_stops(handler):
    """Let `handler` receive what asks to stop -> the handlers before, by signal."""
    return {number: signal.signal(number, handler) for number in STOPPING
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}  # by nohup


def leave_terminal():
    """Throw away what would be printed: the terminal, and what reads a pipe there, have gone."""
    with open(os.devnull, "w") as null:
        for stream in (1, 2):
            if not stat.S_ISREG(os.fstat(stream).st_mode):
                os.dup2(null.fileno(), stream)
