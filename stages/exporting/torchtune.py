"""torchtune."""

from sstoken.stages.exporting.base import ParquetTarget

MODULE = '''"""The rows of `data/` as a torchtune dataset."""

from dataclasses import dataclass

from datasets import load_dataset
from torch.utils.data import Dataset
from torchtune.datasets import PackedDataset


class MaskedDataset(Dataset):
    """Gives `tokens` and `labels`; -100 where a token is not trained on. The recipe shifts them."""

    def __init__(self, data_files):
        self.rows = load_dataset("parquet", data_files=data_files, split="train")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {"tokens": row["input_ids"], "labels": row["labels"]}


def masked_dataset(tokenizer, data_files, packed=False):
    """A `dataset` component; packs hold `tokenizer.max_seq_len` tokens."""
    rows = MaskedDataset(data_files)
    if not packed:
        return rows
    return PackedDataset(rows, max_seq_len=tokenizer.max_seq_len, padding_idx=tokenizer.pad_id)


@dataclass
class NoTokenizer:
    """A `tokenizer` component for rows that are tokens already: how to pad, and how long a pack is."""

    pad_id: int = 0
    max_seq_len: int | None = None
'''


class Torchtune(ParquetTarget):
    """`input_ids, labels`, and a dataset class.

    torchtune's transforms use a `mask` that is True where a token is *not* trained; the class yields labels, which
    are unambiguous.
    """

    name = "torchtune"
    program = ("masked_dataset.py", MODULE)
    training = """Take a configuration of your model (`tune cp ...`) and replace these sections:

```yaml
tokenizer:
  _component_: masked_dataset.NoTokenizer
  pad_id: 0
  max_seq_len: $longest       # at least the longest row; the length of a pack
dataset:
  _component_: masked_dataset.masked_dataset
  data_files: data/*.parquet
  packed: false                      # true packs
```

```bash
PYTHONPATH=. tune run full_finetune_single_device --config my_config.yaml
```

If you turn the labels into torchtune's `mask` in a transform of your own, remember that there True means *not* trained.
"""
