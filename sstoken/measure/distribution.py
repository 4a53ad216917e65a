"""Signals of the distribution that predicts a token: hidden states through the output embedding in tiles.

All signals come from the same tiles, products that stay in the cache. No row of logits is held as a whole, but for few
that need it.

Shapes: N rows, D hidden size, V vocabulary, W entries of a tile, S of a sample.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from sstoken.measure.expected_rank import ExpectedRank
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
_SAMPLE = 512
"""Entries of the vocabulary in a sample, at most; and one in 64 at most, unless these are few."""
_MOST_ABOVE = 40.0
"""How far above the largest of a sample a logit may lie: the squares of exponentials must not overflow."""
_MOST_OFF = 1e-4
"""By what share an expected rank from buckets may be off at worst; what it is off in fact is a tenth of that."""
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
    hidden: Tensor, targets: Tensor, head: OutputHead, names: Collection[str], above: Tensor | None = None
) -> dict[str, Tensor]:
    """The signals of one tile's rows; `above` [N]: their largest logits, where known."""
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
        found["loss"] = sums.shift + log_total - head.target_logits(hidden, targets)
    if sums.top is not None:
        found["entropy_top20"] = _entropy(sums.top.values())
    if sums.expected_rank is not None:
        found["expected_rank"] = _expected_rank(hidden, head, sums.expected_rank)
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
    """Sums over the vocabulary, [N] float64 each: of each row's logits z, and of e = exp(z - shift)."""

    def __init__(
        self,
        sample: Tensor,
        shift: Tensor | None,
        own: Tensor | None,
        top: TopLogits | None,
        expected_rank: bool,
    ) -> None:
        """Prepare to see tiles.

        Args:
            sample: [N, S], some of the logits.
            shift: [N]; None: the largest of the sample.
            own: [N], the targets' logits, where ranks are wanted.
            top: is shown every tile.
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
        """The sum of e where z is larger than the target's."""
        self.greater = zeros.clone()
        """How many z are larger than the target's."""
        self.at_least = zeros.clone()
        """How many are not smaller, itself included."""
        self.agree = torch.ones_like(zeros, dtype=torch.bool)
        """Whether the target's logit in its tile is the one that all were compared with."""
        self._memory: tuple[Tensor, Tensor] | None = None

    def see(self, logits: Tensor, start: int, targets: Tensor) -> None:
        """Take in a tile, logits [N, W] of the entries from `start` on, which are overwritten."""
        rows, width = logits.shape
        if self._memory is None:  # no tile is wider than the first
            self._memory = (torch.empty_like(logits).flatten(), torch.empty_like(logits).flatten())
        exponentials, larger = (m[: rows * width].view(rows, width) for m in self._memory)
        own = self.own
        self.largest = torch.maximum(self.largest, logits.amax(1))
        if self.top is not None:
            self.top.see(logits)
        if own is not None:
            inside = ((targets >= start) & (targets < start + width)).nonzero()[:, 0]
            self.agree[inside] = logits[inside, targets[inside] - start] == own[inside]
            torch.ge(logits, own[:, None], out=larger)
            self.at_least += larger.sum(1)
            torch.gt(logits, own[:, None], out=larger)
            self.greater += larger.sum(1)
        logits -= self.shift[:, None]
        torch.exp(logits, out=exponentials)
        self.total += exponentials.sum(1)  # a product with ones would round ten times as much
        self.weighted += torch.linalg.vecdot(logits, exponentials)
        self.squares += torch.linalg.vecdot(exponentials, exponentials)
        if own is not None:
            self.above += torch.linalg.vecdot(larger, exponentials)
        if self.expected_rank is not None:
            self.expected_rank.see(logits, exponentials)


def _sample(hidden: Tensor, head: OutputHead) -> Tensor:
    """Logits [N, S] of entries all over the vocabulary."""
    size = head.weight.shape[0]
    step = max(1, min(64, size // 32), size // _SAMPLE)
    bias = None if head.bias is None else head.bias[::step]
    return OutputHead(head.weight[::step], bias, head.scale, head.softcap).logits(hidden)


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


def _expected_rank(hidden: Tensor, head: OutputHead, buckets: ExpectedRank) -> Tensor:
    """Sum of rank times probability, [N], float64; of few rows by sorting them."""
    found, off = buckets.values()
    rows = (~(off < _MOST_OFF)).nonzero()[:, 0]
    found[rows] = _expected_rank_by_row(hidden[rows], head)
    return found


def _expected_rank_by_row(hidden: Tensor, head: OutputHead) -> Tensor:
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
