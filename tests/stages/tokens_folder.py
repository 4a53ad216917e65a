"""A folder of random tokens, as `encode` would leave it."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from sstoken.stages import checkpoints, joins, tables
from tests.factories import VOCABULARY, save_tokenizer

RUN = "tiny"
"""The run fingerprint that `save_tokens` records."""


def save_tokens(folder: Path, examples: int = 40, parts: int = 2, longest: int = 24) -> Path:
    """Write random examples in `parts` shards; the last example has no response token."""
    folder.mkdir(parents=True)
    fingerprint = checkpoints.tokenizer_fingerprint(save_tokenizer(folder / "tokenizer"))
    facts = {"fingerprint": fingerprint, "name": "tiny"}
    random = np.random.default_rng(0)
    rows = []
    for i in range(examples):
        length = int(random.integers(6, longest + 1))
        start = length if i == examples - 1 else length // 3
        ids = random.integers(1, VOCABULARY, length).tolist()
        rows.append(
            {"example_id": str(i), "input_ids": ids, "response_mask": [j >= start for j in range(length)]}
        )
    for part, chunk in enumerate(np.array_split(np.arange(examples), parts)):
        table = pa.Table.from_pylist([rows[i] for i in chunk], schema=tables.TOKENS)
        about = {
            "kind": "tokens",
            "tokenizer": facts,
            joins.TOKENS: joins.tokens_fingerprint(table),
            joins.RUN: RUN,
        }
        tables.write_part(folder / tables.part_name(part), table, about)
    return folder
