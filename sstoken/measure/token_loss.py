"""Per-token loss without a logits tensor: hidden states through the output embedding in tiles.

Shapes: N response tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from sstoken.errors import SstokenError
from sstoken.measure.precision import without_autocast

ROWS_PER_TILE = 1024
"""Approximate rows of a tile; products of fewer than 128 rows are slow."""
TILE_ELEMENTS = {"cpu": 1 << 20}
"""Logits held at once: 4 MB in fp32 on a CPU, which fits its cache."""
_TILE_ELEMENTS_ON_DEVICE = 1 << 24
"""64 MB elsewhere, to keep a GPU busy."""
_NEAR_ZERO = 20.0
"""If a row's largest logit is this close to 0, its exponentials and their squares add up in fp32 without overflow."""

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of the soft-cap in model configurations."""


@dataclass(frozen=True)
class OutputHead:
    """The output embedding, and how the model shapes its product z: `softcap * tanh(scale * z / softcap)`."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    softcap: float | None = None

    @property
    def size(self) -> int:
        """V."""
        return self.weight.shape[0]

    def select(self, entries: Tensor | slice) -> "OutputHead":
        """Return the head of some vocabulary entries."""
        bias = None if self.bias is None else self.bias[entries]
        return replace(self, weight=self.weight[entries], bias=bias)

    def logits(
        self, hidden: Tensor, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Logits [N, stop - start] of the vocabulary entries `start:stop`, at least fp32; written to `out` if given.

        `hidden` [N, D] is what the model feeds to its output embedding.
        """
        product = _product(hidden, self.weight[start:stop], out)
        if self.bias is not None:
            product += self.bias[start:stop]
        if self.scale != 1.0:
            product *= self.scale
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product


@dataclass(frozen=True)
class ComputedLogits:
    """Stands for an `OutputHead` whose logits [N, V] are computed already: they take the place of hidden states."""

    entries: Tensor
    """The vocabulary entries that it gives, [V] to begin with."""

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.entries.numel()

    def select(self, entries: Tensor | slice) -> "ComputedLogits":
        """See `OutputHead.select`."""
        return ComputedLogits(self.entries[entries])

    def logits(
        self, hidden: Tensor, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """See `OutputHead.logits`; a copy, which the caller may overwrite."""
        return torch.index_select(hidden, 1, self.entries[start:stop], out=out)


Head = OutputHead | ComputedLogits


def _product(hidden: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    """`hidden @ weight.T`, accumulated and returned in at least fp32, whatever the dtype of the weights."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda and hidden.dtype != dtype:
        return torch.mm(hidden, weight.T, out_dtype=dtype, out=out)
    return torch.mm(hidden.to(dtype), weight.T.to(dtype), out=out)


@without_autocast
def token_losses(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """`-log p(target)` of each row, in nats; a running sum over tiles of rows and vocabulary.

    Args:
        hidden: [N, D]; row i is the state that predicts `targets[i]`.
        targets: [N] token ids.
        head: the output head.

    Returns:
        [N], fp32 (float64 where the model is).
    """
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    for rows in row_tiles(hidden.shape[0]):
        losses[rows] = _losses(hidden[rows], targets[rows], head)
    return losses


def row_tiles(num_rows: int) -> list[slice]:
    """Cut rows into equal parts of about `ROWS_PER_TILE`: a small remainder would cost as much as a whole tile."""
    parts = max(1, round(num_rows / ROWS_PER_TILE))
    size, larger = divmod(num_rows, parts)
    edges = [part * size + min(part, larger) for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges) if start < stop]


@without_autocast
def measure_logits(hidden: Tensor, head: OutputHead) -> Tensor:
    """All logits [N, V] of rows [N, D], at least fp32."""
    return head.logits(hidden)


def _losses(hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Losses [N], float64, of one tile of rows [N, D]; exponentiates each tile of logits in place."""
    shift: Tensor | None = None
    total = torch.zeros(hidden.shape[0], dtype=torch.float64, device=hidden.device)
    own = torch.zeros_like(total)
    for start, logits in tiles(hidden, head):
        copy_target_logits(own, logits, start, targets)
        if start == 0:  # the largest logits, unless all are near 0 anyway
            largest = logits.amax(1)
            shift = None if (largest.abs() < _NEAR_ZERO).all() else largest
        if shift is not None:
            logits -= shift[:, None]
        total += logits.exp_().sum(1)  # a product with ones would have ten times the rounding error
    log_sum = total.log() if shift is None else shift + total.log()
    # A later tile may be so far above the first that its exponentials overflow.
    overflowed = ~log_sum.isfinite()
    if overflowed.any():
        log_sum[overflowed] = _safe_log_sum_exp(hidden[overflowed], head).double()
    return log_sum - own


def copy_target_logits(own: Tensor, logits: Tensor, start: int, targets: Tensor) -> Tensor:
    """Copy the targets' logits out of a tile [N, W], of the entries from `start` on, into `own` [N].

    They are rounded like all others. Returns the rows whose targets are in the tile.
    """
    rows = ((targets >= start) & (targets < start + logits.shape[1])).nonzero()[:, 0]
    own[rows] = logits[rows, targets[rows] - start].to(own.dtype)
    return rows


def _safe_log_sum_exp(hidden: Tensor, head: Head) -> Tensor:
    log_sum: Tensor | None = None
    for _, logits in tiles(hidden, head):
        tile_sum = logits.logsumexp(1)
        log_sum = tile_sum if log_sum is None else torch.logaddexp(log_sum, tile_sum)
    assert log_sum is not None
    return log_sum


def tile_elements(device: torch.device) -> int:
    """Logits to hold at once on a device."""
    return TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS_ON_DEVICE)


def tiles(hidden: Tensor, head: Head) -> Iterator[tuple[int, Tensor]]:
    """Compute the logits of the whole vocabulary for states [N, D], tile by tile, all in the same buffer.

    Yields:
        The tile's first vocabulary entry, and its logits [N, entries].
    """
    vocabulary, rows = head.size, hidden.shape[0]
    width = min(vocabulary, max(256, tile_elements(hidden.device) // rows // 256 * 256))
    buffer = torch.empty(
        rows * width, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
    )
    for start in range(0, vocabulary, width):
        stop = min(start + width, vocabulary)
        yield start, head.logits(hidden, start, stop, out=buffer[: rows * (stop - start)].view(rows, -1))


@contextmanager
def intercept_head(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within this context a forward pass computes no logits; it adds the output embedding's input [B, T, D] to a list.

    Taken there, the input includes everything that the model does to its last hidden state.
    """
    held: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held.append(args[0])
        return (args[0][:, :0], *args[1:])

    handle = output_embedding(model).register_forward_pre_hook(keep)
    try:
        yield held
    finally:
        handle.remove()


def output_embedding(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits.

    Raises:
        SstokenError: the model has none.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or getattr(head, "weight", None) is None:
        raise SstokenError(
            f"{type(model).__name__} has no output embedding; only causal language models work"
        )
    module: nn.Module = head
    return module


@torch.no_grad()
def read_head(model: nn.Module) -> OutputHead:
    """The output head of a transformers causal language model, verified against the model's own logits.

    Models name the scaling of their logits differently: candidates are tried until one reproduces the model's logits.

    Raises:
        SstokenError: none does.
    """
    module = output_embedding(model)
    weight, bias = _weight_and_bias(module)
    held: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    try:
        ids = torch.arange(min(8, weight.shape[0]), device=weight.device)[None]
        expected = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    hidden = held[0][0]
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if hidden.ndim != 2:
        raise SstokenError(
            f"{type(model).__name__}: its output embedding takes something other than hidden states"
        )
    softcap = next((getattr(config, n) for n in _SOFTCAPS if getattr(config, n, None)), None)
    for scale in scale_candidates(model, config):
        head = OutputHead(weight, bias, scale, softcap)
        logits = head.logits(hidden)
        tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
        # NaN weights give NaN either way; the losses report them, with the example.
        if torch.allclose(logits, expected.to(logits.dtype), rtol=tolerance, atol=tolerance, equal_nan=True):
            return head
    raise SstokenError(
        f"{type(model).__name__}: its logits are not a scaled or soft-capped product with the output embedding; "
        "this architecture is not supported"
    )


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias [V] of an output embedding; under an adapter, reconstructed from its outputs."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(module, "bias", None)
    # peft's wrapper of a fully saved module exposes that module's weight.
    saved_whole = getattr(module, "modules_to_save", None)
    if saved_whole or next(module.children(), None) is None:
        return weight, bias
    size = weight.shape[1]
    whole, offset = torch.empty_like(weight), module(weight.new_zeros(1, size))[0]
    for columns in torch.arange(size, device=weight.device).split(256):
        unit = weight.new_zeros(len(columns), size).scatter_(1, columns[:, None], 1.0)
        whole[:, columns] = (module(unit) - offset).T.to(whole.dtype)
    return whole, offset.to(whole.dtype) if offset.any() else None


def scale_candidates(model: nn.Module, config: object) -> Iterator[float]:
    """Factors by which the model may scale its logits: 1, or a number that it or its configuration names."""
    yield 1.0
    for owner in (model, config):
        for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
            value = getattr(owner, name, None)
            if isinstance(value, int | float) and value:
                yield float(value)
                yield 1.0 / float(value)
