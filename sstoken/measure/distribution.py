"""Signals of the distribution that predicts a token: hidden states through the output embedding in tiles.

Signals come from the same tiles, which stay in the CPU's cache. Full rows of logits are computed for signals that their
entry defines (`Signal.of_row`), a few rows at a time, and for the few rows that need them.

Shapes: N rows, D hidden size, V vocabulary, W entries of a tile, S of a sample.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from sstoken.measure.expected_rank import ExpectedRank
from sstoken.measure.precision import without_autocast
from sstoken.measure.token_loss import (
    Head,
    OutputHead,
    copy_target_logits,
    row_tiles,
    tile_elements,
    tiles,
    token_losses,
)
from sstoken.measure.top_logits import TopLogits
from sstoken.signals import SIGNALS

RANKS = frozenset({"rank", "ties", "mass_above"})
"""Signals that compare all logits with the token's own."""
BY_ROW = {signal.name: signal.of_row for signal in SIGNALS.values() if signal.of_row is not None}
"""`Signal.of_row` of the signals that have one, by name."""
OF_DISTRIBUTION = (
    frozenset({"loss", "entropy", "entropy_top20", "max_prob", "sum_p2", "expected_rank", *BY_ROW}) | RANKS
)
"""What `measure_distribution` measures."""
_COUNTS = {signal.name for signal in SIGNALS.values() if signal.dtype == "int32"}
_TOP = 20
_SAMPLE = 512
"""Vocabulary entries in a sample; one in 64 in a large vocabulary."""
_MOST_ABOVE = 40.0
"""Rows with a logit further above the sample's largest are measured again: squared exponentials would overflow."""
_LEAST = -1e9
"""Lowest log-probability in a sum: its token has probability 0 in any case, and 0 * -inf would be NaN."""
_MOST_OFF = 1e-4
"""Bound on the relative error of an expected rank from buckets; the actual error is about a tenth of it."""
_ROWS_PER_PRODUCT = 64
"""A product of this many rows and columns rounds like the tiles' products, except at some of their edges."""


@without_autocast
def measure_distribution(
    hidden: Tensor, targets: Tensor, head: Head, names: Collection[str], *, kernels: bool = False
) -> dict[str, Tensor]:
    """Measure signals of the distributions over the vocabulary that predict N tokens.

    Args:
        hidden: [N, D]; row i is the state that predicts `targets[i]`.
        targets: [N] token ids.
        head: the output head.
        names: from `OF_DISTRIBUTION`.
        kernels: on CUDA, if only the loss is wanted, measure it with a Triton kernel.

    Returns:
        [N] each, by name; fp32 (float64 where the model is), counts int32.
    """
    if {*names} <= {"loss"}:
        if kernels and isinstance(head, OutputHead):
            from sstoken.measure.cuda.choices import token_losses_by_kernel

            return {name: token_losses_by_kernel(hidden, targets, head) for name in names}
        return {name: token_losses(hidden, targets, head) for name in names}
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    found = {
        name: hidden.new_empty(hidden.shape[0], dtype=torch.int32 if name in _COUNTS else dtype)
        for name in names
    }
    by_row, in_tiles = BY_ROW.keys() & found.keys(), found.keys() - BY_ROW.keys()
    for rows in row_tiles(hidden.shape[0]) if in_tiles else ():
        for name, values in _measure_rows(hidden[rows], targets[rows], head, in_tiles).items():
            found[name][rows] = values
    for rows, logits in _whole_rows(hidden, head) if by_row else ():
        log_p = logits.log_softmax(1).clamp_min_(_LEAST)
        for name in by_row:
            found[name][rows] = BY_ROW[name](log_p, targets[rows])
    return found


def _measure_rows(
    hidden: Tensor, targets: Tensor, head: Head, names: Collection[str], above: Tensor | None = None
) -> dict[str, Tensor]:
    """Measure the rows of one tile; `above` [N]: their largest logits, if known."""
    ranked = not RANKS.isdisjoint(names)
    sums = _Sums(
        sample=_sample(hidden, head),
        shift=above,
        own=_own_logits(hidden, targets, head) if ranked else None,
        top=TopLogits(_TOP) if "entropy_top20" in names else None,
        expected_rank="expected_rank" in names,
    )
    for start, logits in tiles(hidden, head):
        sums.see(logits, start, targets)
    log_total, total = sums.total.log(), sums.total
    highest = (sums.largest - sums.shift).double()
    found = {
        "entropy": (log_total - sums.weighted / total).clamp_min_(0),
        "sum_p2": sums.squares / total.square(),
        "max_prob": highest.exp() / total,
    }
    if "loss" in names:
        found["loss"] = sums.shift + log_total - sums.target
    if sums.top is not None:
        found["entropy_top20"] = torch.special.entr(sums.top.values().double().softmax(1)).sum(1)
    if sums.expected_rank is not None:
        found["expected_rank"], off = sums.expected_rank.values()
        rows = (~(off < _MOST_OFF)).nonzero()[:, 0]
        found["expected_rank"][rows] = _expected_rank_by_row(hidden[rows], head)
    if ranked:
        found["rank"] = sums.greater
        found["ties"] = sums.at_least - sums.greater - 1
        found["mass_above"] = (sums.above / total).clamp_max_(1)
        rows = (~sums.agree).nonzero()[:, 0]
        for name, values in _ranks_by_row(hidden[rows], targets[rows], head).items():
            found[name][rows] = values
    if above is None and (rows := (highest > _MOST_ABOVE).nonzero()[:, 0]).numel():
        again = _measure_rows(hidden[rows], targets[rows], head, names, sums.largest[rows])
        for name, values in again.items():
            found[name][rows] = values
    return {name: found[name] for name in names}


class _Sums:
    """Sums over each row's logits z and their exponentials e = exp(z - shift); [N] float64 each."""

    def __init__(
        self,
        sample: Tensor,
        shift: Tensor | None,
        own: Tensor | None,
        top: TopLogits | None,
        expected_rank: bool,
    ) -> None:
        """Start at 0, from some of the logits, [N, S].

        Args:
            sample: [N, S], some of the logits.
            shift: [N]; None: the largest of the sample.
            own: [N], the targets' logits, if ranks are wanted.
            top: sees every tile, if given.
            expected_rank: whether it is wanted.
        """
        zeros = torch.zeros(sample.shape[0], dtype=torch.float64, device=sample.device)
        self.shift = sample.amax(1) if shift is None else shift
        self.own, self.top = own, top
        self.expected_rank = ExpectedRank(sample - self.shift[:, None]) if expected_rank else None
        self.largest = self.shift.clone()
        """The largest z."""
        self.total = zeros.clone()
        """The sum of e."""
        self.weighted = zeros.clone()
        """The sum of e * (z - shift)."""
        self.squares = zeros.clone()
        """The sum of e * e."""
        self.above = zeros.clone()
        """The sum of e over all z above the target's."""
        self.greater = zeros.clone()
        """The number of z above the target's."""
        self.at_least = zeros.clone()
        """The number of z at or above the target's, itself included."""
        self.agree = torch.ones_like(zeros, dtype=torch.bool)
        """Whether the target's logit in its tile equals `own`, with which all were compared."""
        self.target = zeros.clone()
        """The target's z, out of its tile."""
        self._memory: tuple[Tensor, Tensor] | None = None

    def see(self, logits: Tensor, start: int, targets: Tensor) -> None:
        """Add a tile: logits [N, W] of the entries from `start` on. They are overwritten."""
        rows, width = logits.shape
        if self._memory is None:  # no tile is wider than the first
            self._memory = (torch.empty_like(logits).flatten(), torch.empty_like(logits).flatten())
        exponentials, larger = (m[: rows * width].view(rows, width) for m in self._memory)
        own = self.own
        inside = copy_target_logits(self.target, logits, start, targets)
        self.largest = torch.maximum(self.largest, logits.amax(1))
        if self.top is not None:
            self.top.see(logits)
        if own is not None:
            self.agree[inside] = self.target[inside] == own[inside]
            torch.ge(logits, own[:, None], out=larger)
            self.at_least += larger.sum(1)
            torch.gt(logits, own[:, None], out=larger)
            self.greater += larger.sum(1)
        logits.sub_(self.shift[:, None]).clamp_min_(_LEAST)
        torch.exp(logits, out=exponentials)
        self.total += exponentials.sum(1)  # a product with ones would have ten times the rounding error
        self.weighted += torch.linalg.vecdot(logits, exponentials)
        self.squares += torch.linalg.vecdot(exponentials, exponentials)
        if own is not None:
            self.above += torch.linalg.vecdot(larger, exponentials)
        if self.expected_rank is not None:
            self.expected_rank.see(logits, exponentials)


def _sample(hidden: Tensor, head: Head) -> Tensor:
    """Logits [N, S] of entries spread over the vocabulary."""
    step = max(1, min(64, head.size // 32), head.size // _SAMPLE)
    return head.select(slice(None, None, step)).logits(hidden)


def _own_logits(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """The targets' logits [N], from products that round like the tiles' instead of from a sum of their own."""
    parts = zip(hidden.split(_ROWS_PER_PRODUCT), targets.split(_ROWS_PER_PRODUCT), strict=True)
    return torch.cat([head.select(ids).logits(rows).diagonal() for rows, ids in parts])


def _whole_rows(hidden: Tensor, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Yield full rows of logits [R, V], a few at a time, with their place among the N."""
    most = max(_ROWS_PER_PRODUCT, tile_elements(hidden.device) // head.size)
    for start in range(0, hidden.shape[0], most):
        rows = slice(start, start + most)
        yield rows, head.logits(hidden[rows])


def _ranks_by_row(hidden: Tensor, targets: Tensor, head: Head) -> dict[str, Tensor]:
    """Measure `RANKS` for a few rows [N, D], float64, from full rows of logits."""
    found = {name: hidden.new_zeros(hidden.shape[0], dtype=torch.float64) for name in RANKS}
    for rows, logits in _whole_rows(hidden, head):
        own = logits.gather(1, targets[rows, None])
        larger = logits > own
        found["rank"][rows] = larger.sum(1).double()
        found["ties"][rows] = (logits == own).sum(1).double() - 1
        found["mass_above"][rows] = (logits.double().softmax(1) * larger).sum(1)
    return found


def _expected_rank_by_row(hidden: Tensor, head: Head) -> Tensor:
    """Sum of rank times probability, [N] float64, from sorted rows of logits."""
    found = hidden.new_zeros(hidden.shape[0], dtype=torch.float64)
    for rows, logits in _whole_rows(hidden, head):
        ranks = torch.arange(logits.shape[1], 0, -1, dtype=torch.float64, device=logits.device)
        if logits.device.type == "cpu":
            # numpy sorts several times faster than torch, which also sorts indices.
            array = logits.numpy()
            array.sort(axis=1)
        else:
            logits = logits.sort(1).values
        weights = (logits - logits[:, -1:]).exp_().double()
        found[rows] = (weights @ ranks) / weights.sum(1)
    return found
