"""Stage `encode`: conversations in any common layout become token ids with a response mask.

The parent reads rows and cuts them into shards of `shard_rows` input rows; each shard is encoded by itself, so
the result is the same whatever the number of workers, and shards that an interrupted run finished are kept.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from sstoken.errors import SstokenError, UsageError
from stages import checkpoints
from stages.base import BY_CONTENT, SPEED_ONLY, Context, Stage
from stages.encoding import sources
from stages.encoding.conversations import (
    Format,
    Layout,
    check_columns,
    detect_layout,
    to_conversation,
)
from stages.encoding.messages import MAX_CHARS, BadRow, check_text
from stages.encoding.sources import Row
from stages.encoding.token_stats import Stats, merge, metrics, no_stats
from stages.files import UNFINISHED, write_whole
from stages.tables import TOKENS, part_name, read_metadata, write_part

if TYPE_CHECKING:
    from stages.encoding.chat import ChatEncoder

BAD_ROWS = "bad_rows"
"""Folder, in the output, of what was wrong with the rows passed over (never their text)."""
TOKENIZER = "tokenizer"
"""Folder, in the output, of the tokenizer that was used."""

Task = tuple[int, list[Row] | None]
"""A shard's index and its rows; None: the shard is already written."""


@dataclass(frozen=True)
class _Settings:
    """What a worker process needs to know."""

    model: Annotated[str, BY_CONTENT]
    chat_template: str | None
    max_length: int | None
    trust_remote_code: bool
    layout: Layout
    max_chars: int
    skip: bool
    out: Path

    def encoder(self) -> "ChatEncoder":
        """What turns conversations into tokens."""
        stamp = checkpoints.stamp(self.model)
        return _encoder(self.model, self.chat_template, self.max_length, self.trust_remote_code, stamp)


class Encode(Stage):
    """Turn a dataset of conversations into token ids and response masks."""

    name: ClassVar[str] = "encode"
    folder: ClassVar[str] = "tokens"

    data: Annotated[str, BY_CONTENT]
    """JSONL, JSON, Parquet or CSV (a file, a pattern, an s3:// or gs:// address), a folder written by
    save_to_disk, or a Hub dataset `user/name[:config][@revision]`."""
    model: str
    """Checkpoint whose tokenizer and chat template are used: a folder, or a Hub id `user/name[@revision]`."""
    split: str | None = None
    """Split of a Hub dataset (default `train`) or of a saved DatasetDict."""
    format: Format = "auto"
    """How rows hold conversations; `auto` looks at the first row's columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column names that differ from the format's: `{question: prompt_text}`."""
    max_length: Annotated[int | None, Field(ge=2)] = None
    """Longest example in tokens, at least 2; longer ones keep their start. Default: what the tokenizer
    declares, or 4096 where it declares no real limit."""
    chat_template: Annotated[str | None, BY_CONTENT] = None
    """A Jinja file to use instead of the tokenizer's chat template."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What a row that cannot be used does: `stop` the run, or `skip` it, count it and list it in bad_rows/."""
    max_chars: Annotated[int, Field(ge=1)] = MAX_CHARS
    """Longest conversation taken, in characters; a longer one is a bad row."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Read only the first rows, this many."""
    shard_rows: Annotated[int, Field(ge=1)] = 1000
    """Input rows per output shard: the unit of parallel work, and of what a crash costs."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint's tokenizer."""
    workers: Annotated[int | None, Field(ge=1), SPEED_ONLY] = None
    """Processes. Default: the number of cores; a single shard is encoded without any."""

    def check(self) -> None:
        """See `Stage.check`."""
        sources.check_source(self.data, self.split)
        check_columns(self.format, self.columns)
        checkpoints.local_folder(self.model)
        self._template()

    def sources(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """See `Stage.sources`."""
        return {
            "data": sources.data_identity(self.data, self.split, digest),
            "tokenizer": checkpoints.tokenizer_identity(self.model, digest),
            "chat_template": digest(Path(self.chat_template).expanduser()) if self.chat_template else None,
        }

    def run(self, context: Context) -> dict[str, Any]:
        """Write `part-*.parquet` (schema `TOKENS`), the tokenizer, and the bad rows passed over.

        Raises:
            SstokenError: a bad row under `on_bad_row="stop"`; a source or tokenizer that fails; nothing left.
        """
        from joblib import cpu_count  # knows the limits of a container

        self.check()
        settings = _Settings(
            model=self.model,
            chat_template=self._template(),
            max_length=self.max_length,
            trust_remote_code=self.trust_remote_code,
            layout=self._layout(),
            max_chars=self.max_chars,
            skip=self.on_bad_row == "skip",
            out=context.out,
        )
        _save_tokenizer(settings)
        tasks = self._tasks(context.out)
        first = list(islice(tasks, 2))
        workers = (self.workers or cpu_count()) if len(first) > 1 else 1
        total = no_stats()
        with context.progress("rows", self.limit) as bar:
            for stats in context.map(partial(encode_shard, settings), chain(first, tasks), workers=workers):
                total = merge(total, stats)
                bar.advance(stats["rows"])
        if not total["examples"]:
            raise SstokenError(
                f"{sources.shown(self.data)}: no example left of {total['rows']} rows ({_why(total)}); raise "
                "--max-length or repair the data"
            )
        return metrics(total)

    def _template(self) -> str | None:
        if self.chat_template is None:
            return None
        path = Path(self.chat_template).expanduser()
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else "no such file"
            raise UsageError(f"chat_template {self.chat_template!r}: {problem}; name a Jinja file")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"chat_template {self.chat_template!r}: not UTF-8; name a Jinja file") from error

    def _rows(self) -> Iterator[Row]:
        return islice(sources.open_rows(self.data, self.split), self.limit)

    def _layout(self) -> Layout:
        """The dataset's layout, from its first row that parses."""
        bad: Counter[str] = Counter()
        for row in self._rows():
            if row.problem is None and isinstance(row.value, Mapping):
                try:
                    return detect_layout(row.value, self.format, self.columns)
                except SstokenError as error:
                    raise SstokenError(f"{row.where}: {error}") from error
            problem = BadRow(*(row.problem or ("not an object", f"a {type(row.value).__name__}")))
            if self.on_bad_row == "stop":
                raise _stop(row, problem)
            bad[problem.reason] += 1
        raise SstokenError(f"{sources.shown(self.data)}: no row can be used ({_why({'bad_rows': bad})})")

    def _tasks(self, out: Path) -> Iterator[Task]:
        rows = self._rows()
        index = 0
        while shard := list(islice(rows, self.shard_rows)):
            yield index, None if (out / part_name(index)).exists() else shard
            index += 1


def encode_shard(settings: _Settings, task: Task) -> Stats:
    """Encode one shard and write it; only its statistics come back.

    The list of bad rows is written first: a shard that is there is whole.
    """
    index, rows = task
    path = settings.out / part_name(index)
    if rows is None:
        stats: Stats = read_metadata(path)["stats"]
        return stats
    encoder = settings.encoder()
    columns: dict[str, list[Any]] = {name: [] for name in TOKENS.names}
    stats = no_stats() | {"rows": len(rows)}
    bad: list[dict[str, Any]] = []
    for row in rows:
        try:
            encoded = encode_row(row, settings.layout, encoder, settings.max_chars)
            example_id = _example_id(row)
        except BadRow as error:
            if not settings.skip:
                raise _stop(row, error) from error
            bad.append({"file": row.file, "row": row.index, "reason": error.reason, "detail": error.detail})
            continue
        if not encoded.input_ids:
            stats["dropped"] += 1
            continue
        columns["example_id"].append(example_id)
        columns["input_ids"].append(encoded.input_ids)
        columns["response_mask"].append(encoded.response_mask)
        stats["truncated"] += encoded.truncated
        stats["response_tokens"] += sum(encoded.response_mask)
    lengths = Counter(map(len, columns["input_ids"]))
    stats |= {"examples": lengths.total(), "tokens": sum(n * k for n, k in lengths.items())}
    stats["lengths"] = {str(n): lengths[n] for n in sorted(lengths)}
    stats["bad_rows"] = dict(Counter(b["reason"] for b in bad))
    if bad:
        lines = settings.out / BAD_ROWS / path.with_suffix(".jsonl").name
        lines.parent.mkdir(exist_ok=True)
        write_whole(lines, "".join(json.dumps(row, sort_keys=True) + "\n" for row in bad))
    write_part(path, pa.table(columns, schema=TOKENS), _metadata(settings, encoder) | {"stats": stats})
    return stats


def encode_row(row: Row, layout: Layout, encoder: "ChatEncoder", max_chars: int = MAX_CHARS) -> Any:
    """One raw row as an `Encoded` example.

    Raises:
        BadRow: it cannot be used.
    """
    if row.problem is not None:
        raise BadRow(*row.problem)
    return encoder.encode_conversation(to_conversation(row.value, layout, max_chars))


def _stop(row: Row, error: BadRow) -> SstokenError:
    return SstokenError(
        f"{row.where}: {error}; repair the row, or pass over such rows with --on-bad-row skip"
    )


def _why(stats: Stats) -> str:
    counts = {"no response token within the maximal length": stats.get("dropped", 0)} | dict(
        stats["bad_rows"]
    )
    return ", ".join(f"{n} x {reason}" for reason, n in counts.items() if n) or "none were read"


def _example_id(row: Row) -> str:
    own = row.value.get("example_id")
    if own is None:
        return f"{row.file}-{row.index}"
    check_text(str(own))
    return str(own)


@lru_cache(maxsize=1)
def _encoder(
    model: str,
    chat_template: str | None,
    max_length: int | None,
    trust_remote_code: bool,
    stamp: tuple[Any, ...],
) -> "ChatEncoder":
    """One per process: a tokenizer takes longer to load than a shard to encode. `stamp` tells when it changed."""
    from stages.encoding.chat import ChatEncoder

    tokenizer = checkpoints.load_tokenizer(model, trust_remote_code=trust_remote_code)
    return ChatEncoder(tokenizer, max_length, chat_template)


def _metadata(settings: _Settings, encoder: "ChatEncoder") -> dict[str, Any]:
    return {
        "kind": "tokens",
        "tokenizer": {
            "fingerprint": checkpoints.tokenizer_fingerprint(encoder.tokenizer),
            "vocab_size": len(encoder.tokenizer),
            "name": settings.model,
        },
        "chat_template": hashlib.sha256(encoder.template().encode()).hexdigest()[:16],
        "max_length": encoder.max_length,
    }


def _save_tokenizer(settings: _Settings) -> None:
    """Later stages decode and train with the tokenizer, and the chat template, that was used here."""
    folder = settings.out / TOKENIZER
    if folder.exists():
        return
    encoder = settings.encoder()
    temporary = folder.with_name(folder.name + UNFINISHED)
    tokenizer = encoder.tokenizer
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = own if own and settings.chat_template is None else encoder.template()
        tokenizer.save_pretrained(temporary)
    finally:
        tokenizer.chat_template = own
    os.replace(temporary, folder)
