"""TRL's SFTTrainer, any version."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sstoken.stages.exporting.base import (
    ABSENT,
    NO_EVALUATION,
    AtLeast,
    Changes,
    Facts,
    IfGiven,
    ParquetTarget,
)
from sstoken.stages.exporting.rows import Rows

SCRIPT = '''"""python train.py MODEL [any setting of SFTConfig, such as --packing True --max_length 2048]"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

folder = Path(__file__).resolve().parent
model, *settings = sys.argv[1:]
settings = ["--output_dir", "trained", "--max_length", "$longest", *settings]
(args,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses(settings)
trainer = SFTTrainer(
    model=model,
    args=args,
    train_dataset=load_dataset("parquet", data_files=f"{folder}/data/*.parquet", split="train"),
    processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
)
trainer.train()
trainer.save_model()
'''


class TRL(ParquetTarget):
    """`input_ids, labels`, and the mask again as `assistant_masks`.

    TRL 1.7 and later pack labels with the ids. Up to 1.6, packing keeps only ids and masks: without `assistant_masks`
    it would silently train on every token.
    """

    name = "trl"
    program = ("train.py", SCRIPT)
    training = """```bash
python train.py MODEL --output_dir ../trained
python train.py MODEL --output_dir ../trained --packing True --max_length 4096
```

On a CPU add `--bf16 False --use_cpu True`. In a script of your own:

- `max_length` has to be None or at least $longest, the longest row: the default cuts at 1,024.
- Leave the data collator to TRL. `DataCollatorForLanguageModeling` of transformers (not TRL's) overwrites
  these labels.
- Up to TRL 1.6, packing drops `labels`; the column `assistant_masks` carries the mask instead. Keep it.
"""

    def columns(self, rows: Rows) -> dict[str, pa.Array]:
        """Add the keep mask as int8."""
        return super().columns(rows) | {"assistant_masks": rows.column(rows.kept.astype(np.int8))}

    def seen(self, row: dict[str, Any]) -> tuple[list[int], list[int], list[float]]:
        """Return the second mask as weights, so that both are compared."""
        return row["input_ids"], row["labels"], row["assistant_masks"]

    def settings(self, facts: Facts, out: Path) -> Changes | None:
        """See `Target.settings`; for `trl sft --config`. The export has no split to evaluate on."""
        return {
            "dataset_name": str(out),
            "dataset_config": ABSENT,
            "datasets": ABSENT,
            "dataset_train_split": IfGiven("train"),
            "assistant_only_loss": IfGiven(False),  # it wants conversations; the labels are masked already
            **NO_EVALUATION,
            "max_length": AtLeast(facts.longest, or_none=True),
        }
