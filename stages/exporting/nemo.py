"""NVIDIA NeMo Automodel."""

from typing import Any

import numpy as np
import pyarrow as pa

from sstoken.labels import IGNORED_LABEL
from sstoken.stages.exporting.base import ParquetTarget, ones
from sstoken.stages.exporting.rows import Rows


class NeMo(ParquetTarget):
    """`input_ids, labels, attention_mask`, with labels shifted left by one.

    Label i is what position i predicts: NeMo's datasets shift the labels, its loss does not. Unshifted labels, as
    other trainers expect them, would silently train the model to copy its input.
    """

    name = "nemo"
    training = """In a recipe (such as `llama3_2_1b_squad.yaml` of its examples), replace `dataset`, and remove
`validation_dataset` or give it an export of its own:

```yaml
dataset:
  _target_: datasets.load_dataset
  path: parquet
  data_files: data/*.parquet
  split: train
packed_sequence:
  packed_sequence_size: 0    # or at least $longest, the longest row: longer ones are dropped
```

The labels are already shifted one to the left (`labels[i]` is what position i predicts), as in NeMo Automodel's own
datasets: its loss does not shift them. Use this export with no other trainer: the labels would be off by one. There
are no float columns: its collator would turn them into integers.
"""

    def columns(self, rows: Rows) -> dict[str, pa.Array]:
        """Shift labels within each row; the last label is -100."""
        shifted = np.append(rows.labels[1:], IGNORED_LABEL).astype(np.int32)
        shifted[rows.offsets[1:] - 1] = IGNORED_LABEL
        return super().columns(rows) | {"labels": rows.column(shifted), "attention_mask": ones(rows)}

    def seen(self, row: dict[str, Any]) -> tuple[list[int], list[int], None]:
        """Undo the shift."""
        return row["input_ids"], [IGNORED_LABEL, *row["labels"][:-1]], None
