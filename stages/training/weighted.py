"""Train on weighted tokens: the loss is the sum of weight times cross-entropy over the number of trained tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad
from transformers import Trainer

from sstoken.labels import IGNORED_LABEL

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


def with_weights(collate: Collate) -> Collate:
    """Return a collator for rows with `weights`, which are padded on the right with 0."""

    def collate_all(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        weights = [torch.tensor(row["weights"]) for row in rows]
        batch = collate([{key: row[key] for key in row if key != "weights"} for row in rows])
        length = batch["input_ids"].shape[1]
        batch["weights"] = torch.stack([pad(w, (0, length - len(w))) for w in weights])
        return batch

    return collate_all


class WeightedTrainer(Trainer):
    """A trainer whose batches have `weights` [B, T], which are constants for the gradient and may be negative."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=self._weighted_loss, **kwargs)
        self._weights: torch.Tensor | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.compute_loss`."""
        self._weights = inputs.pop("weights")
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _weighted_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        assert self._weights is not None
        logits = outputs["logits"][:, :-1].float()
        predicted = labels[:, 1:]
        loss = cross_entropy(
            logits.flatten(0, 1), predicted.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
        )
        total = (loss * self._weights[:, 1:].flatten()).sum()
        trained: torch.Tensor | int = (predicted != IGNORED_LABEL).sum()
        return total / (trained if num_items_in_batch is None else num_items_in_batch)
