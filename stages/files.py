"""Atomic writes: a file is complete or not there, also after a kill or a power cut."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".tmp"
"""Suffix of a file being written; the runner removes those that a killed run left."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which takes its name when the context ends well.

    Until then its name is its own: a process left over from an earlier attempt cannot move it half-written.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a write, the system does not say where
            error.filename = str(path)
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise
    os.replace(temporary, path)


def write_atomic(path: Path, text: str) -> None:
    """Write or replace a text file (UTF-8) in one step."""
    with atomic_file(path) as file:
        file.write(text.encode())


def flush_to_disk(folder: Path) -> None:
    """Make the files directly in `folder` survive a power cut."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
