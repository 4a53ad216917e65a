"""Signals of the distribution that predicts a token: hidden states through the output embedding in tiles.

All signals come from the same tiles, products that stay in the cache. No row of logits is held as a whole, but for
`expected_rank`, which sorts some rows at a time.

Shapes: N rows, D hidden size, V vocabulary, W entries of a tile.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from sstoken.measure.precision import as_given
from sstoken.measure.token_loss import (
    ROWS_PER_TILE,
    OutputHead,
    tile_elements,
    tiles,
    token_losses,
    token_losses_by_kernel,
)
from sstoken.measure.top import TopLogits

RANKS = frozenset({"rank", "ties", "mass_above"})
"""What takes comparisons with the token's own logit."""
OF_DISTRIBUTION = (
    frozenset({"loss", "entropy", "entropy_top20", "max_prob", "sum_p2", "expected_rank"}) | RANKS
)
"""What `measure_distribution` gives."""
_COUNTS = frozenset({"rank", "ties"})
_TOP = 20
_ROWS_PER_PRODUCT = 64
"""A product of so many rows and columns rounds as the tiles' do, but for some at their edges."""


@as_given
def measure_distribution(
    hidden: Tensor, targets: Tensor, head: OutputHead, names: Collection[str], *, kernels: bool = False
) -> dict[str, Tensor]:
    """Signals of the distributions over the vocabulary that predict some tokens.

    Args:
        hidden: [N, D]; row i is the state that predicts `targets[i]`.
        targets: [N] token ids.
        head: the output head.
        names: of `OF_DISTRIBUTION`.
        kernels: on CUDA, take the loss alone by a Triton kernel.

    Returns:
        [N] each, by name; fp32 (float64 where the model is), counts int32.
    """
    if {*names} <= {"loss"}:
        measure = token_losses_by_kernel if kernels else token_losses
        return {name: measure(hidden, targets, head) for name in names}
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    found = {
        name: hidden.new_empty(hidden.shape[0], dtype=torch.int32 if name in _COUNTS else dtype)
        for name in names
    }
    # In equal parts: a small remainder would cost as much as a whole tile.
    parts = max(1, round(hidden.shape[0] / ROWS_PER_TILE))
    for rows in torch.arange(hidden.shape[0], device=hidden.device).tensor_split(parts):
        if rows.numel():
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            for name, values in _measure_rows(hidden[part], targets[part], head, names).items():
                found[name][part] = values
    return found


def _measure_rows(
    hidden: Tensor, targets: Tensor, head: OutputHead, names: Collection[str]
) -> dict[str, Tensor]:
    """The signals of one tile's rows."""
    ranked = not RANKS.isdisjoint(names)
    own = _own_logits(hidden, targets, head) if ranked else None
    top = TopLogits(_TOP) if "entropy_top20" in names else None
    sums = _sum_tiles(hidden, targets, head, own, top)
    log_total = sums.total.log()
    found = {
        "entropy": (log_total - sums.weighted / sums.total).clamp_min_(0),
        "sum_p2": sums.squares / sums.total.square(),
        "max_prob": 1 / sums.total,
    }
    if "loss" in names:
        found["loss"] = sums.largest + log_total - head.target_logits(hidden, targets)
    if top is not None:
        found["entropy_top20"] = _entropy(top.values())
    if "expected_rank" in names:
        found["expected_rank"] = _expected_rank(hidden, head)
    if ranked:
        found["rank"] = sums.greater
        found["ties"] = sums.at_least - sums.greater - 1
        found["mass_above"] = (sums.above / sums.total).clamp_max_(1)
        rows = (~sums.agree).nonzero()[:, 0]
        for name, values in _ranks_by_row(hidden[rows], targets[rows], head).items():
            found[name][rows] = values
    return {name: found[name] for name in names}


class _Sums:
    """Sums over the vocabulary, [N] float64 each: of each row's logits z, and of e = exp(z - largest)."""

    def __init__(self, targets: Tensor) -> None:
        zeros = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
        self.largest = zeros - float("inf")
        """The largest z so far."""
        self.total = zeros.clone()
        """The sum of e."""
        self.weighted = zeros.clone()
        """The sum of e * (z - largest)."""
        self.squares = zeros.clone()
        """The sum of e * e."""
        self.above = zeros.clone()
        """The sum of e where z is larger than the target's."""
        self.greater = zeros.clone()
        """How many z are larger than the target's."""
        self.at_least = zeros.clone()
        """How many are not smaller, itself included."""
        self.agree = torch.ones_like(targets, dtype=torch.bool)
        """Whether the target's logit in its tile is the one that all were compared with."""

    def raise_largest(self, of_tile: Tensor) -> None:
        """Take in a tile's largest logits [N]: what was summed so far shrinks where they are larger."""
        largest = torch.maximum(self.largest, of_tile.double())
        first = self.largest == float("-inf")
        step = torch.where(first, 0.0, self.largest - largest)
        factor = step.exp()
        self.weighted = (self.weighted + self.total * step) * factor
        self.total *= factor
        self.squares *= factor.square()
        self.above *= factor
        self.largest = largest


def _sum_tiles(
    hidden: Tensor, targets: Tensor, head: OutputHead, own: Tensor | None, top: TopLogits | None
) -> _Sums:
    """Go through the tiles once.

    Args:
        hidden: [N, D].
        targets: [N].
        head: the output head.
        own: [N], the targets' logits, where ranks are wanted.
        top: is shown every tile.
    """
    rows = hidden.shape[0]
    sums, memory = _Sums(targets), None
    for start, logits in tiles(hidden, head):
        width = logits.shape[1]
        if memory is None:  # no tile is wider than the first
            memory = (torch.empty_like(logits).flatten(), torch.empty_like(logits).flatten())
            ones = logits.new_ones(width)
        exponentials, larger = (m[: rows * width].view(rows, width) for m in memory)
        sums.raise_largest(logits.amax(1))
        if top is not None:
            top.see(logits)
        if own is not None:
            inside = ((targets >= start) & (targets < start + width)).nonzero()[:, 0]
            sums.agree[inside] = logits[inside, targets[inside] - start] == own[inside]
            torch.ge(logits, own[:, None], out=larger)
            sums.at_least += larger @ ones[:width]
            torch.gt(logits, own[:, None], out=larger)
            sums.greater += larger @ ones[:width]
        logits -= sums.largest.to(logits.dtype)[:, None]
        torch.exp(logits, out=exponentials)
        sums.total += exponentials @ ones[:width]
        sums.weighted += torch.linalg.vecdot(logits, exponentials)
        sums.squares += torch.linalg.vecdot(exponentials, exponentials)
        if own is not None:
            sums.above += torch.linalg.vecdot(larger, exponentials)
    return sums


def _own_logits(hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    """The targets' logits [N], from products that round as the tiles' do, not from a sum of their own."""
    own = [
        OutputHead(head.weight[ids], None if head.bias is None else head.bias[ids], head.scale, head.softcap)
        .logits(rows)
        .diagonal()
        for rows, ids in zip(hidden.split(_ROWS_PER_PRODUCT), targets.split(_ROWS_PER_PRODUCT), strict=True)
    ]
    return torch.cat(own)


def _whole_rows(hidden: Tensor, head: OutputHead) -> Iterator[tuple[slice, Tensor]]:
    """Whole rows of logits [R, V], some at a time, and which they are."""
    most = max(1, tile_elements(hidden.device) // head.weight.shape[0])
    for start in range(0, hidden.shape[0], most):
        rows = slice(start, start + most)
        yield rows, head.logits(hidden[rows])


def _ranks_by_row(hidden: Tensor, targets: Tensor, head: OutputHead) -> dict[str, Tensor]:
    """`RANKS` of a few rows [N, D], float64."""
    found = {name: hidden.new_zeros(hidden.shape[0], dtype=torch.float64) for name in RANKS}
    for rows, logits in _whole_rows(hidden, head):
        own = logits.gather(1, targets[rows, None])
        larger = logits > own
        found["rank"][rows] = larger.sum(1).double()
        found["ties"][rows] = (logits == own).sum(1).double() - 1
        found["mass_above"][rows] = (logits.double().softmax(1) * larger).sum(1)
    return found


def _expected_rank(hidden: Tensor, head: OutputHead) -> Tensor:
    """Sum of rank times probability, [N], float64."""
    found = hidden.new_zeros(hidden.shape[0], dtype=torch.float64)
    for rows, logits in _whole_rows(hidden, head):
        ranks = torch.arange(logits.shape[1], 0, -1, dtype=torch.float64, device=logits.device)
        if logits.device.type == "cpu":  # several times faster than torch's, which moves indices along
            array = logits.numpy()
            array.sort(axis=1)
        else:
            logits = logits.sort(1).values
        weights = (logits - logits[:, -1:]).exp_().double()
        found[rows] = (weights @ ranks) / weights.sum(1)
    return found


def _entropy(logits: Tensor) -> Tensor:
    """Entropy [N], float64, of the distribution over a few logits [N, K]."""
    log_p = logits.double().log_softmax(1)
    terms = torch.where(log_p == float("-inf"), 0.0, log_p.exp() * log_p)
    return (-terms.sum(1)).clamp_min_(0)
