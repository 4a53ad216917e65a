"""From hidden states to signals: those of one model's distributions, and those that compare two models'.

Shapes: N response tokens of a batch, R positions that are read, D hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sstoken.errors import UsageError
from sstoken.measure.batch import Reading
from sstoken.measure.distribution import OF_DISTRIBUTION, measure_distribution
from sstoken.measure.divergence import measure_divergence
from sstoken.measure.rope import reset
from sstoken.measure.token_loss import OutputHead, intercept_head, read_head
from sstoken.signals import Signal

_AT = {"entropy_at": "entropy", "kl_at": "kl"}
"""Signals of the distribution at the token's own position, by the signal that is measured there."""
READABLE = OF_DISTRIBUTION | {"kl", "reverse_kl", *_AT}
"""What a `Readout` measures, by name without argument."""


class Readout:
    """Measures a model, and the references that its signals name, at chosen positions of a batch."""

    def __init__(
        self, model: Any, references: Mapping[str, Any], wanted: Sequence[Signal], *, kernels: bool = False
    ) -> None:
        """Find the models and signals that are needed.

        Args:
            model: a causal transformers language model.
            references: other models by the NAME of `kl@NAME`; those that no signal names are ignored.
            wanted: signals to measure; those not in `READABLE` are ignored.
            kernels: on CUDA, if only the loss is wanted, measure it with a Triton kernel.

        Raises:
            UsageError: a signal names a checkpoint that was not given.
        """
        self._wanted = [s for s in wanted if s.base in READABLE]
        self._names = [s.argument for s in wanted if s.needs == "second checkpoint" and s.argument]
        if missing := [s.name for s in wanted if s.argument in self._names and s.argument not in references]:
            raise UsageError(f"{missing[0]}: no checkpoint of that name was given; add it to the references")
        self._names = list(dict.fromkeys(self._names))
        self.models = [model, *(references[name] for name in self._names)]
        """The model, then the references."""
        self.at = any(s.base in _AT for s in self._wanted)
        """Whether the distributions at the tokens' own positions are wanted."""
        self.needed = bool(self._wanted)
        """Whether any signal of a distribution is wanted."""
        self._kernels = kernels
        self._heads: list[OutputHead] = []

    def prepare(self) -> None:
        """Read the output heads. Call it once the models have their final attention implementation.

        Raises:
            SstokenError: an output head is not supported.
            UsageError: two vocabularies differ in size.
        """
        if not self.needed:
            return
        self._heads = [read_head(model) for model in self.models]
        size, *others = (head.size for head in self._heads)
        for name, other in zip(self._names, others, strict=True):
            if other != size:
                raise UsageError(
                    f"kl@{name}: its vocabulary has {other} entries, this checkpoint's {size}; only checkpoints with "
                    "the same vocabulary can be compared"
                )

    def read(self, inputs: dict[str, Any], positions: Tensor, *, by_length: bool) -> list[Tensor]:
        """Run each model; return the inputs of its output embedding at `positions` of the flattened batch, [R, D] each.

        `by_length`: whether rotary embeddings depend on the batch's length, so that earlier lengths must be reset.
        """
        found = []
        for model in self.models:
            if by_length:
                reset(model)
            with intercept_head(model) as held:
                model(**inputs)
            found.append(held[-1].flatten(0, 1).index_select(0, positions))
        return found

    def signals(
        self, batches: Sequence[tuple[Reading, list[Tensor]]], to_device: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Compute the signals of the response tokens of several batches, [N] each, by name.

        `batches` holds each batch's reading and what `read` returned for it; `to_device` moves a tensor to the model.
        """
        readings = [reading for reading, _ in batches]
        hidden = [torch.cat(states) for states in zip(*(states for _, states in batches), strict=True)]
        targets = to_device(torch.cat([r.targets for r in readings]))
        bases = {_AT.get(s.base, s.base) for s in self._wanted} & OF_DISTRIBUTION
        found: dict[str, Tensor] = dict(
            measure_distribution(hidden[0], targets, self._heads[0], bases, kernels=self._kernels)
        )
        for name, states, head in zip(self._names, hidden[1:], self._heads[1:], strict=True):
            forward, reverse = measure_divergence(hidden[0], self._heads[0], states, head)
            found |= {f"kl@{name}": forward, f"reverse_kl@{name}": reverse}
        predicting = to_device(_joined(readings, [r.predicting for r in readings]))
        at = to_device(_joined(readings, [r.at for r in readings]))
        signals = {}
        for signal in self._wanted:
            base = _AT.get(signal.base, signal.base)
            values = found[base if signal.argument is None else f"{base}@{signal.argument}"]
            signals[signal.name] = values.index_select(0, at if signal.base in _AT else predicting)
        return signals


def _joined(readings: Sequence[Reading], indices: Sequence[Tensor]) -> Tensor:
    """Turn indices into each batch's positions into indices into all positions."""
    start, joined = 0, []
    for reading, index in zip(readings, indices, strict=True):
        joined.append(index + start)
        start += reading.positions.numel()
    return torch.cat(joined)
