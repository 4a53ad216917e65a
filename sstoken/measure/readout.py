"""From hidden states to the signals of distributions: one model's, and those that compare it with others.

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
"""Signals of the distribution at the token's own position, and what they are there."""
READABLE = OF_DISTRIBUTION | {"kl", "reverse_kl", *_AT}
"""What a `Readout` gives, by name without argument."""


class Readout:
    """Reads a model, and the references that its signals name, at the positions of a batch."""

    def __init__(
        self, model: Any, references: Mapping[str, Any], wanted: Sequence[Signal], *, kernels: bool = False
    ) -> None:
        """Find what is needed.

        Args:
            model: a causal language model of transformers.
            references: other models by the names that `kl@NAME` says; those that no signal names are left alone.
            wanted: what to measure; signals of attention are somebody else's.
            kernels: on CUDA, take the loss alone by a Triton kernel.

        Raises:
            UsageError: a signal names a checkpoint that was not given.
        """
        self._wanted = [s for s in wanted if s.base in READABLE]
        self._names = [s.argument for s in wanted if s.needs == "second checkpoint" and s.argument]
        if missing := [s.name for s in wanted if s.argument in self._names and s.argument not in references]:
            raise UsageError(f"{missing[0]}: no checkpoint of that name was given; give it beside this one")
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
        """Read the output heads; models are loaded and have their attention implementation by now.

        Raises:
            SstokenError: a head is not understood.
            UsageError: two vocabularies differ.
        """
        if not self.needed:
            return
        self._heads = [read_head(model) for model in self.models]
        size, *others = (len(head.weight) for head in self._heads)
        for name, other in zip(self._names, others, strict=True):
            if other != size:
                raise UsageError(
                    f"kl@{name}: its vocabulary has {other} entries, this checkpoint's {size}; two checkpoints can be "
                    "compared that have the same"
                )

    def read(self, inputs: dict[str, Any], positions: Tensor, *, by_length: bool) -> list[Tensor]:
        """What each model feeds to its output embedding, [R, D] each.

        Args:
            inputs: of the models' forward passes.
            positions: [R] of the batch laid flat.
            by_length: rotary embeddings depend on the batch's length: forget earlier ones.
        """
        found = []
        for model in self.models:
            if by_length:
                reset(model)
            with intercept_head(model) as head_input:
                model(**inputs)
            assert head_input.hidden is not None
            found.append(head_input.hidden.flatten(0, 1).index_select(0, positions))
        return found

    def signals(
        self, batches: Sequence[tuple[Reading, list[Tensor]]], to_device: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """The signals of the response tokens of several batches, [N] each, by name.

        Args:
            batches: where each was read, and what `read` gave there.
            to_device: brings a tensor of the host to the models' device.
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
        at = to_device(_joined(readings, [r.at for r in readings if r.at is not None])) if self.at else None
        signals = {}
        for signal in self._wanted:
            where = predicting if signal.base not in _AT else at
            assert where is not None
            base = _AT.get(signal.base, signal.base)
            values = found[base if signal.argument is None else f"{base}@{signal.argument}"]
            signals[signal.name] = values.index_select(0, where)
        return signals


def _joined(readings: Sequence[Reading], indices: Sequence[Tensor]) -> Tensor:
    """Indices into each batch's positions as indices into all of them."""
    start, joined = 0, []
    for reading, index in zip(readings, indices, strict=True):
        joined.append(index + start)
        start += reading.positions.numel()
    return torch.cat(joined)
