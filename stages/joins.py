"""Which tokens a folder was measured from: shards say so, and whoever joins two folders compares.

Each shard of tokens says the fingerprint of its content, and each shard of scores that of the tokens it was measured
from. A fingerprint is of example ids, token ids and response masks: the same for a folder that was copied or moved,
another for other text.
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
"""Key in the metadata of a shard, of tokens or scores: the fingerprint of the shard of tokens; in that of a masked
shard: of all of them."""
RUN = "fingerprint"
"""Key in the metadata of a shard: the fingerprint of the run that wrote it."""
_TRAINED_ON = "tokens.json"


def tokens_fingerprint(table: pa.Table) -> str:
    """The content of a shard of tokens, in 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(table["example_id"].to_pylist()).encode())
    for name, kind in (("input_ids", np.int32), ("response_mask", np.bool_)):
        values, offsets = tables.flatten(table[name])
        digest.update((offsets - offsets[0]).astype(np.int64).tobytes())
        digest.update(values[offsets[0] : offsets[-1]].astype(kind).tobytes())
    return digest.hexdigest()


def measured_fingerprint(part: Path, table: pa.Table) -> str:
    """The fingerprint of a shard of tokens that was read.

    Raises:
        SstokenError: the shard says another one: it was edited after it was written.
    """
    found = tokens_fingerprint(table)
    if tables.read_metadata(part).get(TOKENS, found) != found:
        raise SstokenError(
            f"{part}: its tokens were changed after `encode` wrote them; make {part.parent} again (--force)"
        )
    return found


def folder_fingerprint(tokens: Path) -> str:
    """The content of a folder of tokens, from what its shards say of themselves.

    Raises:
        SstokenError: a shard does not say it.
    """
    said = [_said(path, tokens, tables.read_metadata(path)) for path in tables.parts(tokens)]
    return hashlib.blake2b("".join(said).encode(), digest_size=16).hexdigest()


def check_scores(tokens: Path, scores: Path) -> None:
    """Refuse scores of other tokens by what the shards say, before any is read.

    Raises:
        SstokenError: names both folders.
    """
    for part in tables.parts(tokens):
        scored = scores / part.name
        if not scored.is_file():
            raise SstokenError(f"{scored}: missing; {_other(tokens, scores)}")
        kinds = [tables.read_metadata(path) for path in (part, scored)]
        for path, metadata, kind in zip((part, scored), kinds, ("tokens", "scores"), strict=True):
            if metadata.get("kind") != kind:
                raise SstokenError(f"{path}: not {kind}; name the folder of {kind}")
        if _said(part, tokens, kinds[0]) != _said(scored, scores, kinds[1]):
            raise SstokenError(_other(tokens, scores))
    if len(tables.parts(scores)) > len(tables.parts(tokens)):
        raise SstokenError(f"{scores}: more shards than {tokens} has; {_other(tokens, scores)}")


def check_shard(tokens: Path, fingerprint: str, scored: Path) -> None:
    """Refuse a shard of scores that was not measured from these very tokens.

    Args:
        tokens: the shard of tokens.
        fingerprint: of what it holds, whatever it says of itself.
        scored: the shard of scores.

    Raises:
        SstokenError: names both.
    """
    if _said(scored, scored.parent, tables.read_metadata(scored)) != fingerprint:
        raise SstokenError(_other(tokens, scored))


def check_one_run(folder: Path, run: str | None = None) -> None:
    """Refuse a finished folder some of whose shards another run wrote.

    Args:
        folder: of shards; none is fine.
        run: the fingerprint that they have to say; None: all the same.

    Raises:
        SstokenError: names the first shard that says another one, or none.
    """
    for path in tables.parts(folder):
        said = tables.read_metadata(path).get(RUN)
        run = said if run is None else run
        if said is None or said != run:
            what = "does not say which run wrote it" if said is None else "was written by another run"
            raise SstokenError(
                f"{path}: {what}, so it may not belong to {folder}; make {folder} again (--force), and copy folders as "
                "a whole"
            )


def note_training(history: Path, source: Path) -> None:
    """Have a folder of snapshots say which tokens, or whose masked dataset, they were trained on."""
    parts = tables.parts(source)
    facts = tables.read_metadata(parts[0]) if parts else {}
    fingerprint = (
        _said(parts[0], source, facts) if facts.get("kind") == "masked" else folder_fingerprint(source)
    )
    write_atomic(history / _TRAINED_ON, json.dumps({TOKENS: fingerprint}))


def trained_on_others(checkpoint: str, tokens: Path) -> bool:
    """Whether a checkpoint is a snapshot of an anchor run on other tokens; False also where that is not known."""
    note = address(checkpoint).absolute().parent / _TRAINED_ON
    try:
        said = plain_json.parse(folders.read_file(note))[TOKENS]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(said != folder_fingerprint(tokens))


def _said(path: Path, folder: Path, metadata: dict[str, Any]) -> str:
    said = metadata.get(TOKENS)
    if not isinstance(said, str):
        raise SstokenError(
            f"{path}: does not say which tokens it holds or was measured from (made by an older version or by hand); "
            f"make {folder} again"
        )
    return said


def _other(tokens: Path, scores: Path) -> str:
    return f"{scores}: the scores of other tokens than {tokens}; score these tokens again, or name the right ones"
