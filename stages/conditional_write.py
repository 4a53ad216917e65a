"""Conditional writes to object stores (If-None-Match, If-Match): of several writers, one wins."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sstoken.errors import SstokenError
from sstoken.stages.remote_path import S3, RemotePath, explained, version

_TRIES = 5
"""Attempts at a write that conflicts with another one of the same object; S3 asks for a repetition."""


@contextmanager
def writing(file: RemotePath) -> Iterator[None]:
    """Turn what libraries raise while a file is put into one line."""
    with explained(file):
        try:
            yield
        except FileNotFoundError as error:
            raise SstokenError(
                f"{file}: no such bucket or repository; make it first, or name another"
            ) from error


def create(file: RemotePath, content: bytes) -> bool:
    """Write a small file unless there is one; return whether it was written.

    Where the store has no conditional write, there is a moment between look and write.
    """
    filesystem, key = file.located()
    try:
        return _tried(lambda: filesystem.pipe_file(key, content, mode="create"), file)
    except SstokenError as error:
        if not _is_not_implemented(error.__cause__):
            raise
        if file.exists():
            return False
        with writing(file):
            filesystem.pipe_file(key, content)
        return True


def version_of(file: RemotePath) -> str | None:
    """Return what `replace` compares; None where there is no file."""
    info = file.info()
    if info is None:
        return None
    return str(info["ETag"]) if file.scheme in S3 else version(info)


def replace(file: RemotePath, content: bytes, expected: str) -> bool:
    """Write over a small file if it is still of that version; return whether it was written.

    Only S3 compares and writes in one step; elsewhere there is a moment between.
    """
    filesystem, key = file.located()
    if file.scheme in S3:
        return _tried(lambda: filesystem.pipe_file(key, content, IfMatch=expected), file)
    if version_of(file) != expected:
        return False
    with writing(file):
        filesystem.pipe_file(key, content)
    return True


def remove(file: RemotePath) -> None:
    """Delete a file, if it is there."""
    filesystem, key = file.located()
    with suppress(FileNotFoundError), explained(file):
        filesystem.rm_file(key)


def _tried(write: Callable[[], Any], file: RemotePath) -> bool:
    for left in reversed(range(_TRIES)):
        try:
            with writing(file):
                write()
            return True
        except FileExistsError:
            return False
        except SstokenError as error:
            said = f"{error.__cause__!r} {getattr(error.__cause__, '__cause__', None)!r}"
            if "PreconditionFailed" in said or "NoSuchKey" in said:
                return False
            if "ConditionalRequestConflict" not in said or not left:
                raise
    raise AssertionError


def _is_not_implemented(error: BaseException | None) -> bool:
    """Whether a store, or fsspec for it, has no conditional write."""
    # fsspec's file systems that do not know the mode, or the keyword, raise one of these
    return isinstance(error, NotImplementedError | ValueError | TypeError) or "NotImplemented" in str(error)
