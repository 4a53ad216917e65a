"""Whether the sequences of a batch leave each other alone: tried on the first batch, as it comes.

Linear attention and convolutions run on over the sequences of a packed row, absolute positions shift with padding on
the left, experts of limited capacity are shared by all. Training then sees other losses than `score` does.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sstoken.in_loop.forward import measure_losses
from sstoken.in_loop.head import HeadLosses
from sstoken.in_loop.layout import Layout
from sstoken.in_loop.weights import at_rest

_TOLERANCE, _TOLERANCE_OF_HALF = 0.01, 0.1
"""Mean difference, nats a token."""


def remarks_on_batch(
    model: nn.Module, head: HeadLosses, inputs: Mapping[str, Any], layout: Layout, rounded: bool
) -> Iterator[str]:
    """What the losses of one sequence show, in its batch and alone. Two forward passes without gradients.

    Args:
        model: a causal language model, not wrapped.
        head: of that model.
        inputs: what its trainer calls it with; `labels` among them.
        layout: of that batch.
        rounded: the model computes in half precision.
    """
    answered = [i for i in range(len(layout.segments)) if layout.offsets[i] < layout.offsets[i + 1]]
    if not answered:
        return
    index = max(answered, key=lambda i: (layout.segments[i][1], -layout.segments[i][2]))
    row, start, stop = layout.segments[index]
    alone = {k: inputs[k][row : row + 1, start:stop] for k in ("input_ids", "labels")}
    if alone["input_ids"].numel() == inputs["input_ids"].numel():
        return
    with at_rest(model):
        batched: Tensor = measure_losses(model, head, inputs, layout)
        batched = batched[layout.offsets[index] : layout.offsets[index + 1]]
        try:
            single = measure_losses(
                model,
                head,
                alone | {"use_cache": False},
                Layout.of(layout.response_mask[row, start:stop][None]),
            )
        except Exception:  # a model that wants more than token ids
            return
    apart = float((batched - single).abs().mean())
    if apart > (_TOLERANCE_OF_HALF if rounded else _TOLERANCE):
        where = "behind others in its row" if start and _behind(layout, row, start) else "padded with others"
        yield (
            f"{type(model).__name__} gives a sequence that is {where} other losses than alone, by {apart:.2f} nats a "
            "token: its layers look over sequences' ends or count padding as positions; train without packing and "
            "padding-free batches, padded on the right"
        )


def _behind(layout: Layout, row: int, start: int) -> bool:
    """Whether another sequence of the row stands before."""
    return any(r == row and stop <= start for r, _, stop in layout.segments)
