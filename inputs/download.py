"""Fetching the files of a suite: each appears under its name whole and with the right checksum."""

import io
from pathlib import Path

import pooch

from inputs.bars import Bar
from inputs.errors import InputError
from inputs.files import atomic_path, sha256_file

LARGEST = 2**26  # bytes; more is not what is asked for


class Bounded(io.FileIO):
    """A file that takes no more than LARGEST bytes."""

    def write(self, part):
        if self.tell() + len(part) > LARGEST:
            raise ValueError(f"larger than {LARGEST:,} bytes")
        return super().write(part)


def download(destination, base_url, manifest, checksum=sha256_file):
    """Fetch every file of `manifest` (relative path -> checksum) that is not yet there and right.

    `checksum(path)` is what the manifest has of a file. A second call goes on where the first was
    stopped. Raises InputError naming the file.
    """
    destination = Path(destination)
    missing = [name for name, known in manifest.items()
               if not (destination / name).is_file() or checksum(destination / name) != known]
    for name in Bar(missing, desc="download", unit="file"):
        try:
            with atomic_path(destination / name) as temporary:
                with Bounded(temporary, "wb") as file:
                    pooch.HTTPDownloader()(base_url + name, file, None)
                found = checksum(temporary)
                if found != manifest[name]:
                    raise ValueError(f"its checksum is {found}, not {manifest[name]}")
        except (OSError, ValueError) as error:  # of requests; ValueError: an odd answer
            raise InputError(f"could not download {base_url + name}: {error}; run the command "
                             "again to go on from here") from None
