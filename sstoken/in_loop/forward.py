"""Selection inside the forward pass of the training step.

A trainer calls `model(**inputs)` and reads a loss, or log-probabilities, from the outputs. `SelectingModel` takes the
model's place in that call, and its outputs cover only the kept tokens. Tokens are selected by losses measured in
float32 from the last hidden states; the training loss itself is computed as the trainer does, under its autocast.

Shapes: B rows, T positions, N response tokens, K kept ones, D hidden size, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sstoken.errors import SstokenError
from sstoken.in_loop.head import HeadSignals, MeasuredStates, last_states, rounds, states_to_head, unwrapped
from sstoken.in_loop.response_tokens import ResponseTokens

_OF_THE_LOSS = ("labels", "num_items_in_batch", "fused_lm_head")


class Decision(NamedTuple):
    """A selector's decision about N response tokens."""

    keep: Tensor
    """[N] bool."""
    weight: Tensor | None = None
    """[N], factors of the tokens' losses; None: 1 for kept tokens, 0 for the others."""
    num_kept: int | None = None
    """Number of kept tokens, if the host knows it without waiting for the device."""


class Selector(Protocol):
    """Decides which tokens a step keeps."""

    signals: tuple[str, ...]
    """Names of the signals that `select` needs, such as `loss`; empty if it keeps everything anyway."""
    reference: MeasuredStates | None
    """The history's states, for signals that compare distributions; `prepare` may set them."""

    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Prepare for the forward pass `model(**inputs)`."""

    def select(self, signals: Mapping[str, Tensor]) -> Decision:
        """Decide, given the signals by name, [N] each."""


class SelectingModel:
    """Calls the model as its trainer would, and returns the loss of the selected tokens."""

    calls = 0
    num_kept: Tensor | None = None
    """Number of kept tokens; None before the call."""

    def __init__(
        self,
        model: nn.Module,
        head: HeadSignals,
        tokens: ResponseTokens,
        selector: Selector,
        aux_divisor: float = 1.0,
    ) -> None:
        """Take the place of a model, which may be wrapped for several processes, for one call.

        `aux_divisor` divides the model's auxiliary loss, which is a mean over the batch.
        """
        self._model, self._head, self._tokens = model, head, tokens
        self._selector, self._aux_divisor = selector, aux_divisor

    def __call__(self, **inputs: Any) -> Any:
        """Run the model; the loss in its outputs covers only the kept tokens.

        With `fused_lm_head` (TRL's call), the outputs hold log-probabilities instead, 0 for dropped tokens.

        Raises:
            SstokenError: the model's output embedding does not compute one row of logits per position.
        """
        self.calls += 1
        self._selector.prepare(self._model, inputs)
        return self._fused(inputs) if inputs.get("fused_lm_head") else self._plain(inputs)

    def _plain(self, inputs: Mapping[str, Any]) -> Any:
        targets = self._tokens.gather(inputs["labels"])
        found: list[tuple[Tensor, Tensor, bool, Tensor | None]] = []

        def choose(hidden: Tensor) -> Tensor:
            decision = self._decide(hidden, targets)
            learned_K = _learned(decision)
            states_KD = hidden[self._tokens.positions[learned_K] - 1]
            found.append((states_KD.detach(), learned_K, rounds(states_KD), decision.weight))
            return states_KD

        with states_to_head(self._model, self._tokens, choose):
            outputs = self._model(**_without_loss(inputs))
        logits = getattr(outputs, "logits", None)
        if len(found) != 1 or logits is None or logits.shape[:-1] != (1, found[0][1].numel()):
            raise _not_causal(self._model)
        states_KD, learned_K, rounded, weight = found[0]
        logits_KV = logits[0]
        self._head.verify(states_KD, logits_KV, rounded)
        losses = nn.functional.cross_entropy(logits_KV.float(), targets[learned_K], reduction="none")
        if weight is not None:
            losses = losses * weight[learned_K].to(losses.dtype)
        loss = losses.sum() / torch.as_tensor(inputs["num_items_in_batch"]).clamp(min=1)
        if getattr(outputs, "aux_loss", None) is not None:
            factor = getattr(unwrapped(self._model).config.get_text_config(), "router_aux_loss_coef", 0.0)
            loss = loss + factor / self._aux_divisor * outputs.aux_loss
        outputs["loss"] = loss
        return outputs

    def _decide(self, hidden: Tensor, targets: Tensor) -> Decision:
        """Measure signals and select, given the last states [B * T, D]."""
        selector = self._selector
        measured: dict[str, Tensor] = {}
        if selector.signals:
            states = self._head.states(hidden.detach(), self._tokens, selector.signals)
            measured = self._head.measure(states, targets, selector.signals, selector.reference)
        decision = selector.select(measured)
        self.num_kept = decision.keep.sum()
        return decision

    def _fused(self, inputs: Mapping[str, Any]) -> Any:
        """Handle TRL's fused output head, which computes log-probabilities of all response tokens for its metrics."""
        tokens = self._tokens
        found: list[Decision] = []

        def take(hidden: Tensor) -> None:  # TRL's log-probabilities come from rounded logits, under autocast
            found.append(self._decide(hidden, tokens.gather(inputs["labels"])))

        with last_states(self._model, take):
            outputs = self._model(**inputs)
        keep, weight, _ = found[0]
        learned = keep if weight is None else weight != 0
        log_probs = outputs.log_probs.masked_fill(~tokens.scatter(learned)[:, 1:], 0.0)
        if weight is not None:
            log_probs = log_probs * tokens.scatter(weight)[:, 1:].to(log_probs.dtype)
        outputs["log_probs"] = log_probs
        return outputs


@torch.no_grad()
def measure_signals(
    model: nn.Module,
    head: HeadSignals,
    inputs: Mapping[str, Any],
    tokens: ResponseTokens,
    names: tuple[str, ...] = ("loss",),
) -> tuple[dict[str, Tensor], MeasuredStates]:
    """Measure signals of each response token in a forward pass without gradients and without full logits.

    Args:
        model: a causal language model; may be wrapped for several processes.
        head: measures that model's signals.
        inputs: the trainer's arguments to the model, including `labels` [B, T].
        tokens: the response tokens of the batch.
        names: of signals that compare distributions (`kl@...`) only the states are kept.

    Returns:
        Each signal [N], and the states from which they were measured.

    Raises:
        SstokenError: the model's output embedding does not compute one row of logits per position.
    """
    targets, found = tokens.gather(inputs["labels"]), []

    def choose(hidden: Tensor) -> Tensor:
        states = head.states(hidden, tokens, names)
        single = [name for name in names if "@" not in name]
        found.append((head.measure(states, targets, single), states))
        return hidden[:0]

    with states_to_head(model, tokens, choose):
        model(**_without_loss(inputs))
    if len(found) != 1:
        raise _not_causal(model)
    return found[0]


def _without_loss(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in _OF_THE_LOSS}


def _learned(decision: Decision) -> Tensor:
    """Indices [K] of the tokens whose loss counts, ascending."""
    keep, weight, count = decision
    if weight is not None:
        return (weight != 0).nonzero()[:, 0]
    if count is None:
        return keep.nonzero()[:, 0]
    return keep.logical_not().to(torch.uint8).argsort(stable=True)[:count]  # does not wait for the device


def _not_causal(model: nn.Module) -> SstokenError:
    return SstokenError(
        f"{type(unwrapped(model)).__name__}: its output embedding does not compute one row of logits per position; "
        "in-loop selection needs a plain causal language model"
    )
