"""Megatron Bridge."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pyarrow as pa

from sstoken.errors import SstokenError
from sstoken.labels import IGNORED_LABEL, labels_from_mask
from sstoken.stages import tables
from sstoken.stages.exporting.base import FAST, Facts, ParquetTarget
from sstoken.stages.exporting.rows import Rows

_PACK = 4096
"""Tokens of a pack at most, unless one row is longer."""
_PACKS_PER_GROUP = 64
"""Packs of a row group: the trainer reads a whole one for each pack that it draws."""


class MegatronBridge(ParquetTarget):
    """Packs of rows, in order: `input_ids, loss_mask, seq_start_id`.

    Mask i is about what position i predicts: the trainer drops each row's last position, and takes mask and labels from
    the others without shifting the mask. It trains nothing that its tokenizer's EOS predicts.
    """

    name = "megatron-bridge"
    training = """In the Python of a recipe, replace the dataset:

```python
from megatron.bridge.data.builders import GPTSFTDatasetConfig
from megatron.bridge.data.packing import PackedSequenceSpecs

config.dataset = GPTSFTDatasetConfig(
    dataset_root=".",                      # unused: the packs are here already
    seq_length=$pack,
    enable_offline_packing=True,
    offline_packing_specs=PackedSequenceSpecs(
        packed_sequence_size=$pack,        # at least the longest pack
        packed_train_data_path="data/*.parquet",
    ),
    do_validation=False,
    do_test=False,
)
config.model.seq_length = $pack
config.train.micro_batch_size = 1          # what packs need; MODEL is the recipe's
```

- Each row of `data/` is a pack of whole examples, in the order of `scores/`; `seq_start_id` says where each starts.
- `loss_mask[i]` is 1 where position i predicts a kept token: one to the left of the token itself.
- Keep `answer_only_loss` at its default, True: else it trains on every token.
- It never trains on what follows its tokenizer's EOS within an example; `--check` says so where it matters.
- The packs are not aligned for context parallelism: leave `pad_seq_to_mult` at 1.
"""

    def usage(self, facts: Facts) -> str:
        """Fill in how long packs may be."""
        return Template(self.training).substitute(pack=max(_PACK, facts.longest))

    def write(self, path: Path, rows: Rows) -> None:
        """Write one Parquet file, in small row groups."""
        table = pa.table(self.columns(rows))
        groups = (
            table.slice(start, _PACKS_PER_GROUP) for start in range(0, table.num_rows, _PACKS_PER_GROUP)
        )
        tables.write_row_groups(path, groups, table.schema, None, compression_level=FAST)

    def columns(self, rows: Rows) -> dict[str, pa.Array]:
        """Join rows into packs; shift the mask within each row."""
        starts, firsts = _packs(rows.offsets.tolist())
        offsets = rows.offsets[firsts]
        mask = np.append(rows.kept[1:], False).astype(np.int8)
        mask[rows.offsets[1:] - 1] = 0
        return {
            "input_ids": tables.lists(rows.ids, offsets, tables.IDS),
            "loss_mask": tables.lists(mask, offsets, pa.list_(pa.int8())),
            "seq_start_id": tables.lists(np.array(starts, np.int32), np.array(firsts), tables.IDS),
        }

    def read(self, folder: Path) -> Iterator[pa.Table]:
        """Take packs apart as the trainer does; yield `input_ids` and `labels`, a row for each example.

        Raises:
            SstokenError: the trainer would leave out a token that should be trained.
        """
        from transformers import AutoTokenizer

        eos, count = AutoTokenizer.from_pretrained(folder / "tokenizer").eos_token_id, 0
        for packs in super().read(folder):
            for batch in packs.to_batches(_PACKS_PER_GROUP):
                rows = [row for pack in batch.to_pylist() for row in _rows(pack)]
                for row in rows:
                    if (place := _after_eos(row, eos)) is not None:
                        raise SstokenError(
                            f"{folder}: row {count}: token {place} follows the tokenizer's EOS, and {self.name} never "
                            "trains on what EOS predicts; export to another trainer, or encode with a chat template "
                            "that puts a header before each answer"
                        )
                    count += 1
                yield pa.Table.from_pylist(rows)


def _packs(offsets: Sequence[int]) -> tuple[list[int], list[int]]:
    """Fill packs in the order of the rows.

    Args:
        offsets: [E + 1], where each row starts.

    Returns:
        Where each row starts in its pack, [E], and the first row of each pack, with E at the end.
    """
    starts: list[int] = []
    firsts: list[int] = []
    for row, (start, end) in enumerate(pairwise(offsets)):
        if not firsts or end - offsets[firsts[-1]] > _PACK:
            firsts.append(row)
        starts.append(start - offsets[firsts[-1]])
    return starts, [*firsts, len(starts)]


def _rows(pack: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
    """Yield what the trainer's collator makes of each row of a pack."""
    ids, mask = pack["input_ids"], pack["loss_mask"]
    offsets = [*pack["seq_start_id"], len(ids)]
    for start, end in pairwise(offsets):
        labels = labels_from_mask(ids[start + 1 : end], mask[start : end - 1]).tolist()
        yield {"input_ids": ids[start:end], "labels": [IGNORED_LABEL, *labels]}


def _after_eos(row: dict[str, list[int]], eos: int | None) -> int | None:
    """Return the first trained token of a row that follows EOS; None if there is none."""
    labels = row["labels"]
    after = (
        i for i in range(1, len(labels)) if labels[i] != IGNORED_LABEL and row["input_ids"][i - 1] == eos
    )
    return next(after, None)
