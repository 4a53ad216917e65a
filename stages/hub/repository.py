"""Names of the files in a published repository."""

import pyarrow as pa

from sstoken.stages import tables

CARD, SCORES_PICTURE, EXAMPLE_PICTURE, REPORT = "README.md", "scores.svg", "example.svg", "report.html"
SHARDS, TOKENIZER = "data", "tokenizer"
SIGNALS = ("rel", "attention", "score")
"""Columns published only on request: they are large, and no trainer needs them."""
UNSCORED = pa.schema([field for field in tables.MASKED if field.name not in SIGNALS])
