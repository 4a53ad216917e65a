"""Where the response tokens of a batch stand, found on the host before the forward pass.

Shapes: B rows, T positions, E examples (segments) of the batch, N response tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sstoken.errors import SstokenError
from sstoken.measure.prompt_attention import Segment
from sstoken.selection import num_kept

IGNORED = -100
"""Label of a token that is not a response token."""


@dataclass(frozen=True)
class Layout:
    """A batch's examples and their response tokens, example by example."""

    segments: tuple[Segment, ...]
    """E examples: row, first position, one past the last."""
    response_mask: Tensor
    """[B, T] bool."""
    positions: Tensor
    """[N] index of each response token in the flattened batch."""
    example: Tensor
    """[N] which example it belongs to."""
    offsets: tuple[int, ...]
    """[E + 1], where each example's tokens start among the N."""

    @classmethod
    def of(
        cls, response_mask: Tensor, segments: Sequence[Segment] | None = None, device: Any = None
    ) -> "Layout":
        """The layout of a batch.

        Args:
            response_mask: [B, T] bool, on the CPU or not. A sequence's first token is predicted from nothing: it
                is no response token whatever the mask says.
            segments: the sequences, in the order of the batch; None: each row is one.
            device: where the tensors go; None: where the mask is.
        """
        device = response_mask.device if device is None else device
        mask_BT = response_mask.cpu().numpy()
        if segments is None:
            segments = [(row, 0, mask_BT.shape[1]) for row in range(mask_BT.shape[0])]
        example_BT = np.full(mask_BT.shape, -1, dtype=np.int64)
        for index, (row, start, stop) in enumerate(segments):
            example_BT[row, start + 1 : stop] = index
        mask_BT = mask_BT & (example_BT >= 0)
        counts = np.bincount(example_BT[mask_BT], minlength=len(segments))
        return cls(
            segments=tuple(segments),
            response_mask=torch.from_numpy(mask_BT).to(device),
            positions=torch.from_numpy(np.flatnonzero(mask_BT)).to(device),
            example=torch.from_numpy(example_BT[mask_BT]).to(device),
            offsets=(0, *np.cumsum(counts).tolist()),
        )

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.offsets[-1]

    def quotas(self, rho: float, scope: str = "sample") -> list[int]:
        """How many tokens are kept of each example, or of all together (`scope` batch: one number)."""
        offsets = self.offsets if scope == "sample" else (0, self.num_tokens)
        return [num_kept(b - a, rho) for a, b in zip(offsets, offsets[1:], strict=False)]

    def gather(self, values_BT: Tensor) -> Tensor:
        """The response tokens' values [N] out of [B, T]."""
        return values_BT.reshape(-1)[self.positions]

    def scatter(self, values_N: Tensor) -> Tensor:
        """Values [B, T] with the response tokens' [N] in their places, 0 or False elsewhere."""
        flat = values_N.new_zeros(self.response_mask.numel())
        return flat.index_copy(0, self.positions, values_N).view(self.response_mask.shape)


def layout_of_batch(batch: Mapping[str, Any], device: Any = None) -> Layout:
    """The layout of what a data collator made: `labels` and what says where its sequences stand.

    Raises:
        SstokenError: there are no labels, or the attention mask does not say where sequences stand.
    """
    labels = batch.get("labels")
    if labels is None:
        raise SstokenError("the batch has no labels; the data collator must give them, -100 off the response")
    return Layout.of(
        labels.cpu() != IGNORED, find_segments(batch), labels.device if device is None else device
    )


def find_segments(batch: Mapping[str, Any]) -> list[Segment]:
    """The sequences of a batch, as the model will see them.

    Padding-free batches say it by `cu_seq_lens_q` or by `position_ids` that start again; padded ones, on either
    side, by `attention_mask`; without any of these each row is one sequence.

    Args:
        batch: `input_ids` [B, T] and any of `cu_seq_lens_q` [S + 1], `attention_mask` [B, T], `position_ids`
            [B or 1, T].

    Raises:
        SstokenError: `attention_mask` has more than two dimensions.
    """
    num_rows, length = batch["input_ids"].shape
    attention_mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
    bounds = batch.get("cu_seq_lens_q")
    if bounds is not None and num_rows == 1:
        ends = bounds.tolist()
        return [(0, a, b) for a, b in zip(ends, ends[1:], strict=False) if b > a]
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
    """The stretches of real tokens whose positions, if given, go up by one."""
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
