"""Stream raw rows from files, folders and the Hub, in constant memory.

`data` may name a JSONL, JSON, Parquet or CSV file (local or at any fsspec URL such as `s3://`, compressed or not), a
pattern of such files, a folder written by `datasets.save_to_disk`, or a dataset on the Hub as `user/name`,
`user/name@revision` or `user/name:config@revision`. `split` names a split of a Hub dataset (default `train`) or of a
saved DatasetDict.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from sstoken.errors import SstokenError, UsageError, did_you_mean, first_line
from sstoken.stages import plain_json
from sstoken.stages.encoding import row_files
from sstoken.stages.encoding.archives import COMPRESSED, is_tar, is_zip, opened
from sstoken.stages.encoding.arrow_rows import Converted, rows_of
from sstoken.stages.encoding.messages import BadRow
from sstoken.stages.hub_models import REMEDY
from sstoken.stages.remote_path import options
from sstoken.stages.storage import expanded

T = TypeVar("T")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Row:
    """One row of a source: `value`, or `problem` if it does not parse."""

    file: str
    """The file's label: its name without extension, longer only if two files share that name."""
    index: int
    """Its position in the file, from 0."""
    where: str
    """Its place as shown to the user: `data.jsonl line 12`."""
    value: Any = None
    problem: tuple[str, str] | None = None
    """For a row that does not parse: a short stable reason, and the detail."""
    notes: tuple[str, ...] = ()
    """What reading it changed; short and stable, for counting."""

    def checked(self) -> Any:
        """Return the value; raise BadRow if it does not parse."""
        if self.problem is not None:
            raise BadRow(*self.problem)
        return self.value

    def parsed(self) -> "Row":
        """Return the row with its value parsed, if that is still a line of JSON."""
        if not isinstance(self.value, bytes):
            return self
        value, problem = row_files.json_value(self.value)
        return replace(self, value=value, problem=problem)


@dataclass(frozen=True)
class File:
    """A file that every process can open."""

    filesystem: Any
    path: str
    name: str
    """As shown to the user: without the secrets of a signed URL."""
    label: str
    """See `Row.file`."""

    def open(self) -> Any:
        """Open it for reading bytes."""
        return remote(lambda path: self.filesystem.open(path, "rb"), self.path, self.name)

    def identity(self, digest: Callable[[Path], str]) -> str:
        """Return the hash of a local file, or the checksum of a remote one."""
        if is_local(self.filesystem):
            return digest(Path(self.path))
        return str(remote(self.filesystem.checksum, self.path, self.name))


@dataclass(frozen=True)
class Saved:
    """A folder written by `datasets.save_to_disk`; the split of a DatasetDict is already resolved."""

    folder: Path


@dataclass(frozen=True)
class Hub:
    """A dataset on the Hub."""

    name: str
    config: str | None
    revision: str | None


def open_rows(data: str, split: str | None = None) -> Iterator[Row]:
    """Stream the rows of `data` in order. A line that does not parse is a row with a `problem`.

    Raises:
        UsageError: as `locate`.
        SstokenError: an empty source, a damaged file, or a Hub that does not answer.
    """
    source = locate(data, split)
    rows: Iterator[Row]
    if isinstance(source, list):
        rows = chain.from_iterable(file_rows(file, parse=True) for file in source)
    else:
        rows = _dataset_rows(source, split)
    yield from some(rows, data)


def some(items: Iterator[T], data: str) -> Iterator[T]:
    """Yield the items; refuse `data` if there are none."""
    first = next(items, None)
    if first is None:
        raise SstokenError(f"{shown(data)}: no rows in it; name data that has some")
    yield first
    yield from items


def data_identity(data: str, split: str | None, digest: Callable[[Path], str]) -> dict[str, Any]:
    """Return what identifies the rows: hashes of local files, checksums of remote ones, or the Hub commit."""
    source = locate(data, split)
    if isinstance(source, Saved):
        files = sorted(p for p in source.folder.rglob("*") if p.is_file())
        return {
            "folder": source.folder.name,  # part of the example ids
            "files": {p.relative_to(source.folder).as_posix(): digest(p) for p in files},
        }
    if isinstance(source, Hub):
        return {"hub": source.name, "config": source.config, "commit": _hub_commit(source)}
    return {"files": {file.label: file.identity(digest) for file in source}}


def shown(data: str) -> str:
    """Return `data` for messages: a URL without its query and user part, which may hold keys."""
    if "://" not in data:
        return data
    scheme, rest = data.split("://", 1)
    host, slash, path = rest.partition("/")
    path = path.partition("?")[0] if scheme in ("http", "https") else path
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def file_labels(paths: list[str]) -> list[str]:
    """Return a short unique name for each file: its stem, or its path below the common folder."""
    stems = [PurePosixPath(_without_compression(path)).stem for path in paths]
    count = Counter(stems)
    folders = [PurePosixPath(path).parent.parts for path in paths]
    common = 0
    while all(len(f) > common for f in folders) and len({f[common] for f in folders}) == 1:
        common += 1
    return [
        stem if count[stem] == 1 else "/".join((*folder[common:], PurePosixPath(shown(path)).name))
        for stem, folder, path in zip(stems, folders, paths, strict=True)
    ]


def locate(data: str, split: str | None = None) -> list[File] | Saved | Hub:
    """Decide what `data` names, without reading rows or contacting the Hub.

    Raises:
        UsageError: nothing there, a plain folder, a pattern without matches, an unknown extension, or a split
            that does not exist.
    """
    if "://" in data:
        return _no_split(_locate_files(data), split)
    path = expanded(data)
    if path.is_dir():
        return _locate_saved(path, split)
    if path.exists() or any(c in data for c in "*?["):
        return _no_split(_locate_files(str(path)), split)
    hub = _HUB_ID.fullmatch(data)
    is_file_name = row_files.kind(data) is not None or is_zip(data) or is_tar(data)
    if hub is None or data.startswith(".") or is_file_name:
        near = did_you_mean(path.name, (other.name for other in path.parent.glob("*")))
        raise UsageError(
            f"data {data!r}: no such file; name a file, a pattern such as 'dir/*.jsonl', a folder written by "
            f"save_to_disk, or a Hub dataset user/name{near}"
        )
    return Hub(hub["name"], hub["config"], hub["revision"])


def _no_split(files: list[File], split: str | None) -> list[File]:
    if split is not None:
        raise UsageError(
            f"split {split!r}: plain files have no splits; name the split's file, or leave split out"
        )
    return files


def _locate_saved(folder: Path, split: str | None) -> Saved:
    if (folder / "dataset_dict.json").is_file():
        try:
            names = list(plain_json.parse((folder / "dataset_dict.json").read_bytes())["splits"])
        except (ValueError, KeyError, TypeError) as error:
            raise SstokenError(
                f"{folder / 'dataset_dict.json'}: damaged ({type(error).__name__}); save the dataset again"
            ) from error
        if split not in names:
            raise UsageError(
                f"data {str(folder)!r}: split {split!r} is not one of {', '.join(names)}; set --split"
            )
        return Saved(folder / str(split))
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        if split is not None:
            raise UsageError(f"split {split!r}: {folder} holds one dataset without splits; leave split out")
        return Saved(folder)
    if (folder / "config.json").is_file() or (folder / "tokenizer.json").is_file():
        raise UsageError(
            f"data {str(folder)!r}: a model's folder; name the dataset here, and the model with --model"
        )
    raise UsageError(
        f"data {str(folder)!r}: a folder; name a file in it or a pattern such as '{folder}/*.jsonl'"
    )


def _locate_files(data: str) -> list[File]:
    import fsspec

    try:
        scheme = data.partition("://")[0]
        filesystem, path = fsspec.core.url_to_fs(data, **(options(scheme) if scheme in ("s3", "s3a") else {}))
    except (ValueError, ImportError) as error:
        raise UsageError(f"data {shown(data)!r}: cannot be opened ({first_line(error)})") from error
    literal = is_local(filesystem) and Path(path).is_file()
    if any(c in path for c in "*?[") and not literal:
        found = remote(filesystem.glob, path, shown(data)) if "://" in data else row_files.matches(data)
        paths = sorted(filter(row_files.is_visible, found))
        if not paths:
            raise UsageError(f"data {shown(data)!r}: no file matches the pattern; name files that are there")
    elif literal or remote(filesystem.info, path, shown(data))["type"] == "file":
        paths = [path]
    else:
        raise UsageError(f"data {shown(data)!r}: no such file")
    for each in map(shown, paths):
        if is_tar(each):
            raise UsageError(
                f"data {each!r}: a tar archive; extract it and name the files that hold rows, such as 'dir/*.jsonl'"
            )
        if row_files.kind(each) is None and not is_zip(each):
            suffix = PurePosixPath(_without_compression(each)).suffix or "none"
            raise UsageError(
                f"data {each!r}: extension {suffix} is not one of {', '.join(row_files.EXTENSIONS)} "
                f"(each also with {', '.join(COMPRESSED)}); {_conversion(suffix)}"
            )
    prefix = "" if is_local(filesystem) else data.partition("://")[0] + "://"
    names = [shown(p) if "://" in p else prefix + p for p in paths]
    labels = file_labels(names)
    return [File(filesystem, *each) for each in zip(paths, names, labels, strict=True)]


def _conversion(suffix: str) -> str:
    """Return how to make rows from a file of another kind."""
    if suffix in (".xlsx", ".xls", ".ods"):
        return "save the sheet as .csv"
    if suffix in (".tsv", ".tab"):
        return "save it with commas as .csv"
    return "convert it, for example to JSON lines: one object with the row's columns a line"


def file_rows(file: File, *, parse: bool) -> Iterator[Row]:
    """Stream the rows of a file; without `parse`, lines of JSON stay bytes (see `Row.parsed`)."""
    index = 0
    with file.open() as raw, row_files.reading(file.name):
        for name, stream in opened(raw, file.name):
            for row in row_files.read(stream, name, parse=parse):
                yield Row(file.label, index, f"{name} {row.where}", row.value, row.problem, row.notes)
                index += 1


def _dataset_rows(source: Saved | Hub, split: str | None) -> Iterator[Row]:
    from huggingface_hub import constants

    if isinstance(source, Hub) and not constants.HF_HUB_OFFLINE:
        _hub_commit(source)  # asks once, where `datasets` would ask again and again
    with naming_dataset(source) as (name, label):
        parsed = chain.from_iterable(map(rows_of, dataset_tables(source, split)))
        yield from numbered(parsed, name, label)


def numbered(parsed: Iterable[Converted], name: str, label: str, first: int = 0) -> Iterator[Row]:
    """Number the rows of a table from `first`."""
    for index, (value, problem, notes) in enumerate(parsed, first):
        yield Row(label, index, f"{name} row {index}", value, problem, notes)


def dataset_tables(source: Saved | Hub, split: str | None) -> Iterator[Any]:
    """Yield the rows of a dataset as Arrow tables of `row_files.BATCH_ROWS` rows."""
    import datasets

    if isinstance(source, Saved):
        dataset = datasets.load_from_disk(str(source.folder))
    else:
        dataset = datasets.load_dataset(
            source.name, source.config, split=split or "train", revision=source.revision, streaming=True
        )
    yield from dataset.with_format("arrow").iter(batch_size=row_files.BATCH_ROWS)


@contextmanager
def naming_dataset(source: Saved | Hub) -> Iterator[tuple[str, str]]:
    """Yield a dataset's name and its label for example ids; turn any failure into a one-line error."""
    if isinstance(source, Saved):
        name, label, what = str(source.folder), source.folder.name, "damaged dataset folder"
    else:
        name, label = source.name, source.name.rpartition("/")[2]
        what = "no such file, and the Hub gives no such dataset"
    try:
        yield name, label
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow raise many types
        raise SstokenError(f"{name}: {what} ({first_line(error)})") from error


def _hub_commit(source: Hub) -> str:
    from huggingface_hub import dataset_info

    try:
        return str(dataset_info(source.name, revision=source.revision).sha)
    except Exception as error:  # offline, missing or private: the remedy is the same
        raise SstokenError(
            f"data {source.name!r}: no such file, and the Hub does not answer for it ({first_line(error)}); {REMEDY}"
        ) from error


def remote(ask: Callable[[str], Any], path: str, name: str) -> Any:
    """Call a filesystem, and turn any failure into a one-line error."""
    try:
        return ask(path)
    except FileNotFoundError as error:
        raise UsageError(f"data {name!r}: no such file there; download it, or check the address") from error
    except Exception as error:  # each filesystem raises its own types
        raise SstokenError(f"{name}: cannot be read ({first_line(error)})") from error


def is_local(filesystem: Any) -> bool:
    """Return whether a file system is this machine's own."""
    protocol = filesystem.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def _without_compression(path: str) -> str:
    return path[: -len(PurePosixPath(path).suffix)] if PurePosixPath(path).suffix in COMPRESSED else path
