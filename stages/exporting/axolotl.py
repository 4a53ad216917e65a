"""Axolotl."""

from pathlib import Path

import pyarrow as pa

from sstoken.stages.exporting.base import ABSENT, DATA, AtLeast, Changes, Facts, ParquetTarget, ones
from sstoken.stages.exporting.rows import Rows

CONFIG = """# axolotl train axolotl.yaml --base-model MODEL
base_model: MODEL
tokenizer_config: tokenizer
datasets:
  - path: data
    ds_type: parquet
    type:
dataset_prepared_path: ../prepared/$fingerprint
output_dir: ../trained
sequence_len: $longest
sample_packing: false
micro_batch_size: 4
gradient_accumulation_steps: 1
num_epochs: 1
optimizer: adamw_torch
learning_rate: 0.00001
lr_scheduler: cosine
"""


class Axolotl(ParquetTarget):
    """Exactly `input_ids, attention_mask, labels`: Axolotl detects tokenized data by them, and packing accepts no
    others."""

    name = "axolotl"
    program = ("axolotl.yaml", CONFIG)
    training = """```bash
axolotl train axolotl.yaml --base-model MODEL
axolotl train axolotl.yaml --base-model MODEL --sample-packing --sequence-len 4096
```

In a configuration of your own:

- `type:` stays empty. With a type, Axolotl would look for text to tokenize.
- `sequence_len` must be at least $longest, the longest row: longer rows are dropped.
- `dataset_prepared_path` must be a new folder for each export. Axolotl's cache is keyed by the path and the settings,
  not by the content: another export at the same path would train on the old one.
"""

    def columns(self, rows: Rows) -> dict[str, pa.Array]:
        """Add an attention mask of ones."""
        columns = super().columns(rows)
        labels = columns.pop("labels")
        return columns | {"attention_mask": ones(rows), "labels": labels}

    def settings(self, facts: Facts, out: Path) -> Changes:
        """See `Target.settings`."""
        return {
            "datasets": [{"path": str(out / DATA), "ds_type": "parquet", "type": None}],
            "pretraining_dataset": ABSENT,
            "dataset_prepared_path": str(out.parent / "prepared" / facts.fingerprint),
            "tokenizer_config": str(out / "tokenizer"),
            "sequence_len": AtLeast(facts.longest),
        }
