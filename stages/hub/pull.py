"""Fetch a published masked dataset into a folder, and check everything in it against its provenance.

The checks prove that the files are complete and belong together. Only the repository vouches for the publisher: give
a commit as the revision if that matters.
"""

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sstoken.errors import SstokenError
from sstoken.labels import labels_from_mask
from sstoken.stages import storage, tables
from sstoken.stages.checkpoints import load_tokenizer, tokenizer_fingerprint
from sstoken.stages.folders import hash_file
from sstoken.stages.hub.provenance import PROVENANCE, SHARDS, SIGNALS, TOKENIZER, Provenance, read_provenance
from sstoken.stages.hub.remote import asking, connect, tree
from sstoken.stages.manifest import FileEntry
from sstoken.stages.masked_card import write_card
from sstoken.stages.masked_stats import merge_stats
from sstoken.stages.stage import Context, Stage

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

_SHARD = re.compile(rf"{SHARDS}/part-\d{{5,}}\.parquet")
_DOWNLOADS = ".download"
_LARGEST_PROVENANCE = 100_000_000
_CONNECTIONS = 8


class Pull(Stage):
    """Writes a masked folder like that of `select`."""

    name: ClassVar[str] = "pull"
    folder: ClassVar[str] = "masked"

    repo: str
    """The dataset's name on the Hub: user/name."""
    commit: str
    """The commit to pull."""

    def run(self, context: Context) -> dict[str, Any]:
        """Download what is missing, check it, and arrange it as a masked folder."""
        out = context.out
        provenance = self._provenance(out / _DOWNLOADS)
        files = [f for f in provenance.files if f.path.startswith((SHARDS + "/", TOKENIZER + "/"))]
        with context.progress("files", len(files)) as progress:
            for file, downloaded in self._downloaded(out, files):
                place = out / (PurePosixPath(file.path).name if _SHARD.fullmatch(file.path) else file.path)
                if downloaded is not None:
                    storage.of(out).take(downloaded, place)
                progress.advance()
        self._check_shards(out, provenance)
        self._check_tokenizer(out, provenance)
        storage.of(out).take(out / _DOWNLOADS / PROVENANCE, out / PROVENANCE)
        storage.of(out).delete(out / _DOWNLOADS)
        write_card(out, provenance.masked, provenance.metrics, identity=f"{self.repo} at {self.commit}")
        return provenance.metrics

    def _provenance(self, downloads: Path) -> Provenance:
        with asking(self.repo):
            there = tree(connect(), self.repo, self.commit)
        entry = there.get(PROVENANCE)
        if entry is None or entry.size > _LARGEST_PROVENANCE:
            raise SstokenError(f"{self.repo}: not a dataset that `publish` wrote (no {PROVENANCE} in it)")
        provenance = read_provenance(self._download(PROVENANCE, downloads))
        listed = {file.path: file for file in provenance.files}
        if len(listed) < len(provenance.files):
            raise self._tampered(PROVENANCE, "names a file twice")
        if not any(_SHARD.fullmatch(path) for path in listed):
            raise self._tampered(PROVENANCE, "names no shard")
        for path in listed:
            if not _is_safe(path):
                raise self._tampered(PROVENANCE, f"names a file {path!r} that no publication has")
        for path in sorted(set(there) | set(listed)):
            self._check_listed(path, there.get(path), listed.get(path))
        return provenance

    def _check_listed(self, path: str, there: "RepoFile | None", listed: FileEntry | None) -> None:
        if path.partition("/")[0] not in (SHARDS, TOKENIZER):
            return
        if listed is None:
            raise self._tampered(path, f"exists, but {PROVENANCE} does not list it")
        if there is None:
            raise self._tampered(path, "is missing")
        if there.size != listed.bytes or (there.lfs is not None and there.lfs.sha256 != listed.sha256):
            raise self._tampered(path, f"is not what {PROVENANCE} says (size or checksum differs)")

    def _downloaded(self, out: Path, files: list[FileEntry]) -> Iterator[tuple[FileEntry, Path | None]]:
        """Yield each file with the path of its checked download; None if an interrupted run put it in place."""

        def fetch(file: FileEntry) -> tuple[FileEntry, Path | None]:
            in_place = out / PurePosixPath(file.path).name
            if _SHARD.fullmatch(file.path) and in_place.is_file() and hash_file(in_place) == file.sha256:
                return file, None
            path = self._download(file.path, out / _DOWNLOADS)
            if hash_file(path) != file.sha256:
                path.unlink()
                raise self._tampered(file.path, f"is not what {PROVENANCE} says (checksum differs)")
            return file, path

        pool = ThreadPoolExecutor(_CONNECTIONS)
        try:
            yield from pool.map(fetch, files)
        finally:
            pool.shutdown(cancel_futures=True)

    def _download(self, path: str, downloads: Path) -> Path:
        with asking(self.repo):
            place = connect().hf_hub_download(
                self.repo, path, repo_type="dataset", revision=self.commit, local_dir=downloads
            )
        return Path(place)

    def _check_shards(self, out: Path, provenance: Provenance) -> None:
        """Refuse shards of another run, contradictory masks, and counts that do not add up."""
        stats = []
        for path in tables.parts(out):
            try:
                metadata = tables.read_metadata(path)
                stats.append(metadata.pop("stats"))
                same = metadata == provenance.masked
                problem = _contradiction(path, stats[-1]) if same else f"was not made as {PROVENANCE} says"
            except (KeyError, TypeError, ValueError) as error:
                problem = f"has damaged metadata ({type(error).__name__})"
            if problem:
                raise self._tampered(f"{SHARDS}/{path.name}", problem)
        try:
            counted = merge_stats(stats)
        except (KeyError, TypeError, ValueError):
            counted = {}
        if counted != provenance.metrics:
            raise self._tampered(PROVENANCE, "counts other tokens than the shards hold")

    def _check_tokenizer(self, out: Path, provenance: Provenance) -> None:
        tokenizer = load_tokenizer(str(out / TOKENIZER))
        if tokenizer_fingerprint(tokenizer) != provenance.masked["tokenizer"]["fingerprint"]:
            raise self._tampered(TOKENIZER, "is not the one that made the tokens")

    def _tampered(self, path: str, problem: str) -> SstokenError:
        return SstokenError(
            f"{self.repo} at {self.commit[:12]}: {path} {problem}; it was changed since it was published, pull another "
            "--revision"
        )


def _is_safe(path: str) -> bool:
    """Return whether a listed file may be written: it is one of ours, and its path stays inside the folder."""
    parts = path.split("/")
    if any(not part or part.startswith(".") or "\\" in part or "\0" in part for part in parts):
        return False
    return len(parts) == 1 or parts[0] == TOKENIZER or _SHARD.fullmatch(path) is not None


def _contradiction(path: Path, stats: Mapping[str, Any]) -> str | None:
    """Return what is wrong within a shard: its columns, masks or counts."""
    schema = pq.read_schema(path).remove_metadata()
    unscored = pa.schema([field for field in tables.MASKED if field.name not in SIGNALS])
    plain = (tables.MASKED, tables.MASKED_LEAN, unscored)
    allowed = [*plain, *(each.append(tables.WEIGHT) for each in plain)]
    if not any(schema.equals(each) for each in allowed):
        return f"has columns that no masked dataset has ({', '.join(schema.names)})"
    names = [name for name in ("input_ids", "labels", "keep_mask", "response_mask") if name in schema.names]
    table = tables.read_table(path, names)
    columns = {name: tables.flatten(table[name]) for name in names}
    ids, offsets = columns["input_ids"]
    if any(not np.array_equal(other, offsets) for _, other in columns.values()):
        return "has lists of unequal lengths in a row"
    keep = columns["keep_mask"][0].astype(bool)
    if not np.array_equal(columns["labels"][0], labels_from_mask(ids, keep)):
        return "has labels that contradict its keep mask"
    if "response_mask" in columns and (keep & ~columns["response_mask"][0].astype(bool)).any():
        return "keeps tokens outside the responses"
    if stats["kept"] != int(keep.sum()) or stats["examples"] != len(table):
        return "has other counts of examples and kept tokens than its metadata say"
    return None
