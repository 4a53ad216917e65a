"""Per-token loss without a logits tensor: hidden states through the output embedding in tiles.

Shapes: N response tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sstoken.errors import SstokenError
from sstoken.measure.precision import as_given

ROWS_PER_TILE = 1024
"""About so many rows at a time: a product of fewer than 128 is slow."""
TILE_ELEMENTS = {"cpu": 1 << 20}
"""Logits alive at once: 4 MB in fp32 on a CPU, which stays in its cache."""
_TILE_ELEMENTS_ON_DEVICE = 1 << 24
"""64 MB elsewhere, so that a kernel has enough to do."""
_NEAR_ZERO = 20.0
"""Exponentials of a row whose largest logit is that near to 0 add up in fp32 without loss, and so do their squares."""

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configurations call it."""


@dataclass(frozen=True)
class OutputHead:
    """The output embedding and what the model does to its product: `softcap * tanh(scale * z / softcap)`."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    softcap: float | None = None

    def logits(
        self, hidden: Tensor, start: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Logits of the vocabulary entries `start:stop`, at least fp32.

        Args:
            hidden: [N, D], what the model feeds to its output embedding.
            start: first entry.
            stop: one past the last; None: V.
            out: [N, stop - start], where to put them.

        Returns:
            [N, stop - start].
        """
        product = _product(hidden, self.weight[start:stop], out)
        if self.bias is not None:
            product += self.bias[start:stop]
        return self._shape(product)

    def target_logits(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The logit of one vocabulary entry for each row: hidden [N, D], targets [N], gives [N]."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        product = (hidden.to(dtype) * self.weight[targets].to(dtype)).sum(1)
        if self.bias is not None:
            product += self.bias[targets]
        return self._shape(product)

    def _shape(self, product: Tensor) -> Tensor:
        if self.scale != 1.0:
            product *= self.scale
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product


def _product(hidden: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    """`hidden @ weight.T`, accumulated and given in fp32 at least, whatever the dtype of the weights."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.is_cuda and hidden.dtype != dtype:
        return torch.mm(hidden, weight.T, out_dtype=dtype, out=out)
    return torch.mm(hidden.to(dtype), weight.T.to(dtype), out=out)


@as_given
def token_losses(hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    """`-log p(target)` of each row, in nats, by tiles of rows and vocabulary with a running sum.

    Args:
        hidden: [N, D]; row i is the state that predicts `targets[i]`.
        targets: [N] token ids.
        head: the output head.

    Returns:
        [N], fp32 (float64 where the model is).
    """
    if hidden.shape[0] == 0:
        return hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
    # In equal parts: a small remainder would cost as much as a whole tile.
    parts = max(1, round(hidden.shape[0] / ROWS_PER_TILE))
    tiles = zip(hidden.tensor_split(parts), targets.tensor_split(parts), strict=True)
    return torch.cat([_log_sum_exp(rows, head) - head.target_logits(rows, ids) for rows, ids in tiles])


@as_given
def token_losses_by_kernel(hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    """`token_losses` by the Triton kernel where it gives right numbers in a trial, else as `token_losses` does."""
    from sstoken.measure.cuda.choices import choose_token_losses

    choice = choose_token_losses(
        hidden.device, hidden.dtype, hidden.shape[1],
        bias=head.bias is not None, scale=head.scale, softcap=head.softcap,
    )  # fmt: skip
    return choice.call(hidden, targets, head.weight, head.bias, head.scale, head.softcap)


@as_given
def measure_logits(hidden: Tensor, head: OutputHead) -> Tensor:
    """All logits of the rows [N, D], [N, V], at least fp32."""
    return head.logits(hidden)


def _log_sum_exp(hidden: Tensor, head: OutputHead) -> Tensor:
    """Log-sum-exp [N] of the logits of each row [N, D], with exponentials summed in place."""
    total = shift = None
    for _, logits in tiles(hidden, head):
        if total is None:
            shift, total = shift_of(logits), logits.new_zeros(logits.shape[0])
        if shift is not None:
            logits -= shift[:, None]
        total += logits.exp_().sum(1)  # a product with ones would round ten times as much
    assert total is not None
    log_sum = total.log() if shift is None else shift + total.log()
    # A later tile may lie so far above the first that its exponentials overflow.
    overflowed = ~log_sum.isfinite()
    if overflowed.any():
        log_sum[overflowed] = _safe_log_sum_exp(hidden[overflowed], head)
    return log_sum


def shift_of(logits: Tensor) -> Tensor | None:
    """What to take from each row [N] before the exponentials: its largest; None, for a pass less, if near 0 anyway."""
    largest = logits.amax(1)
    return None if (largest.abs() < _NEAR_ZERO).all() else largest


def _safe_log_sum_exp(hidden: Tensor, head: OutputHead) -> Tensor:
    log_sum: Tensor | None = None
    for _, logits in tiles(hidden, head):
        tile_sum = logits.logsumexp(1)
        log_sum = tile_sum if log_sum is None else torch.logaddexp(log_sum, tile_sum)
    assert log_sum is not None
    return log_sum


def tile_elements(device: torch.device) -> int:
    """Logits alive at once on that device."""
    return TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS_ON_DEVICE)


def tiles(hidden: Tensor, head: OutputHead) -> Iterator[tuple[int, Tensor]]:
    """Logits of all the vocabulary, a tile at a time, each in the same memory, with the first entry of each.

    Args:
        hidden: [N, D].
        head: the output head.

    Yields:
        The first entry, and [N, entries].
    """
    vocabulary, rows = head.weight.shape[0], hidden.shape[0]
    width = min(vocabulary, max(256, tile_elements(hidden.device) // rows // 256 * 256))
    buffer = torch.empty(
        rows * width, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
    )
    for start in range(0, vocabulary, width):
        stop = min(start + width, vocabulary)
        yield start, head.logits(hidden, start, stop, out=buffer[: rows * (stop - start)].view(rows, -1))


class HeadInput:
    """Holds what the model fed to its output embedding in the last forward pass: `hidden` [B, T, D]."""

    hidden: Tensor | None = None


@contextmanager
def intercept_head(model: nn.Module) -> Iterator[HeadInput]:
    """Within this context a forward pass stops short of the logits: their input is kept, no row is computed.

    Taking the input where the model hands it over includes whatever the model does to its last hidden state.
    """
    held = HeadInput()

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held.hidden = args[0]
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

    Models name the scaling of their logits differently; the reading that reproduces the model is taken.

    Raises:
        SstokenError: no known reading does.
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
        # Weights that are NaN give NaN either way: the losses tell, with the example that has them.
        if torch.allclose(logits, expected.to(logits.dtype), rtol=tolerance, atol=tolerance, equal_nan=True):
            return head
    raise SstokenError(
        f"{type(model).__name__}: its logits are not a scaled or soft-capped product with the output embedding; "
        "this architecture is not supported"
    )


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias [V] of an output embedding; under an adapter, read off its outputs."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(module, "bias", None)
    # The wrapper of a module that peft saved whole shows that one's weight.
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
    """What the model may multiply its logits by: 1, or a number that it or its configuration names."""
    yield 1.0
    for owner in (model, config):
        for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
            value = getattr(owner, name, None)
            if isinstance(value, int | float) and value:
                yield float(value)
                yield 1.0 / float(value)
