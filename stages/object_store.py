"""Folders in object stores, through fsspec.

An object is written to local scratch first and put in one request, so it is complete or does not exist. Unfinished work
has a record of each object's digest, so that no shard is downloaded to hash or to check it. Publishing copies within
the store and writes the manifest last, only if there is none: of several publishers, one wins.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO, cast

from filelock import FileLock

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import conditional_write, faults, plain_json, remote_cache
from sstoken.stages.conditional_write import writing
from sstoken.stages.local_disk import CLAIM, MARKS, UNFINISHED, LocalDisk
from sstoken.stages.processes import is_main_process
from sstoken.stages.remote_path import RemotePath, explained, version

_MANIFEST = MARKS[0]
_PARTIAL = ".partial"
_RECORDS = ".records"
"""Folder of unfinished work, with a record of each file in it: its size, SHA-256 and the store's version."""
_DISK = LocalDisk()


class ObjectStore:
    """Any file system of fsspec, with or without folders; see `Storage` for what each method does."""

    def open(self, file: RemotePath) -> BinaryIO:
        return file.open("rb")

    def list(self, folder: RemotePath) -> list[RemotePath]:
        """Leaves out the records."""
        return [file for file in folder.files() if _RECORDS not in file.relative_to(folder).parts]

    def sizes(self, folder: RemotePath, names: Sequence[str]) -> dict[str, int | None]:
        """Takes one listing."""
        there = {
            file.relative_to(folder).as_posix(): int(info["size"]) for file, info in folder.files().items()
        }
        return {name: there.get(name) for name in names}

    @contextmanager
    def put(self, file: RemotePath) -> Iterator[BinaryIO]:
        with tempfile.NamedTemporaryFile(prefix="sstoken-") as scratch:
            try:
                yield cast(BinaryIO, scratch.file)
                scratch.flush()
            except OSError as error:
                if error.errno is not None and error.filename is None:
                    error.filename = scratch.name  # the system does not say which
                raise
            self._upload(Path(scratch.name), file)

    def put_if_absent(self, file: RemotePath, content: bytes) -> bool:
        """Uses If-None-Match where the store has it."""
        faults.point("commit" if file.name in MARKS else "rename", file)
        if not conditional_write.create(file, content):
            return False
        self._note(file, len(content), hashlib.sha256(content).hexdigest())
        return True

    commit = put_if_absent

    @contextmanager
    def put_folder(self, folder: RemotePath) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="sstoken-") as name:
            scratch = Path(name) / folder.name
            scratch.mkdir()
            yield scratch
            self.delete(folder)
            self._put_all(scratch, folder)

    def take(self, local: Path, file: RemotePath) -> None:
        self._upload(local, file)
        local.unlink()

    def make_folder(self, folder: RemotePath) -> None:
        """Does nothing: a folder exists while it has a file."""

    def flush(self, folder: RemotePath) -> None:
        """Does nothing: a store loses no object that it accepted."""

    def delete(self, place: RemotePath) -> None:
        faults.point("delete", place)
        found = place.files()
        marks = [place / mark for mark in MARKS if place / mark in found]
        self._remove([*marks, *([place] if not found and place.is_file() else [])])
        faults.point("delete", place)
        self._remove([file for file in found if file not in marks])
        self._remove_folders(place)
        if (record := _record(place)) is not None:
            self._remove([record])

    def sweep(self, folder: RemotePath, name: str = "") -> None:
        """Does nothing: a killed writer leaves nothing in the store."""

    def workplace(self, place: RemotePath) -> RemotePath:
        if len(place.parts) < 3:
            raise UsageError(f"{place}: name the output folder itself, such as {place / 'tokens'}")
        return place.with_name(place.name + _PARTIAL)

    def publish(self, place: RemotePath) -> None:
        """The workplace keeps everything until the manifest is at `place`.

        Raises:
            SstokenError: another run is publishing there, or was first.
        """
        partial = self.workplace(place)
        text = _read(partial / _MANIFEST)
        if text is None:
            raise SstokenError(f"{place}: another run finished it first; its output stands, not this one's")
        made = plain_json.parse(text)
        claim = _claim(text)
        if not self.put_if_absent(place / CLAIM, claim.encode()) and _read(place / CLAIM) != claim:
            raise SstokenError(f"{place}: another run is publishing there; wait for it, then run this again")
        if _read(place / _MANIFEST) != text:
            complete = self._replace(place, partial, [entry["path"] for entry in made["files"]])
            put = complete and self.put_if_absent(place / _MANIFEST, text.encode())
            if not put and _read(place / _MANIFEST) != text:  # nor did another process put just this
                self._remove([place / CLAIM])
                raise SstokenError(f"{place}: another run was at work there meanwhile; run this again")
        self.delete(partial)
        self._remove([place / CLAIM])

    def _replace(self, place: RemotePath, partial: RemotePath, names: Sequence[str]) -> bool:
        """Copy finished files into the place of what is there, its manifest first; False: one of them is gone."""
        if None in self.sizes(partial, names).values():
            return False
        kept = {*(place / name for name in names), place / CLAIM}
        old = [file for file in place.files() if file not in kept]
        self._remove(sorted(old, key=lambda file: file != place / _MANIFEST))
        faults.point("commit", place)
        filesystem, start = partial.located()
        end = place.located()[1]
        try:
            with explained(place):
                filesystem.copy([f"{start}/{name}" for name in names], [f"{end}/{name}" for name in names])
        except FileNotFoundError:
            return False
        return True

    def recover(self, place: RemotePath) -> None:
        if not self.is_interrupted(place):
            return
        text = _read(self.workplace(place) / _MANIFEST)
        if text is not None and _read(place / CLAIM) == _claim(text):
            self.publish(place)
        else:  # left by a run whose work is published, or gone
            self._remove([place / CLAIM])

    def is_interrupted(self, place: RemotePath) -> bool:
        return (place / CLAIM).is_file()

    def local(self, place: RemotePath) -> Path:
        """Downloads each content once per machine."""
        return remote_cache.fetched(place)

    @contextmanager
    def local_work(self, folder: RemotePath) -> Iterator[Path]:
        """Restores what the run kept in the store, and removes everything else."""
        made_by = _read(folder / MARKS[1]) or ""
        scratch = remote_cache.workshop(folder, made_by)
        with FileLock(scratch.parent / ".lock"):
            there = {scratch / file.relative_to(folder).as_posix(): file for file in self.list(folder)}
            for path in _files(scratch) if is_main_process() else ():
                if path not in there or self.digest(there[path])[1] != _DISK.digest(path)[1]:
                    path.unlink()
            for path, file in there.items():
                if not path.exists():
                    remote_cache.fetch(file, path)
        yield scratch
        if is_main_process():
            self.keep_work(scratch, folder)
            shutil.rmtree(scratch)

    def keep_work(self, scratch: Path, folder: RemotePath) -> None:
        """Puts files in the order in which they were written, so an index follows what it names."""
        self._put_all(scratch, folder)
        self._remove(
            [file for file in self.list(folder) if not (scratch / file.relative_to(folder)).exists()]
        )

    def on_this_machine(self, place: RemotePath) -> Path:
        return remote_cache.own_place(place)

    def vouches_for(self, file: RemotePath) -> bool:
        return self._noted(file) is not None

    def digest(self, file: RemotePath) -> tuple[int, str]:
        """Takes it from the file's record if that is current, else downloads the file."""
        noted = self._noted(file)
        if noted is not None:
            return noted["bytes"], noted["sha256"]
        with file.open() as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()  # type: ignore[arg-type]  # has `readinto`
            return opened.seek(0, 2), digest

    def _upload(self, local: Path, file: RemotePath) -> None:
        size, digest = local.stat().st_size, _DISK.digest(local)[1]
        filesystem, key = file.located()
        faults.point("commit" if file.name in MARKS else "rename", file)
        with writing(file):
            filesystem.put_file(str(local), key)
        self._note(file, size, digest)

    def _put_all(self, scratch: Path, folder: RemotePath) -> None:
        for path in _files(scratch):
            file = folder / path.relative_to(scratch).as_posix()
            noted = self._noted(file)
            if noted is None or noted["sha256"] != _DISK.digest(path)[1]:
                self._upload(path, file)

    def _note(self, file: RemotePath, size: int, digest: str) -> None:
        """Check the size that the store reports; record files of unfinished work."""
        info = file.info()
        if info is None or info["size"] != size:
            raise SstokenError(
                f"{file}: {size} bytes were put, and the store has {info and info['size']}; try again"
            )
        if (record := _record(file)) is not None:
            noted = {"bytes": size, "sha256": digest, "version": version(info)}
            filesystem, key = record.located()
            with writing(record):
                filesystem.pipe_file(key, json.dumps(noted).encode())

    def _noted(self, file: RemotePath) -> dict[str, Any] | None:
        """Return a file's record; None if there is none, or it is of an earlier version of the file."""
        record = _record(file)
        text = None if record is None else _read(record)
        info = None if text is None else file.info()
        if text is None or info is None:
            return None
        try:
            noted = plain_json.parse_object(text)
        except ValueError:
            return None
        return noted if noted.get("version") == version(info) else None

    def _remove(self, files: Sequence[RemotePath]) -> None:
        for file in files[:1]:  # on its own: a mark goes before the rest
            conditional_write.remove(file)
        if files[1:]:
            filesystem, _ = files[1].located()
            keys = [file.located()[1] for file in files[1:]]
            if filesystem.async_impl and not any(map(has_magic, keys)):  # `rm` reads a key as a pattern
                with suppress(FileNotFoundError), explained(files[1]):
                    filesystem.rm(keys)
            else:
                for file in files[1:]:
                    conditional_write.remove(file)

    def _remove_folders(self, place: RemotePath) -> None:
        """Delete the empty folders that are left where a file system has folders."""
        if not place.is_dir():
            return
        filesystem, key = place.located()
        with explained(place):
            below = filesystem.find(key, withdirs=True)
            for folder in sorted({key, *below}, key=len, reverse=True):  # the deepest first
                with suppress(FileNotFoundError, FileExistsError):
                    filesystem.rmdir(folder)


def _read(file: RemotePath) -> str | None:
    try:
        return file.read_text()
    except FileNotFoundError:
        return None


def _record(file: RemotePath) -> RemotePath | None:
    """Return the path of a file's record; None if the file is not part of unfinished work."""
    for folder in file.parents:
        if folder.name.endswith(_PARTIAL):
            return folder / _RECORDS / f"{file.relative_to(folder).as_posix()}.json"
    return None


def _files(folder: Path) -> Sequence[Path]:
    """Return the files below a folder, in the order in which they were written."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(UNFINISHED)]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path))


def _claim(manifest: str) -> str:
    return hashlib.sha256(manifest.encode()).hexdigest()
