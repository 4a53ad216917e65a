"""Batch planning: which sequences go through the model together."""

from collections.abc import Hashable, Sequence


def plan_padded(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group sequences of similar length so that each padded batch holds at most `batch_tokens` positions.

    A longer sequence is a batch of its own. The plan depends on the arguments alone: indices into `lengths`, longest
    sequences first, so that a batch that is too large fails at once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def plan_packed(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group sequences, as indices into `lengths`, in order; each packed batch holds at most `batch_tokens` tokens.

    A longer sequence is a batch of its own.
    """
    batches: list[list[int]] = []
    tokens = 0
    for index, length in enumerate(lengths):
        if not batches or tokens + length > batch_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += length
    return batches


def by_class(indices: Sequence[int], classes: Sequence[Hashable]) -> list[list[int]]:
    """Group indices by the class of each, in the order in which classes first appear."""
    groups: dict[Hashable, list[int]] = {}
    for index, kind in zip(indices, classes, strict=True):
        groups.setdefault(kind, []).append(index)
    return list(groups.values())
