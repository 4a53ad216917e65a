"""Load the masked datasets of consecutive training phases as one dataset."""

from pathlib import Path
from typing import TYPE_CHECKING

from sstoken.errors import UsageError
from sstoken.stages import tables
from sstoken.stages.manifest import MANIFEST

if TYPE_CHECKING:
    from datasets import Dataset


def phase_name(number: int) -> str:
    """Return the folder name of a phase, from 1."""
    return f"phase-{number}"


def load_phases(folder: str | Path, *, seed: int | None = None, examples: int | None = None) -> "Dataset":
    """Load all phases one after the other, in training order, with a column `phase` counted from 1.

    Train on it in this order: `SFTConfig(train_sampling_strategy="sequential")`. Each phase has every example, so one
    epoch sees each example once per phase, unless `examples` takes fewer.

    Args:
        folder: the folder that `phases` wrote.
        seed: seed for shuffling within each phase; None: keep the order of the data.
        examples: most examples to take from each phase; None: all.

    Raises:
        UsageError: there is no finished phase, or one is missing.
    """
    from datasets import concatenate_datasets, load_dataset

    names = {path.parent.name for path in Path(folder).glob(f"phase-*/{MANIFEST}")}
    expected = [phase_name(number) for number in range(1, len(names) + 1)]
    if not names or set(expected) != names:
        found = ", ".join(sorted(names)) or "none"
        raise UsageError(
            f"{folder}: phases are missing (finished: {found}); name the folder that `phases` wrote"
        )
    loaded = []
    for number, name in enumerate(expected, 1):
        files = [str(path) for path in tables.parts(Path(folder) / name)]
        rows = load_dataset("parquet", data_files=files, split="train")
        if seed is not None:
            rows = rows.shuffle(seed=seed + number)
        rows = rows.select(range(min(len(rows), examples or len(rows))))
        loaded.append(rows.add_column("phase", [number] * len(rows)))
    return concatenate_datasets(loaded)
