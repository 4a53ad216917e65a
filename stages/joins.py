"""Check that two folders belong together: each shard records the fingerprint of its tokens.

A shard of tokens records its own fingerprint, a shard of scores that of the tokens it was measured on. The
fingerprint covers example ids, token ids and response masks, so copying or moving a folder does not change it.

What does not belong together, or does not say what it belongs to, is a `SstokenError` that names both.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sstoken.errors import SstokenError
from sstoken.stages import folders, plain_json, tables
from sstoken.stages.storage import address, write_atomic

TOKENS = "tokens"
"""Metadata key: the fingerprint of the shard of tokens (in shards of tokens and scores), or of the whole folder of
tokens (in masked shards)."""
RUN = "fingerprint"
"""Metadata key: the fingerprint of the run that wrote the shard."""
_TRAINED_ON = "tokens.json"


def tokens_fingerprint(table: pa.Table) -> str:
    """Hash the content of a shard of tokens to 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(table["example_id"].to_pylist()).encode())
    for name, kind in (("input_ids", np.int32), ("response_mask", np.bool_)):
        values, offsets = tables.flatten(table[name])
        digest.update((offsets - offsets[0]).astype(np.int64).data)
        digest.update(np.ascontiguousarray(values[offsets[0] : offsets[-1]].astype(kind, copy=False)).data)
    return digest.hexdigest()


def measured_fingerprint(part: Path, table: pa.Table) -> str:
    """Return the fingerprint of `table`, a shard of tokens; refuse a shard that was edited after it was written."""
    found = tokens_fingerprint(table)
    if tables.read_metadata(part).get(TOKENS, found) != found:
        raise SstokenError(
            f"{part}: its tokens were changed after `encode` wrote them; make {part.parent} again (--force)"
        )
    return found


def folder_fingerprint(tokens: Path) -> str:
    """Return the fingerprint of a folder of tokens, from those that its shards record."""
    recorded = [_recorded(path, tables.read_metadata(path)) for path in tables.parts(tokens)]
    return hashlib.blake2b("".join(recorded).encode(), digest_size=16).hexdigest()


def check_scores(tokens: Path, scores: Path) -> None:
    """Refuse scores of other tokens, by the shards' metadata alone."""
    for part in tables.parts(tokens):
        scored = scores / part.name
        if not scored.is_file():
            raise SstokenError(f"{scored}: missing; {_other(tokens, scores)}")
        kinds = [tables.read_metadata(path) for path in (part, scored)]
        for path, metadata, kind in zip((part, scored), kinds, ("tokens", "scores"), strict=True):
            if metadata.get("kind") != kind:
                raise SstokenError(f"{path}: not {kind}; name the folder of {kind}")
        if _recorded(part, kinds[0]) != _recorded(scored, kinds[1]):
            raise SstokenError(_other(tokens, scores))
    if len(tables.parts(scores)) > len(tables.parts(tokens)):
        raise SstokenError(f"{scores}: more shards than {tokens} has; {_other(tokens, scores)}")


def check_shard(tokens: Path, fingerprint: str, scored: Path) -> None:
    """Refuse a shard of scores that was not measured on these tokens.

    Args:
        tokens: the shard of tokens.
        fingerprint: computed from its content, not the recorded one.
        scored: the shard of scores.
    """
    if _recorded(scored, tables.read_metadata(scored)) != fingerprint:
        raise SstokenError(_other(tokens, scored))


def check_one_run(folder: Path, run: str | None = None) -> None:
    """Refuse a finished folder that mixes shards of several runs.

    Args:
        folder: may hold no shard at all.
        run: fingerprint of the run; None: that of the first shard.
    """
    for path in tables.parts(folder):
        recorded = tables.read_metadata(path).get(RUN)
        run = recorded if run is None else run
        if recorded is None or recorded != run:
            what = "does not say which run wrote it" if recorded is None else "was written by another run"
            raise SstokenError(
                f"{path}: {what}, so it may not belong to {folder}; make {folder} again (--force), and copy folders as "
                "a whole"
            )


def note_training(history: Path, source: Path) -> None:
    """Record in a folder of snapshots the fingerprint of the tokens that they were trained on."""
    parts = tables.parts(source)
    facts = tables.read_metadata(parts[0]) if parts else {}
    masked = facts.get("kind") == "masked"
    fingerprint = _recorded(parts[0], facts) if masked else folder_fingerprint(source)
    write_atomic(history / _TRAINED_ON, json.dumps({TOKENS: fingerprint}))


def trained_on_others(checkpoint: str, tokens: Path) -> bool:
    """Return whether a checkpoint is a snapshot of an anchor run on other tokens; False if that is unknown."""
    note = address(checkpoint).absolute().parent / _TRAINED_ON
    try:
        recorded = plain_json.parse(folders.read_file(note))[TOKENS]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(recorded != folder_fingerprint(tokens))


def _recorded(path: Path, metadata: dict[str, Any]) -> str:
    """Return the fingerprint of tokens in a shard's metadata."""
    recorded = metadata.get(TOKENS)
    if not isinstance(recorded, str):
        raise SstokenError(
            f"{path}: does not say which tokens it holds or was measured from (made by an older version or by hand); "
            f"make {path.parent} again"
        )
    return recorded


def _other(tokens: Path, scores: Path) -> str:
    return (
        f"{scores}: scores of other tokens than {tokens}; score these tokens again, or name the right folder"
    )
