"""Selection inside the forward pass of the training step.

A trainer calls `model(**inputs)` and reads a loss, or log-probabilities, from the outputs. `SelectingModel` takes the
model's place in that call, and its outputs cover the kept tokens alone. The selection uses losses measured in float32
from the last hidden states. The loss that is trained on is computed as the trainer does it, under its autocast.

Shapes: B rows, T positions, N response tokens, K kept ones, D hidden size, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sstoken.errors import SstokenError
from sstoken.in_loop.head import HeadLosses, last_states, rounds, states_to_head, unwrapped
from sstoken.in_loop.response_tokens import ResponseTokens

_OF_THE_LOSS = ("labels", "num_items_in_batch", "fused_lm_head")


class Selector(Protocol):
    """Decides which tokens a step keeps. `SelectingModel` calls the methods in this order."""

    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Get ready for the forward pass of `model(**inputs)`."""

    @property
    def measures(self) -> bool:
        """Whether `select` needs losses; not if it keeps everything anyway."""

    @property
    def num_kept(self) -> int:
        """Number of tokens that `select` will keep."""

    def select(self, losses: Tensor | None) -> Tensor:
        """Return the keep mask [N] bool, given the losses [N], or None if `measures` is False."""


class SelectingModel:
    """Calls the model as its trainer would, and returns the loss of the selected tokens."""

    calls = 0

    def __init__(
        self,
        model: nn.Module,
        head: HeadLosses,
        tokens: ResponseTokens,
        selector: Selector,
        aux_divisor: float = 1.0,
    ) -> None:
        """Take a model's place for one call.

        Args:
            model: the model being trained, wrapped for several processes or not.
            head: measures that model's losses.
            tokens: the response tokens of the batch.
            selector: chooses the tokens to keep.
            aux_divisor: divisor of the model's auxiliary loss, which is a mean over the batch.
        """
        self._model, self._head, self._tokens = model, head, tokens
        self._selector, self._aux_divisor = selector, aux_divisor

    def __call__(self, **inputs: Any) -> Any:
        """Run the model; the loss in its outputs is that of the kept tokens.

        With `fused_lm_head` (TRL's call) the outputs hold log-probabilities, which are 0 for dropped tokens.

        Raises:
            SstokenError: the model does not compute one row of logits per position with its output embedding.
        """
        self.calls += 1
        self._selector.prepare(self._model, inputs)
        return self._fused(inputs) if inputs.get("fused_lm_head") else self._plain(inputs)

    def _plain(self, inputs: Mapping[str, Any]) -> Any:
        targets = self._tokens.gather(inputs["labels"])
        outputs, logits, kept = self._forward(inputs, targets)
        losses = nn.functional.cross_entropy(logits.float(), targets[kept], reduction="none")
        loss = losses.sum() / torch.as_tensor(inputs["num_items_in_batch"]).clamp(min=1)
        if getattr(outputs, "aux_loss", None) is not None:
            weight = getattr(unwrapped(self._model).config.get_text_config(), "router_aux_loss_coef", 0.0)
            loss = loss + weight / self._aux_divisor * outputs.aux_loss
        outputs["loss"] = loss
        return outputs

    def _forward(self, inputs: Mapping[str, Any], targets: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Return the model's outputs, the kept tokens' logits [K, V], and their indices [K] among the N."""
        found: list[tuple[Tensor, Tensor, bool]] = []

        def choose(hidden_ND: Tensor) -> Tensor:
            losses = self._head.measure(hidden_ND, targets) if self._selector.measures else None
            kept_K = _places(self._selector.select(losses), self._selector.num_kept)
            states_KD = hidden_ND[kept_K]
            found.append((states_KD.detach(), kept_K, rounds(states_KD)))
            return states_KD

        with states_to_head(self._model, self._tokens, choose) as used:
            outputs = self._model(**_without_loss(inputs))
        logits = getattr(outputs, "logits", None)
        if len(used) != 1 or logits is None or logits.shape[:-1] != (1, found[0][1].numel()):
            raise _not_causal(self._model)
        states_KD, kept_K, rounded = found[0]
        self._head.verify(states_KD, logits[0], rounded)
        return outputs, logits[0], kept_K

    def _fused(self, inputs: Mapping[str, Any]) -> Any:
        """TRL's fused output head computes log-probabilities of all response tokens, for its metrics."""
        tokens = self._tokens
        measured: list[Tensor | None] = [None]

        def take(hidden_ND: Tensor) -> None:
            if self._selector.measures:  # log-probabilities are of rounded logits, under autocast
                measured[0] = self._head.measure(hidden_ND, tokens.gather(inputs["labels"]))

        with last_states(self._model, tokens, take):
            outputs = self._model(**inputs)
        dropped = ~tokens.scatter(self._selector.select(measured[0]))[:, 1:]
        outputs["log_probs"] = outputs.log_probs.masked_fill(dropped, 0.0)
        return outputs


@torch.no_grad()
def measure_losses(
    model: nn.Module, head: HeadLosses, inputs: Mapping[str, Any], tokens: ResponseTokens
) -> Tensor:
    """Measure the loss of each response token in a forward pass without gradients and without full logits.

    Args:
        model: a causal language model, wrapped for several processes or not.
        head: measures that model's losses.
        inputs: what its trainer calls it with, including `labels` [B, T].
        tokens: the response tokens of the batch.

    Returns:
        [N] nats, float32.

    Raises:
        SstokenError: the model does not compute one row of logits per position with its output embedding.
    """
    targets, found = tokens.gather(inputs["labels"]), []

    def choose(hidden_ND: Tensor) -> Tensor:
        found.append(head.measure(hidden_ND, targets))
        return hidden_ND[:0]

    with states_to_head(model, tokens, choose):
        model(**_without_loss(inputs))
    if len(found) != 1:
        raise _not_causal(model)
    return found[0]


def _without_loss(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in _OF_THE_LOSS}


def _places(keep: Tensor, count: int) -> Tensor:
    """Return the indices [count] where `keep` [N] is True, in order, without waiting for the device."""
    return keep.logical_not().to(torch.uint8).argsort(stable=True)[:count]


def _not_causal(model: nn.Module) -> SstokenError:
    return SstokenError(
        f"{type(unwrapped(model)).__name__}: its logits do not come from its output embedding, one "
        "for each position; in-loop selection needs a plain causal language model"
    )
