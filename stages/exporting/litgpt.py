"""LitGPT."""

from sstoken.stages.exporting.base import ParquetTarget

MODULE = '''"""The rows of `data/` as a LitGPT data module."""

from dataclasses import dataclass

import torch
from datasets import load_dataset
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.prompts import Default
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    """Yields `input_ids` and `labels`; -100 where a token is not trained on. The loss shifts them."""

    def __init__(self, data_files, tokenizer):
        self.rows = load_dataset("parquet", data_files=data_files, split="train").with_format("torch")
        opening = self.rows[0]["input_ids"][:20]
        self.data = [{"instruction": tokenizer.decode(opening)}]  # what LitGPT goes on from when it shows a sample

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        counts = {"raw": len(row["input_ids"]), "raw_plus_prompt_template": len(row["input_ids"])}
        return {"input_ids": row["input_ids"].long(), "labels": row["labels"].long(), "token_counts": counts}


@dataclass
class MaskedData(DataModule):
    """Trains on `data_files`, and validates on `val_files` (by default on the same rows)."""

    data_files: str
    val_files: str | None = None
    seed: int = 42

    def __post_init__(self):
        super().__init__()
        self.prompt_style = Default()

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None, **kwargs):
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.max_seq_length = max_seq_length or -1

    def setup(self, stage=""):
        self.train_dataset = Rows(self.data_files, self.tokenizer)
        self.test_dataset = Rows(self.val_files or self.data_files, self.tokenizer)

    def _loader(self, rows, shuffle):
        collate = get_sft_collate_fn(max_seq_length=self.max_seq_length)
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(rows, self.batch_size, shuffle=shuffle, generator=order, collate_fn=collate)

    def train_dataloader(self):
        return self._loader(self.train_dataset, shuffle=True)

    def val_dataloader(self):
        return self._loader(self.test_dataset, shuffle=False)
'''


class LitGPT(ParquetTarget):
    """`input_ids, labels`, and a data module."""

    name = "litgpt"
    program = ("masked_data.py", MODULE)
    training = """```bash
PYTHONPATH=. litgpt finetune_full CHECKPOINT --data masked_data.MaskedData \\
    --data.data_files 'data/*.parquet'
```

CHECKPOINT is MODEL converted by `litgpt convert_to_litgpt` or `litgpt download`; `finetune_lora` works the same way.

- Without `--data.val_files` it validates on the rows it trains on.
- `--train.max_seq_length` below $longest, the longest row, cuts rows.
- LitGPT does not pack rows for fine-tuning.
"""
