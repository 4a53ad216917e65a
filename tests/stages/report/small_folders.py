"""Small finished folders: tokens, scores and masks of a few conversations, every byte a token."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sstoken.signals import get_signal
from sstoken.stages import joins, tables
from sstoken.stages.manifest import Manifest, list_files, write_manifest
from sstoken.stages.scores_file import write_scores
from tests.factories import byte_tokenizer

TOKENIZER = byte_tokenizer(["<eos>"], eos_token="<eos>")
EOS = TOKENIZER.eos_token_id
Conversation = Sequence[tuple[str, str]]
"""Turns: what is asked, and the answer."""


def tokens_table(conversations: Sequence[Conversation]) -> pa.Table:
    """Each answer ends with `<eos>`, which belongs to the response."""
    rows = []
    for number, turns in enumerate(conversations):
        ids: list[int] = []
        response: list[bool] = []
        for asked, answer in turns:
            a, b = TOKENIZER(asked).input_ids, [*TOKENIZER(answer).input_ids, EOS]
            ids += a + b
            response += [False] * len(a) + [True] * len(b)
        rows.append({"example_id": f"e{number}", "input_ids": ids, "response_mask": response})
    return pa.Table.from_pylist(rows, schema=tables.TOKENS)


def write_tokens(folder: Path, shards: Sequence[pa.Table]) -> Path:
    """Write a tokens folder."""
    folder.mkdir(parents=True)
    for i, table in enumerate(shards):
        facts = {
            "kind": "tokens",
            joins.TOKENS: joins.tokens_fingerprint(table),
            "tokenizer": {"name": "/home/me/bytes", "vocab_size": 257, "fingerprint": "f"},
        }
        tables.write_part(folder / tables.part_name(i), table, facts)
    return finish(folder, "encode")


def write_signals(folder: Path, tokens: Path, seed: int, *names: str) -> Path:
    """Write a scores folder of random values."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for part in tables.parts(tokens):
        table = tables.read_table(part)
        response, offsets = tables.flatten(table["response_mask"])
        size = int(response.sum())
        values = {name: (8 * random.random(size)).astype(get_signal(name).dtype) for name in names}
        facts = {"checkpoint": folder.name, "dtype": "float32", joins.TOKENS: joins.tokens_fingerprint(table)}
        ids = table["example_id"].to_pylist()
        write_scores(folder / part.name, ids, offsets, response.astype(bool), values, facts)
    return finish(folder, "score", tokenizer=False)


def write_masked(folder: Path, tokens: Path, seed: int = 0, rho: float = 0.6, **changes: Any) -> Path:
    """Write a masked folder: `score` is random, a token is kept where it is below rho.

    Args:
        changes: metadata that differ; `drop` names examples that are left out, `weight` adds weights, `lean` leaves
            the response mask and all scores out.
    """
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    drop, weighted, lean = (changes.pop(name, ()) for name in ("drop", "weight", "lean"))
    for part in tables.parts(tokens):
        table = tables.read_table(part)
        response, offsets = tables.flatten(table["response_mask"])
        response = response.astype(bool)
        values = random.random((3, response.size)).astype(np.float32)
        keep = response & (values[0] < rho)
        full = np.where(response, values, np.nan)
        weight = np.where(keep, full[1] - 0.5, np.where(response, 0, np.nan))
        ids = tables.flatten(table["input_ids"])[0]
        columns: Mapping[str, Any] = {
            "example_id": table["example_id"],
            "input_ids": table["input_ids"],
            "labels": tables.lists(np.where(keep, ids, -100), offsets, tables.IDS),
            "keep_mask": tables.lists(keep, offsets, tables.MASK),
            "response_mask": table["response_mask"],
            "rel": tables.lists(full[1] - 0.5, offsets, tables.VALUES),
            "attention": tables.lists(full[2], offsets, tables.VALUES),
            "score": tables.lists(1 - full[0], offsets, tables.VALUES),
            "weight": tables.lists(weight, offsets, tables.VALUES),
        }  # fmt: skip
        schema = tables.masked_schema(bool(weighted), bool(lean))
        masked = pa.table([columns[name] for name in schema.names], schema=schema)
        masked = masked.filter(pa.array([name not in drop for name in masked["example_id"].to_pylist()]))
        facts = {
            "kind": "masked", "method": "sstoken", "params": {"rho": rho, "gamma": 0.5}, "rho": rho, "gamma": 0.5,
            "scope": "sample", "layer": 4, joins.TOKENS: joins.folder_fingerprint(tokens), "version": "0",
            "checkpoints": {"history": {"name": "base", "checkpoint": "/home/me/base", "dtype": "float32"}},
            "tokenizer": {"name": "/home/me/bytes", "vocab_size": 257, "fingerprint": "f"}, "fingerprint": "run",
            **changes,
        }  # fmt: skip
        tables.write_part(folder / part.name, masked, facts)
    return finish(folder, "select")


def finish(folder: Path, stage: str, *, tokenizer: bool = True) -> Path:
    """Add the tokenizer and the manifest."""
    if tokenizer:
        TOKENIZER.save_pretrained(folder / "tokenizer")
    facts: dict[str, Any] = {"settings": {}, "inputs": {}, "sources": {}, "metrics": {}}
    write_manifest(
        folder,
        Manifest(
            stage=stage, fingerprint="f", seed=0, version="0", seconds=0, files=list_files(folder), **facts
        ),
    )
    return folder
