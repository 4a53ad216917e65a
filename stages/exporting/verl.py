"""verl."""

from typing import Any

import numpy as np
import pyarrow as pa

from sstoken.labels import labels_from_mask
from sstoken.stages.exporting.base import ParquetTarget
from sstoken.stages.exporting.rows import Rows

MODULE = '''"""The rows of `data/` as a verl dataset."""

import torch
from datasets import load_dataset
from torch.utils.data import Dataset


class MaskedDataset(Dataset):
    """Gives what `pad_mode: no_padding` batches. The loss moves `loss_mask` itself."""

    def __init__(self, parquet_files, tokenizer, config, processor=None, max_samples=-1):
        files = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        if config.get("pad_mode", "no_padding") != "no_padding":
            raise ValueError(f"data.pad_mode is {config.pad_mode!r}; these rows need no_padding")
        self.rows = load_dataset("parquet", data_files=files, split="train").with_format("torch")
        if max_samples > 0:
            self.rows = self.rows.select(range(min(max_samples, len(self.rows))))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {
            "input_ids": row["input_ids"].long(),
            "position_ids": torch.arange(len(row["input_ids"])),
            "loss_mask": row["loss_mask"],
        }
'''


class Verl(ParquetTarget):
    """`input_ids, loss_mask`, and a dataset class.

    verl concatenates the masks of a batch and rolls them by one, so a mask of 1 at a row's first token would train
    the last token of the row before. Ours is 0 there.
    """

    name = "verl"
    weights = True
    program = ("masked_dataset.py", MODULE)
    training = """```bash
torchrun --nproc_per_node 1 -m verl.trainer.sft_trainer model.path=MODEL \\
    'data.train_files=data/*.parquet' \\
    data.custom_cls.path=masked_dataset.py data.custom_cls.name=MaskedDataset \\
    data.pad_mode=no_padding data.max_token_len_per_gpu=8192
```

- `data.max_token_len_per_gpu` has to be at least $longest, the longest row.
- Keep `loss_mask` 0 at the first token of each row: verl concatenates the rows of a batch and shifts the masks by
  one, so a 1 there would train the last token of the row before.
"""

    def columns(self, rows: Rows) -> dict[str, pa.Array]:
        """Float32 with weights, else int8."""
        mask = rows.kept.astype(np.int8) if rows.weights is None else rows.weights
        return {"input_ids": rows.column(rows.ids), "loss_mask": rows.column(mask)}

    def seen(self, row: dict[str, Any]) -> tuple[list[int], list[int], list[float]]:
        """Treat a token with a positive mask as a label."""
        ids, mask = row["input_ids"], row["loss_mask"]
        return ids, labels_from_mask(ids, mask).tolist(), mask
