"""Metrics of the selection, summed up without waiting for the device."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sstoken.in_loop.observation import Observation
from sstoken.in_loop.response_tokens import ResponseTokens

PREFIX = "selection/"
REMEMBERED_EXAMPLES = 50_000
"""At most this many examples' last masks are remembered, so that memory does not grow with the dataset."""
_NUM_SUMS = 12


@dataclass(frozen=True)
class TrainedBatch:
    """The result of one training forward pass, still on its device; N response tokens."""

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
        ids = self.input_ids.cpu().numpy()
        response = self.tokens.response_mask.cpu().numpy()
        keep = self.tokens.scatter(self.keep).cpu().numpy()
        loss = np.full(keep.shape, np.nan, np.float32)
        if self.loss is not None:
            loss = self.tokens.scatter(self.loss.float()).cpu().numpy()
        attention = None
        if self.attention is not None:
            attention = self.tokens.scatter(self.attention.float()).cpu().numpy()
        weight = None
        if self.weight is not None:
            weight = self.tokens.scatter(self.weight).cpu().numpy()
        for index, (row, start, stop) in enumerate(self.tokens.segments):
            if self.tokens.offsets[index] == self.tokens.offsets[index + 1]:
                continue
            place = (row, slice(start, stop))
            mask = response[place]
            yield Observation(
                self.step,
                ids[place],
                mask,
                keep[place],
                np.where(mask, loss[place], np.float32("nan")),
                None if attention is None else np.where(mask, attention[place], np.float32("nan")),
                None if weight is None else weight[place],
            )


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
        """Add the time spent in this context, by the device's clock on CUDA."""
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
        parts = [tokens]
        for values in (rel, attention):
            parts += [torch.zeros_like(tokens)] * 2 if values is None else [share @ values.to(share), tokens]
        parts.append(
            torch.zeros_like(tokens)
            if weight is None
            else torch.stack([weight.to(tokens).sum(), tokens.sum()])
        )
        sums = torch.cat(parts)
        self._sums = sums if self._sums is None else self._sums + sums

    def remember(self, observation: Observation) -> None:
        """Compare an example's mask with the one of its last visit."""
        key, mask = observation.key, observation.keep_mask
        before = self._masks.get(key)
        if before is not None:
            was_kept = np.unpackbits(np.frombuffer(before, np.uint8), count=mask.size).astype(bool)
            self._overlap[0] += int((was_kept & mask).sum())
            self._overlap[1] += int(mask.sum())
        if before is not None or len(self._masks) < REMEMBERED_EXAMPLES:
            self._masks[key] = np.packbits(mask).tobytes()

    def read(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return the metrics of all processes since the last call, and start anew.

        Args:
            gather: turns a tensor [1, n] into [processes, n].
            device: where `gather` wants its tensors.

        Returns:
            kept_share; weight, the mean over response tokens; the means of rel and attention over kept and over
            dropped tokens; mask_overlap, the share of
            kept tokens that were also kept at their example's last visit; seconds that this process spent on the
            selection. Metrics that were not measured are left out.
        """
        sums = torch.zeros(_NUM_SUMS, device=device) if self._sums is None else self._sums
        local = torch.cat([sums.to(device, _precise(device)), sums.new_tensor(self._overlap).to(device)])
        pairs = gather(local[None]).sum(0).view(-1, 2).tolist()
        tokens, rel, num_rel, attention, num_attention, weight, overlap = pairs
        self._seconds += sum(
            begin.elapsed_time(end) / 1000 for begin, end in self._events
        )  # `gather` waited for them
        found = {"kept_share": (tokens[0], sum(tokens)), "mask_overlap": overlap, "weight": weight}
        for name, totals, counts in (("rel", rel, num_rel), ("attention", attention, num_attention)):
            found |= {
                f"{name}_{kept}": pair
                for kept, *pair in zip(("kept", "dropped"), totals, counts, strict=True)
            }
        metrics = {PREFIX + name: top / bottom for name, (top, bottom) in found.items() if bottom}
        if tokens[0]:
            metrics[PREFIX + "seconds"] = self._seconds
        self._sums, self._seconds, self._events, self._overlap = None, 0.0, [], [0, 0]
        return metrics


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
