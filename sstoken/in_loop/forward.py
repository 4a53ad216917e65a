"""The training step's own forward pass, with the selection inside.

A trainer calls `model(**inputs)` and reads a loss, or log-probabilities, from what comes back. `SelectingModel` stands
in for the model in that call: what it gives back speaks of the kept tokens alone. Tokens are selected by losses
measured in float32 from the last hidden states; the loss that is trained on is computed as the trainer has it, under
autocast where that is on, for the kept tokens.

Shapes: B rows, T positions, N response tokens, K kept ones, D hidden size, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sstoken.errors import SstokenError
from sstoken.in_loop.head import HeadLosses, last_states, rounds, states_to_head, unwrapped
from sstoken.in_loop.layout import Layout

_OF_THE_LOSS = ("labels", "num_items_in_batch", "fused_lm_head")


class Selector(Protocol):
    """What `SelectingModel` asks in one step, in this order."""

    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Called before the forward pass, with what the model is called with."""

    @property
    def measures(self) -> bool:
        """Whether losses are wanted; where all tokens are kept, they may not be."""

    @property
    def num_kept(self) -> int:
        """How many tokens `select` will keep."""

    def select(self, losses: Tensor | None) -> Tensor:
        """From the response tokens' losses [N] to those kept [N] bool; None where they are not wanted."""


class SelectingModel:
    """Calls the model as its trainer would and keeps the loss of the selected tokens."""

    calls = 0

    def __init__(
        self, model: nn.Module, head: HeadLosses, layout: Layout, selector: Selector, aux_divisor: float = 1.0
    ) -> None:
        """Stand in for a model for one call.

        Args:
            model: what the trainer trains, wrapped for several processes or not.
            head: of that model.
            layout: of the batch that it will be called with.
            selector: chooses the tokens.
            aux_divisor: what a model's auxiliary loss, a mean of the batch, is divided by.
        """
        self._model, self._head, self._layout = model, head, layout
        self._selector, self._aux_divisor = selector, aux_divisor

    def __call__(self, **inputs: Any) -> Any:
        """The model's outputs for these inputs; their loss is that of the kept tokens.

        With `fused_lm_head` (as TRL calls) log-probabilities are expected, and zeroed where a token is dropped.

        Raises:
            SstokenError: the model does not compute logits from hidden states as causal language models do.
        """
        self.calls += 1
        self._selector.prepare(self._model, inputs)
        return self._fused(inputs) if inputs.get("fused_lm_head") else self._plain(inputs)

    def _plain(self, inputs: Mapping[str, Any]) -> Any:
        targets = self._layout.gather(inputs["labels"])
        outputs, logits, kept = self._forward(inputs, targets)
        losses = nn.functional.cross_entropy(logits.float(), targets[kept], reduction="none")
        loss = losses.sum() / torch.as_tensor(inputs["num_items_in_batch"]).clamp(min=1)
        if getattr(outputs, "aux_loss", None) is not None:
            weight = getattr(unwrapped(self._model).config.get_text_config(), "router_aux_loss_coef", 0.0)
            loss = loss + weight / self._aux_divisor * outputs.aux_loss
        outputs["loss"] = loss
        return outputs

    def _forward(self, inputs: Mapping[str, Any], targets: Tensor) -> tuple[Any, Tensor, Tensor]:
        """The model's outputs, the logits of the kept tokens [K, V], and which of the N they are [K]."""
        found: list[tuple[Tensor, Tensor, bool]] = []

        def choose(hidden_ND: Tensor) -> Tensor:
            losses = self._head.measure(hidden_ND, targets) if self._selector.measures else None
            kept_K = _places(self._selector.select(losses), self._selector.num_kept)
            states_KD = hidden_ND[kept_K]
            found.append((states_KD.detach(), kept_K, rounds(states_KD)))
            return states_KD

        with states_to_head(self._model, self._layout, choose) as used:
            outputs = self._model(**_without_loss(inputs))
        logits = getattr(outputs, "logits", None)
        if len(used) != 1 or logits is None or logits.shape[:-1] != (1, found[0][1].numel()):
            raise _not_causal(self._model)
        states_KD, kept_K, rounded = found[0]
        self._head.verify(states_KD, logits[0], rounded)
        return outputs, logits[0], kept_K

    def _fused(self, inputs: Mapping[str, Any]) -> Any:
        """TRL's fused output head computes log-probabilities of all response tokens, for its metrics, too."""
        layout = self._layout
        measured: list[Tensor | None] = [None]

        def take(hidden_ND: Tensor) -> None:
            if self._selector.measures:  # log-probabilities are of rounded logits, under autocast
                measured[0] = self._head.measure(hidden_ND, layout.gather(inputs["labels"]))

        with last_states(self._model, layout, take):
            outputs = self._model(**inputs)
        dropped = ~layout.scatter(self._selector.select(measured[0]))[:, 1:]
        outputs["log_probs"] = outputs.log_probs.masked_fill(dropped, 0.0)
        return outputs


@torch.no_grad()
def measure_losses(model: nn.Module, head: HeadLosses, inputs: Mapping[str, Any], layout: Layout) -> Tensor:
    """The loss of each response token in one forward pass without gradients, in which no logits are made.

    Args:
        model: a causal language model, wrapped for several processes or not.
        head: of that model.
        inputs: what its trainer calls it with; `labels` [B, T] among them.
        layout: of that batch.

    Returns:
        [N] nats, fp32.

    Raises:
        SstokenError: the model does not compute logits from hidden states as causal language models do.
    """
    targets, found = layout.gather(inputs["labels"]), []

    def choose(hidden_ND: Tensor) -> Tensor:
        found.append(head.measure(hidden_ND, targets))
        return hidden_ND[:0]

    with states_to_head(model, layout, choose):
        model(**_without_loss(inputs))
    if len(found) != 1:
        raise _not_causal(model)
    return found[0]


def _without_loss(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in _OF_THE_LOSS}


def _places(keep: Tensor, count: int) -> Tensor:
    """Where `keep` [N] is True, [count], in order; never waits for the device."""
    return keep.logical_not().to(torch.uint8).argsort(stable=True)[:count]


def _not_causal(model: nn.Module) -> SstokenError:
    return SstokenError(
        f"{type(unwrapped(model)).__name__}: its logits do not come from its output embedding, one "
        "for each position; in-loop selection needs a plain causal language model"
    )
