"""The response tokens of a batch and their positions, found on the host before the forward pass.

Shapes: B rows, T positions, E examples (segments) of the batch, N response tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sstoken.errors import SstokenError
from sstoken.labels import IGNORED_LABEL
from sstoken.measure.prompt_attention import Segment
from sstoken.selection import IntArray


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of a batch, example by example."""

    segments: tuple[Segment, ...]
    """E examples: row, first position, one past the last."""
    response_mask: Tensor
    """[B, T] bool; False at each example's first token, which nothing predicts."""
    positions: Tensor
    """[N] index of each response token in the flattened batch."""
    example: Tensor
    """[N] index of each response token's example."""
    offsets: tuple[int, ...]
    """[E + 1]: example e has the tokens `offsets[e]:offsets[e + 1]` of the N."""
    places: IntArray
    """[N] on the host: each response token's position in its example, prompt included."""

    @classmethod
    def of(
        cls, response_mask: Tensor, segments: Sequence[Segment] | None = None, device: Any = None
    ) -> "ResponseTokens":
        """Find the response tokens of a batch.

        Args:
            response_mask: [B, T] bool, on any device. A sequence's first token is never a response token, as nothing
                predicts it.
            segments: the sequences, in the order of the batch; None: each row is one.
            device: of the result's tensors; None: the mask's.
        """
        device = response_mask.device if device is None else device
        mask_BT = response_mask.cpu().numpy()
        if segments is None:
            segments = [(row, 0, mask_BT.shape[1]) for row in range(mask_BT.shape[0])]
        example_BT, place_BT = np.full((2, *mask_BT.shape), -1, dtype=np.int64)
        for index, (row, start, stop) in enumerate(segments):
            example_BT[row, start + 1 : stop] = index
            place_BT[row, start + 1 : stop] = np.arange(1, stop - start)
        mask_BT = mask_BT & (example_BT >= 0)
        counts = np.bincount(example_BT[mask_BT], minlength=len(segments))
        return cls(
            segments=tuple(segments),
            response_mask=torch.from_numpy(mask_BT).to(device),
            positions=torch.from_numpy(np.flatnonzero(mask_BT)).to(device),
            example=torch.from_numpy(example_BT[mask_BT]).to(device),
            offsets=(0, *np.cumsum(counts).tolist()),
            places=place_BT[mask_BT],
        )

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.offsets[-1]

    def units(self, scope: str) -> IntArray:
        """Return the offsets [U + 1] of the units within which a method ranks tokens.

        Args:
            scope: `turn`: each run of response tokens is a unit; `batch`: the batch is one; otherwise each example is.
        """
        offsets = np.asarray(self.offsets, dtype=np.int64)
        if scope == "batch":
            return np.array([0, self.num_tokens], dtype=np.int64)
        if scope != "turn":
            return offsets
        breaks = np.flatnonzero(np.diff(self.places) != 1) + 1
        return np.union1d(offsets, breaks)

    def gather(self, values_BT: Tensor) -> Tensor:
        """Gather the response tokens' values [N] from [B, T]."""
        return values_BT.reshape(-1)[self.positions]

    def scatter(self, values_N: Tensor) -> Tensor:
        """Scatter the response tokens' values [N] to [B, T], 0 or False elsewhere."""
        flat = values_N.new_zeros(self.response_mask.numel())
        return flat.index_copy(0, self.positions, values_N).view(self.response_mask.shape)


def find_response_tokens(batch: Mapping[str, Any], device: Any = None) -> ResponseTokens:
    """Find the response tokens of a collated batch from its `labels` and sequence boundaries.

    Raises:
        SstokenError: the batch has no labels, or an attention mask that is not [B, T].
    """
    labels = batch.get("labels")
    if labels is None:
        raise SstokenError(
            "the batch has no labels; the data collator must provide them, -100 off the response"
        )
    return ResponseTokens.of(
        labels.cpu() != IGNORED_LABEL, find_segments(batch), labels.device if device is None else device
    )


def find_segments(batch: Mapping[str, Any]) -> list[Segment]:
    """Find the sequences of a batch: row, first position, one past the last.

    Padding-free batches mark sequences by `cu_seq_lens_q` or by `position_ids` that restart; padded batches (on either
    side) by `attention_mask`. Without any of these, each row is one sequence.

    Args:
        batch: `input_ids` [B, T] and any of `cu_seq_lens_q` [S + 1], `attention_mask` [B, T], `position_ids`
            [B or 1, T].

    Raises:
        SstokenError: `attention_mask` has more than two dimensions.
    """
    num_rows, length = batch["input_ids"].shape
    attention_mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
    if batch.get("cu_seq_lens_q") is not None and num_rows == 1:
        offsets = batch["cu_seq_lens_q"].tolist()
        return [(0, a, b) for a, b in pairwise(offsets) if b > a]
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            raise SstokenError(
                f"attention_mask has {attention_mask.ndim} dimensions; in-loop selection needs [rows, positions], or "
                "none and position_ids"
            )
        return _runs(attention_mask.cpu().numpy().astype(bool), None)
    everywhere = np.ones((num_rows, length), dtype=bool)
    if position_ids is None:
        return _runs(everywhere, None)
    return _runs(everywhere, position_ids.expand(num_rows, -1).cpu().numpy())


def _runs(real_BT: NDArray[np.bool_], positions_BT: NDArray[np.int64] | None) -> list[Segment]:
    """Find the runs of real (not padding) tokens; positions, if given, must increase by one within a run."""
    begins = real_BT.copy()
    begins[:, 1:] &= ~real_BT[:, :-1]
    if positions_BT is not None:
        begins[:, 1:] |= real_BT[:, 1:] & (np.diff(positions_BT) != 1)
    ends = real_BT.copy()
    ends[:, :-1] &= ~real_BT[:, 1:] | begins[:, 1:]
    return [
        (int(row), int(start), int(stop) + 1)
        for (row, start), (_, stop) in zip(np.argwhere(begins), np.argwhere(ends), strict=True)
    ]
