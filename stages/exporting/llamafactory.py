"""LLaMA-Factory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from sstoken.stages.exporting.base import (
    ABSENT,
    DATA,
    NO_EVALUATION,
    AtLeast,
    Changes,
    Facts,
    IfGiven,
    Target,
    ones,
)
from sstoken.stages.exporting.rows import Rows
from sstoken.stages.storage import atomic_file

ROWS_PER_BATCH = 1000
TYPES = {"input_ids": "int32", "attention_mask": "int8", "labels": "int32"}

CONFIG = """# llamafactory-cli train llamafactory.yaml model_name_or_path=MODEL
model_name_or_path: MODEL
stage: sft
do_train: true
finetuning_type: full
tokenized_path: data
dataset: masked    # required but not read
template: empty
cutoff_len: $longest
remove_unused_columns: false
output_dir: ../trained
per_device_train_batch_size: 4
num_train_epochs: 1.0
learning_rate: 1.0e-5
lr_scheduler_type: cosine
logging_steps: 1
report_to: none
"""


class LlamaFactory(Target):
    """A folder for `datasets.load_from_disk`, named by `tokenized_path`.

    LLaMA-Factory pins datasets to at most 4.0, which cannot read the feature type `List` that newer versions write.
    So the files are written here rather than by `datasets`: Arrow IPC streams without metadata, and features of the
    old type `Sequence`, which every version reads.
    """

    name = "llamafactory"
    program = ("llamafactory.yaml", CONFIG)
    training = """```bash
llamafactory-cli train llamafactory.yaml model_name_or_path=MODEL
```

In a configuration of your own:

- `tokenized_path` names `data`. `dataset` is required, but it, `template` and `cutoff_len` do nothing to these rows:
  nothing is cut. The longest row has $longest tokens; shorten rows with `export --max-length N`.
- `packing` and `neat_packing` work while LLaMA-Factory tokenizes, so they do nothing here either.
"""

    def shard_name(self, index: int, shards: int) -> str:
        """Use the names of `save_to_disk`."""
        return f"data-{index:05d}-of-{shards:05d}.arrow"

    def write(self, path: Path, rows: Rows) -> None:
        """Write an Arrow IPC stream."""
        columns = {
            "input_ids": rows.column(rows.ids),
            "attention_mask": ones(rows),
            "labels": rows.column(rows.labels),
        }
        table = pa.table(columns)
        with atomic_file(path) as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=ROWS_PER_BATCH)

    def read(self, folder: Path) -> Iterator[pa.Table]:
        """Read as LLaMA-Factory does."""
        from datasets import load_from_disk

        rows = load_from_disk(str(folder / DATA)).with_format("arrow")
        yield from rows.iter(batch_size=ROWS_PER_BATCH)

    def files(self, facts: Facts) -> dict[str, str]:
        """Add what `load_from_disk` needs."""
        features = {
            name: {"feature": {"dtype": dtype, "_type": "Value"}, "_type": "Sequence"}
            for name, dtype in TYPES.items()
        }
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in facts.shards],
            "_fingerprint": facts.fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": "train",
        }
        return super().files(facts) | {
            f"{DATA}/dataset_info.json": json.dumps({"features": features}, indent=1),
            f"{DATA}/state.json": json.dumps(state, indent=1),
        }

    def settings(self, facts: Facts, out: Path) -> Changes:
        """See `Target.settings`."""
        return {
            "stage": "sft",
            "tokenized_path": str(out / DATA),
            "dataset": "masked",
            "cutoff_len": AtLeast(facts.longest),
            "remove_unused_columns": False,
            "streaming": ABSENT,
            "val_size": ABSENT,  # it splits no tokenised rows
            "eval_dataset": ABSENT,
            **NO_EVALUATION,
            # They do nothing to tokenised rows, but for the attention mask that `neat_packing` expects of packs.
            "packing": IfGiven(False),
            "neat_packing": IfGiven(False),
        }
