"""Encode and write one shard of rows, in any process."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from sstoken.errors import SstokenError
from sstoken.stages import checkpoints, folders, joins, storage
from sstoken.stages.encoding.chat import ChatEncoder, EncoderOptions, load_encoder
from sstoken.stages.encoding.conversations import to_conversation
from sstoken.stages.encoding.layouts import Layout
from sstoken.stages.encoding.limits import time_limited
from sstoken.stages.encoding.messages import BadRow, Conversation, PassedOver, check_text
from sstoken.stages.encoding.ranges import RowRange
from sstoken.stages.encoding.sources import Row
from sstoken.stages.encoding.token_stats import COUNTED, Stats, no_stats
from sstoken.stages.stage import Worker
from sstoken.stages.storage import write_atomic
from sstoken.stages.tables import TOKENS, part_name, read_metadata, write_part

BAD_ROWS = "bad_rows"
"""Output folder with the reasons for skipped rows (never their text)."""
_BAD_ROWS_DIGEST = "bad_rows"
"""Metadata key: the SHA-256 of the shard's list of bad rows; missing if no row is bad."""
TOKENIZER = "tokenizer"
"""Output folder with the tokenizer that was used."""


@dataclass(frozen=True)
class Shard:
    """The rows of one shard."""

    index: int
    ranges: list[RowRange]


@dataclass(frozen=True)
class EncodingSettings:
    """How shards are encoded and where they go."""

    model: str
    trust_remote_code: bool
    options: EncoderOptions
    layout: Layout
    max_chars: int
    skip: bool
    out: Path
    fingerprint: str
    """The run's fingerprint, for provenance."""

    def encoder(self) -> ChatEncoder:
        """Return this process's encoder."""
        with time_limited(self.model):
            return _encoder(self.model, self.options, self.trust_remote_code, checkpoints.stamp(self.model))


def encode_shard(settings: EncodingSettings, shard: Shard, worker: Worker) -> None:
    """Encode one shard and write it, with its statistics in its metadata.

    The list of bad rows is written first, so a shard that exists is complete.
    """
    path = settings.out / part_name(shard.index)
    encoder = settings.encoder()
    columns: dict[str, list[Any]] = {name: [] for name in TOKENS.names}
    stats: Stats = no_stats() | {"rows": sum(rows.num_rows for rows in shard.ranges)}
    counted = {name: Counter[str]() for name in COUNTED}
    bad: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    with time_limited(str(path)) as start:
        for row in chain.from_iterable(rows.rows() for rows in shard.ranges):
            worker.advance(1)
            try:
                conversation = to_conversation(row.checked(), settings.layout, settings.max_chars)
                start(row.where)
                examples = encoder.encode(conversation)
                example_id = _example_id(row)
            except PassedOver as reason:
                counted["passed_over"][reason.reason] += 1
                continue
            except BadRow as error:
                if not settings.skip:
                    raise stopped(row, error) from error
                counted["bad_rows"][error.reason] += 1
                bad.append(
                    {"file": row.file, "row": row.index, "reason": error.reason, "detail": error.detail}
                )
                continue
            first = first or _described(row, conversation, settings.layout, encoder)
            counted["unused"].update(conversation.unused)
            counted["notes"].update(row.notes + conversation.notes)
            for encoded in examples:
                counted["notes"].update(encoded.notes)
                if not encoded.input_ids:
                    stats["dropped"] += 1
                    continue
                turn = "" if encoded.turn is None else f"-turn{encoded.turn}"
                columns["example_id"].append(example_id + turn)
                columns["input_ids"].append(encoded.input_ids)
                columns["response_mask"].append(encoded.response_mask)
                stats["truncated"] += encoded.truncated
                stats["response_tokens"] += sum(encoded.response_mask)
    lengths = Counter(map(len, columns["input_ids"]))
    stats |= {"examples": lengths.total(), "tokens": sum(n * k for n, k in lengths.items())}
    stats["lengths"] = {str(n): lengths[n] for n in sorted(lengths)}
    stats |= {name: dict(counts) for name, counts in counted.items()}
    about: dict[str, Any] = {"stats": stats, "first_row": first}
    if bad:
        lines = settings.out / BAD_ROWS / path.with_suffix(".jsonl").name
        storage.of(lines).make_folder(lines.parent)
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in bad)
        write_atomic(lines, text)
        about[_BAD_ROWS_DIGEST] = hashlib.sha256(text.encode()).hexdigest()
    table = pa.table(columns, schema=TOKENS)
    about |= {joins.RUN: settings.fingerprint, joins.TOKENS: joins.tokens_fingerprint(table)}
    write_part(path, table, _metadata(settings, encoder) | about)


def keeps_bad_rows(path: Path) -> bool:
    """Return whether an unfinished shard's list of bad rows is intact."""
    digest = read_metadata(path).get(_BAD_ROWS_DIGEST)
    lines = path.parent / BAD_ROWS / path.with_suffix(".jsonl").name
    return digest is None or (lines.is_file() and folders.sha256(lines) == digest)


def _described(row: Row, conversation: Conversation, layout: Layout, encoder: ChatEncoder) -> dict[str, Any]:
    """Describe how a row was read: its layout, and what the chat template adds."""
    try:
        added = encoder.added_text(conversation)
    except BadRow:  # with --turns each, single turns can still be rendered
        added = ""
    return {
        "layout": layout.format,
        "columns": [[role, name] for role, name in layout.columns.items() if name in row.value],
        "template": encoder.template_origin,
        "template_adds": added,
    }


def stopped(row: Row, error: BadRow) -> SstokenError:
    """Return the error that stops a run on a bad row."""
    return SstokenError(f"{row.where}: {error}; fix the row, or skip such rows with --on-bad-row skip")


def _example_id(row: Row) -> str:
    own = row.value.get("example_id")
    if own is None:
        return f"{row.file}-{row.index}"
    check_text(str(own))
    return str(own)


def save_tokenizer(settings: EncodingSettings) -> None:
    """Save the tokenizer with its chat template: later stages decode and train with it."""
    folder = settings.out / TOKENIZER  # written again when a run resumes: nothing vouches for an old one
    encoder = settings.encoder()
    tokenizer = encoder.tokenizer
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            own if own and settings.options.chat_template is None else encoder.template()
        )
        with storage.of(folder).put_folder(folder) as temporary:
            tokenizer.save_pretrained(temporary)
    finally:
        tokenizer.chat_template = own


def _metadata(settings: EncodingSettings, encoder: ChatEncoder) -> dict[str, Any]:
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


@lru_cache(maxsize=1)
def _encoder(model: str, options: EncoderOptions, trusted: bool, stamp: tuple[Any, ...]) -> ChatEncoder:
    """Load the encoder once per process, since loading a tokenizer is slow; another `stamp` loads it again."""
    return load_encoder(model, options, trust_remote_code=trusted)
