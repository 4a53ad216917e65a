"""What a published repository holds, by name."""

import pyarrow as pa

from sstoken.stages import tables

CARD, SCORES_PICTURE, EXAMPLE_PICTURE = "README.md", "scores.svg", "example.svg"
SHARDS, TOKENIZER = "data", "tokenizer"
SIGNALS = ("rel", "attention", "score")
"""Columns that are published only where asked for: large, and no trainer needs them."""
UNSCORED = pa.schema([field for field in tables.MASKED if field.name not in SIGNALS])
