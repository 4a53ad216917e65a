"""Compressed files and zip archives as streams of uncompressed bytes."""

import io
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import PurePosixPath
from typing import Any

from sstoken.errors import SstokenError
from sstoken.stages.encoding import row_files

COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_MODULES = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
_TAR = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz|tzst)$")


def is_tar(path: str) -> bool:
    """Return whether a name ends like a tar archive's."""
    return _TAR.search(path.lower()) is not None


def is_zip(path: str) -> bool:
    """Return whether a name ends like a zip archive's."""
    return path.lower().endswith(".zip")


def opened(raw: Any, name: str) -> Iterator[tuple[str, io.BufferedReader]]:
    """Yield name and bytes of the data files in one file, by its extensions.

    These are the file itself, decompressed, or every member of a zip archive in order.

    Raises:
        SstokenError: this Python lacks the codec, or a member of the archive is not a data file.
    """
    if is_zip(name):
        yield from _members(raw, name)
    else:
        yield name, _decompressed(raw, name)


def _decompressed(raw: Any, name: str) -> io.BufferedReader:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa  # bundles zstd

        if not pa.Codec.is_available("zstd"):
            raise SstokenError(
                f"{name}: this pyarrow was built without zstd; decompress the file with zstd -d"
            )
        raw = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    elif suffix in _MODULES:
        try:
            raw = import_module(_MODULES[suffix]).open(raw, "rb")
        except ImportError as error:
            raise SstokenError(
                f"{name}: this Python was built without {_MODULES[suffix]}; decompress the file first"
            ) from error
    return io.BufferedReader(raw, buffer_size=1 << 20)


def _members(raw: Any, name: str) -> Iterator[tuple[str, io.BufferedReader]]:
    import zipfile

    with zipfile.ZipFile(raw) as archive:
        members = [m for m in archive.infolist() if not m.is_dir() and _is_visible(m.filename)]
        names = [m.filename for m in members]
        outer = row_files.kind(name)
        if len(names) == 1 and row_files.kind(names[0]) is None and outer is not None:
            names[0] += f".{outer}"  # take the format from the archive's name
        for member, inner in zip(members, names, strict=True):
            if row_files.kind(inner) is None or is_zip(inner):
                raise SstokenError(
                    f"{name}: holds {member.filename}, which is not one of {', '.join(row_files.EXTENSIONS)}; extract "
                    "the archive and name the files that hold rows"
                )
        for member, inner in zip(members, names, strict=True):
            try:
                stream = archive.open(member)
            except (RuntimeError, NotImplementedError) as error:
                raise SstokenError(
                    f"{name}: {member.filename} cannot be read ({error}); extract it"
                ) from error
            with stream:
                yield f"{name}: {inner}", _decompressed(stream, inner)


def _is_visible(path: str) -> bool:
    return all(row_files.is_visible(part) for part in PurePosixPath(path).parts)
