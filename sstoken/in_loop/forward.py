"""The training step's own forward pass, with the selection inside: per-token losses come out of it as they are.

A trainer calls `model(**inputs)` and reads a loss, or log-probabilities, from what comes back. `SelectingModel` stands
in for the model in that call: what it gives back speaks of the kept tokens alone.

Shapes: B rows, T positions, N response tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sstoken.errors import SstokenError
from sstoken.in_loop.core import kept_loss
from sstoken.in_loop.layout import Layout
from sstoken.losses import output_embedding


class Selector(Protocol):
    """What `SelectingModel` asks in one step, in this order."""

    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Called before the forward pass, with what the model is called with."""

    def select(self, losses: Tensor) -> Tensor:
        """From the response tokens' losses [N], without gradients, to those kept [N] bool."""


class SelectingModel:
    """Calls the model as its trainer would and keeps the loss of the selected tokens."""

    calls = 0

    def __init__(self, model: nn.Module, layout: Layout, selector: Selector, aux_divisor: float) -> None:
        """Stand in for a model for one call.

        Args:
            model: what the trainer trains, wrapped for several processes or not.
            layout: of the batch that it will be called with.
            selector: chooses the tokens.
            aux_divisor: what a model's auxiliary loss, a mean of the batch, is divided by.
        """
        self._model, self._layout, self._selector, self._aux_divisor = model, layout, selector, aux_divisor

    def __call__(self, **inputs: Any) -> Any:
        """The model's outputs for these inputs; their loss is that of the kept tokens.

        With `fused_lm_head` (as TRL calls) log-probabilities are expected, and zeroed where a token is dropped.
        """
        self.calls += 1
        self._selector.prepare(self._model, inputs)
        outputs, losses = token_losses_of(self._model, inputs, self._layout)
        keep = self._selector.select(losses.detach())
        if inputs.get("fused_lm_head"):
            dropped = ~self._layout.scatter(keep)[:, 1:]
            outputs["log_probs"] = outputs.log_probs.masked_fill(dropped, 0.0)
            return outputs
        loss = kept_loss(losses, keep) / torch.as_tensor(inputs["num_items_in_batch"]).clamp(min=1)
        if getattr(outputs, "aux_loss", None) is not None:
            weight = getattr(unwrapped(self._model).config.get_text_config(), "router_aux_loss_coef", 0.0)
            loss = loss + weight / self._aux_divisor * outputs.aux_loss
        outputs["loss"] = loss
        return outputs


def unwrapped(model: Any) -> Any:
    """The model inside what distributes it."""
    return getattr(model, "module", model)


def token_losses_of(model: nn.Module, inputs: Mapping[str, Any], layout: Layout) -> tuple[Any, Tensor]:
    """One forward pass; no logits are made but those that predict a response token.

    Args:
        model: a causal language model, wrapped for several processes or not.
        inputs: what its trainer calls it with; `labels` [B, T] among them.
        layout: of that batch.

    Returns:
        The model's outputs, and the loss of each response token, [N] nats, fp32, with gradients.

    Raises:
        SstokenError: the model does not compute logits from hidden states as causal language models do.
    """
    if inputs.get("fused_lm_head"):
        outputs = model(**inputs)
        losses = nn.functional.pad(-outputs.log_probs, (1, 0))
        return outputs, layout.gather(losses)
    forwarded = {k: v for k, v in inputs.items() if k not in ("labels", "num_items_in_batch")}
    with _logits_of(model, layout) as used:
        outputs = model(**forwarded)
    logits = getattr(outputs, "logits", None)
    if not used or logits is None or logits.shape[:-1] != (1, layout.num_tokens):
        raise SstokenError(
            f"{type(unwrapped(model)).__name__}: its logits do not come from its output embedding, one "
            "for each position; in-loop selection needs a plain causal language model"
        )
    targets = layout.gather(inputs["labels"])
    return outputs, nn.functional.cross_entropy(logits[0].float(), targets, reduction="none")


@contextmanager
def _logits_of(model: nn.Module, layout: Layout) -> Iterator[list[bool]]:
    """Within this context only the states that predict a response token reach the output embedding, as [1, N, D]."""
    used: list[bool] = []

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden_BTD = args[0]
        if hidden_BTD.shape[:2] != layout.response_mask.shape:
            raise SstokenError(
                f"the output embedding sees {tuple(hidden_BTD.shape[:2])} positions, the batch has "
                f"{tuple(layout.response_mask.shape)}; models that add or drop positions (prompt tuning) cannot select"
            )
        used.append(True)
        return (hidden_BTD.flatten(0, 1)[layout.positions - 1][None], *args[1:])

    handle = output_embedding(unwrapped(model)).register_forward_pre_hook(gather)
    try:
        yield used
    finally:
        handle.remove()
