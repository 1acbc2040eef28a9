"""Write files and folders atomically, read files, compute checksums, and find the cache folder."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from inputs.errors import InputError


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success, fsync it and rename it to `path`.

    After an exception, a full disk, a kill or a power failure, `path` is as it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(temporary)
        make_ordinary(temporary)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def check_free(path, flag):
    """Raise InputError unless `path` is a new or an empty folder, other than the current one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir()) or path.samefile(".")):
        raise InputError(f"--{flag} {path} is in use: name a new folder, or an empty one")


@contextlib.contextmanager
def atomic_folder(path):
    """Yield a new folder beside `path`; on success, fsync it and rename it to `path`.

    An error, a full disk or a kill leaves no folder `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.",
                                     suffix=".tmp") as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        yield folder
        for file in folder.iterdir():
            if file.is_file():
                make_ordinary(file)
                fsync(file)
        fsync(folder)
        os.rename(folder, path)
        fsync(path.parent)


def make_ordinary(path):
    """Give a file the mode of an ordinary open(); mkstemp and safetensors make it private."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def fsync(path):
    """Flush the file `path`, or the names in the folder `path`, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, value):
    """Write `value` as sorted, indented JSON, atomically. Raises ValueError on NaN or infinity."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def write_text(path, text):
    """Write a text as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path):
    """Return the UTF-8 text of a file, without a byte order mark and with its line ends."""
    return Path(path).read_bytes().decode("utf-8-sig")


def sha256_file(path):
    """Return the SHA-256 of a file in lower-case hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_file(path):
    """Return git's id of a file's content: SHA-1 of its length and bytes."""
    with open(path, "rb") as file:
        start = b"blob %d\0" % os.fstat(file.fileno()).st_size
        return hashlib.file_digest(file, lambda: hashlib.sha1(start)).hexdigest()


def cache_dir():
    """Return the folder for converted models and downloads. Raises InputError without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "badit"
    except RuntimeError:  # no such user is known here
        raise InputError(f"the user {os.getuid()} has no home folder: set HOME, or XDG_CACHE_HOME"
                         ) from None
