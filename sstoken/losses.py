"""Per-token loss without a logits tensor: hidden states through the output embedding in tiles.

Shapes: N response tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sstoken.errors import SstokenError

ROWS_PER_TILE = 1024
VOCABULARY_PER_TILE = 1024
"""A tile of fp32 logits takes 4 MB, which stays in cache."""


@dataclass(frozen=True)
class OutputHead:
    """The output embedding and what the model does to its product: `softcap * tanh(scale * z / softcap)`."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Logits of the vocabulary entries `start:stop`, at least fp32.

        Args:
            hidden: [N, D], what the model feeds to its output embedding.
            start: first entry.
            stop: one past the last; None: V.

        Returns:
            [N, stop - start].
        """
        bias = None if self.bias is None else self.bias[start:stop]
        product = nn.functional.linear(hidden, self.weight[start:stop], bias)
        logits = product.to(torch.promote_types(product.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def token_losses(hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    """`-log p(target)` of each row, in nats, by tiles of rows and vocabulary with a running log-sum-exp.

    Args:
        hidden: [N, D]; row i is the state that predicts `targets[i]`.
        targets: [N] token ids.
        head: the output head.

    Returns:
        [N], fp32 (float64 where the model is).
    """
    if hidden.shape[0] == 0:
        return hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return torch.cat(
        [
            _tile_losses(rows, ids, head)
            for rows, ids in zip(hidden.split(ROWS_PER_TILE), targets.split(ROWS_PER_TILE), strict=True)
        ]
    )


def _tile_losses(hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    log_sum: Tensor | None = None
    target_logit: Tensor | None = None
    for start in range(0, head.weight.shape[0], VOCABULARY_PER_TILE):
        logits = head.logits(hidden, start, start + VOCABULARY_PER_TILE)
        inside = (targets >= start) & (targets < start + logits.shape[1])
        column = (targets - start).clamp(0, logits.shape[1] - 1)
        found = torch.where(inside, logits.gather(1, column[:, None])[:, 0], 0.0)
        target_logit = found if target_logit is None else target_logit + found
        tile_sum = logits.logsumexp(1)
        log_sum = tile_sum if log_sum is None else torch.logaddexp(log_sum, tile_sum)
    assert log_sum is not None
    assert target_logit is not None
    return log_sum - target_logit


class HeadInput:
    """Holds what the model fed to its output embedding in the last forward pass: `hidden` [B, T, D]."""

    hidden: Tensor | None = None


@contextmanager
def intercept_head(model: nn.Module) -> Iterator[HeadInput]:
    """Within this context a forward pass stops short of the logits: their input is kept, one row is computed.

    Taking the input where the model hands it over includes whatever the model does to its last hidden state.
    """
    held = HeadInput()

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        held.hidden = args[0]
        return (args[0][:1, :1], *args[1:])

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
    weight, bias = module.weight, getattr(module, "bias", None)
    held: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    try:
        num_ids = min(8, int(weight.shape[0]))  # type: ignore[index]
        ids = torch.arange(num_ids, device=weight.device)[None]  # type: ignore[arg-type]
        expected = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        handle.remove()
    hidden = held[0][0]
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    for scale in _scale_candidates(model, config):
        head = OutputHead(weight, bias, scale, getattr(config, "final_logit_softcapping", None))  # type: ignore[arg-type]
        logits = head.logits(hidden)
        tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
        # Weights that are NaN give NaN either way: the losses tell, with the example that has them.
        if torch.allclose(logits, expected.to(logits.dtype), rtol=tolerance, atol=tolerance, equal_nan=True):
            return head
    raise SstokenError(
        f"{type(model).__name__}: its logits are not a scaled or soft-capped product with the output embedding; "
        "this architecture is not supported"
    )


def _scale_candidates(model: nn.Module, config: object) -> Iterator[float]:
    yield 1.0
    for owner in (model, config):
        for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
            value = getattr(owner, name, None)
            if isinstance(value, int | float) and value:
                yield float(value)
                yield 1.0 / float(value)
