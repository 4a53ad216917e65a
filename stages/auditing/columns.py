"""Recognise the columns of a tokenised dataset by the names that trainers use."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

IDS = ("input_ids", "token_ids", "tokens")
LABELS = ("labels", "label_ids", "target_ids")
OUTER = ("completion_mask",)
"""Masks that limit others: TRL trains what both this and the assistant's mask allow."""
MASKS = (
    "loss_mask",
    "assistant_masks",
    "assistant_mask",
    "assistant_tokens_mask",
    "label_mask",
    "train_mask",
    "keep_mask",
    "loss_weights",
    "loss_scale",
    "weights",
    "weight",
    *OUTER,
)
"""1, true or a weight above 0 where a token is trained."""
BESIDE = ("attention_mask", "position_ids", "seq_lengths", "seq_lens", "example_id", "id")
_RESPONSE = "response_mask"
_NOT_TRAINED = "mask"
"""torchtune's mask, beside `tokens`: true where a token is *not* trained."""


@dataclass(frozen=True)
class Columns:
    """The columns of a tokenised dataset."""

    ids: str
    labels: str | None = None
    masks: tuple[str, ...] = ()
    inverted: tuple[str, ...] = ()
    """Masks that are true where a token is not trained."""
    response: str | None = None
    """Mask of the assistant's tokens, if the other columns select some of them."""
    all: tuple[str, ...] = ()
    """Every column of the dataset."""
    shifted: bool = False
    """Label i is the token after token i, as the trainer expects."""
    selected: bool = False
    """The trained tokens are a selection of the response."""
    nested: bool = False
    """As in ms-swift, a message holds the ids and the loss scale."""

    @property
    def outer(self) -> tuple[str, ...]:
        """The masks that only limit others."""
        return tuple(name for name in self.masks if name in OUTER)

    @property
    def wanted(self) -> list[str]:
        """The columns to read."""
        known = {self.ids, self.labels, *self.masks, *self.inverted, self.response, *BESIDE}
        known |= {"messages"} if self.nested else set()
        return [name for name in self.all if name in known]

    def of(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the columns of a row."""
        if not self.nested:
            return values
        found = _within_message(values.get("messages"))
        return {} if found is None else found


def find(names: Iterable[str], first: Mapping[str, Any] | None = None) -> Columns | None:
    """Find the columns of a tokenised dataset; None: it has no token ids.

    Args:
        names: all columns.
        first: the first row, in which a message may hold the ids.
    """
    names = tuple(names)
    ids = next((name for name in IDS if name in names), None)
    if ids is None:
        inside = _within_message((first or {}).get("messages"))
        if inside is None:
            return None
        found = find(inside)
        return None if found is None else replace(found, all=names, nested=True)
    labels = next((name for name in LABELS if name in names), None)
    masks = tuple(name for name in MASKS if name in names)
    response: str | None = _RESPONSE if _RESPONSE in names else None
    if response and labels is None and not masks:
        masks, response = (response,), None
    inverted = (
        (_NOT_TRAINED,) if ids == "tokens" and not masks and labels is None and _NOT_TRAINED in names else ()
    )
    return Columns(ids, labels, masks, inverted, response, names, selected=response is not None)


def _within_message(messages: Any) -> Mapping[str, Any] | None:
    if not isinstance(messages, (list, tuple)) or len(messages) != 1:
        return None
    content = messages[0].get("content") if isinstance(messages[0], Mapping) else None
    return content if isinstance(content, Mapping) and "token_ids" in content else None
