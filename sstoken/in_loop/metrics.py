"""Metrics of the selection, accumulated without waiting for the device."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sstoken.in_loop.observation import Observation
from sstoken.in_loop.response_tokens import ResponseTokens

PREFIX = "selection/"
REMEMBERED_EXAMPLES = 50_000
"""Limit on the examples whose last mask is kept, so that memory does not grow with the dataset."""
_NUM_SUMS = 12


@dataclass(frozen=True)
class TrainedBatch:
    """The result of one training forward pass over N response tokens, still on its device."""

    step: int
    tokens: ResponseTokens
    input_ids: Tensor
    """[B, T]."""
    keep: Tensor
    """[N]."""
    loss: Tensor | None
    """[N]; None if nothing was measured."""
    attention: Tensor | None
    """[N]."""
    weight: Tensor | None = None
    """[N]; None: the method gives no weights."""

    def observations(self) -> Iterator[Observation]:
        """Yield an observation of each example that has response tokens."""

        def on_host(values: Tensor | None) -> NDArray[Any] | None:
            return None if values is None else self.tokens.scatter(values).cpu().numpy()

        ids, response = self.input_ids.cpu().numpy(), self.tokens.response_mask.cpu().numpy()
        keep, loss, attention, weight = map(on_host, (self.keep, self.loss, self.attention, self.weight))
        assert keep is not None
        nan = np.float32("nan")
        loss = np.full(keep.shape, nan) if loss is None else np.where(response, loss, nan).astype(np.float32)
        if attention is not None:
            attention = np.where(response, attention, nan).astype(np.float32)
        for index, (row, start, stop) in enumerate(self.tokens.segments):
            if self.tokens.offsets[index] < self.tokens.offsets[index + 1]:
                place = (row, slice(start, stop))
                given = [None if values is None else values[place] for values in (attention, weight)]
                yield Observation(self.step, ids[place], response[place], keep[place], loss[place], *given)


@dataclass
class SelectionMetrics:
    """Sums since the last `read`."""

    _sums: Tensor | None = None
    _seconds: float = 0.0
    _events: list[tuple[Any, Any]] = field(default_factory=list)
    _overlap: list[int] = field(default_factory=lambda: [0, 0])
    _masks: OrderedDict[bytes, bytes] = field(default_factory=OrderedDict)

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Add the time spent in this context, on CUDA by the device's clock."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    @torch.no_grad()
    def count(
        self, keep: Tensor, rel: Tensor | None, attention: Tensor | None, weight: Tensor | None = None
    ) -> None:
        """Add one forward pass; all values are [N]."""
        share = torch.stack([keep, ~keep]).to(_precise(keep.device))
        tokens = share.sum(1)
        nothing = torch.zeros_like(tokens)
        parts = [tokens]
        for values in (rel, attention):
            parts += [nothing, nothing] if values is None else [share @ values.to(share), tokens]
        parts.append(nothing if weight is None else torch.stack([weight.to(tokens).sum(), tokens.sum()]))
        sums = torch.cat(parts)
        self._sums = sums if self._sums is None else self._sums + sums

    def remember(self, observation: Observation) -> None:
        """Compare an example's mask with that of its last visit."""
        key, mask = observation.key, observation.keep_mask
        before = self._masks.get(key)
        if before is not None:
            was_kept = np.unpackbits(np.frombuffer(before, np.uint8), count=mask.size).astype(bool)
            self._overlap[0] += int((was_kept & mask).sum())
            self._overlap[1] += int(mask.sum())
        if before is not None or len(self._masks) < REMEMBERED_EXAMPLES:
            self._masks[key] = np.packbits(mask).tobytes()

    def read(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return the metrics of all processes since the last call, and reset them.

        Args:
            gather: turns a tensor [1, n] into [processes, n].
            device: where `gather` expects its tensors.

        Returns:
            kept_share; weight, the mean over response tokens; rel and attention, means over kept and over dropped
            tokens; mask_overlap, the share of kept tokens that were also kept at their example's last visit; seconds
            that this process spent on the selection. Metrics that were not measured are left out.
        """
        sums = torch.zeros(_NUM_SUMS, device=device) if self._sums is None else self._sums
        local = torch.cat([sums.to(device, _precise(device)), sums.new_tensor(self._overlap).to(device)])
        pairs = gather(local[None]).sum(0).view(-1, 2).tolist()
        tokens, rel, num_rel, attention, num_attention, weight, overlap = pairs
        # `gather` has waited for the events.
        self._seconds += sum(begin.elapsed_time(end) / 1000 for begin, end in self._events)
        found = {"kept_share": (tokens[0], sum(tokens)), "mask_overlap": overlap, "weight": weight}
        for name, totals, counts in (("rel", rel, num_rel), ("attention", attention, num_attention)):
            found[f"{name}_kept"], found[f"{name}_dropped"] = zip(totals, counts, strict=True)
        metrics = {PREFIX + name: top / bottom for name, (top, bottom) in found.items() if bottom}
        if tokens[0]:
            metrics[PREFIX + "seconds"] = self._seconds
        self.drop()
        return metrics

    def drop(self) -> None:
        """Reset the sums."""
        self._sums, self._seconds, self._events, self._overlap = None, 0.0, [], [0, 0]


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
