"""JSON Lines, for your own training loop."""

from collections.abc import Iterator
from typing import Any

import orjson

from sstoken.stages.exporting.base import Facts, JsonLinesTarget
from sstoken.stages.exporting.rows import Rows


class JsonLines(JsonLinesTarget):
    """`example_id, input_ids, labels[, weights]`."""

    name = "jsonl"
    weights = True

    def lines(self, rows: Rows) -> Iterator[bytes]:
        """Yield one object per row."""
        for i, name in enumerate(rows.example_id.to_pylist()):
            part = slice(rows.offsets[i], rows.offsets[i + 1])
            document: dict[str, Any] = {
                "example_id": name,
                "input_ids": rows.ids[part],
                "labels": rows.labels[part],
            }
            if rows.weights is not None:
                document["weights"] = rows.weights[part]
            yield orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)

    def usage(self, facts: Facts) -> str:
        """Show how to load it."""
        weights = "`weights` (0 where the label is -100, else in (0, 1]), " if facts.weights else ""
        return f"""```python
from datasets import load_dataset

rows = load_dataset("json", data_files="data/*.jsonl", split="train")
```

Each line holds `example_id`, `input_ids`, `labels`, {weights}all lists of one length. The labels are not shifted:
`labels[i]` is token i itself or -100.
"""
