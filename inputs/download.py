"""Fetching the files of a suite: each appears under its name whole and with the right checksum."""

from pathlib import Path

import pooch

from inputs.bars import Bar
from inputs.errors import InputError
from inputs.files import sha256_file


def download(destination, base_url, manifest):
    """Fetch every file of `manifest` (relative path -> SHA-256) that is not yet there and right.

    A second call goes on where the first was stopped. Raises InputError naming the file.
    """
    pooch.get_logger().setLevel("ERROR")
    destination = Path(destination)
    missing = [name for name, sha256 in manifest.items()
               if not (destination / name).is_file() or sha256_file(destination / name) != sha256]
    for name in Bar(missing, desc="download", unit="file"):
        path = destination / name
        try:
            pooch.retrieve(base_url + name, known_hash=f"sha256:{manifest[name]}",
                           fname=path.name, path=path.parent)
        except (OSError, ValueError) as error:  # of requests; ValueError: another checksum
            raise InputError(f"could not download {base_url + name}: {error}; run the command "
                             "again to go on from here") from None
