"""Divides by the number of kept tokens when that is known only after the forward passes.

Micro-batches are back-propagated one by one, before the scores of the last one are known. Their losses are first
divided by the number of response tokens; after the last one, gradients and loss are rescaled to the number kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sstoken.in_loop.response_tokens import ResponseTokens
from sstoken.in_loop.rule import Rule


class Rescale:
    """The divisor of one optimisation step."""

    def __init__(self, rule: Rule) -> None:
        """Take the rule of the step."""
        self._rule = rule
        self._kept: Tensor | None = None
        self._divided_by: int = 0
        self._loss: Tensor | None = None
        self.due = False
        """Whether the divisor in use is provisional."""

    def planned(self, tokens: ResponseTokens) -> int:
        """Return the divisor of a micro-batch's loss, as far as it is known before its forward pass."""
        if self._rule.denominator == "response":
            return tokens.num_tokens
        kept = self._rule.num_kept(tokens)
        self.due |= kept is None
        return tokens.num_tokens if kept is None else kept

    def add(self, kept: Tensor | None, num_tokens: int) -> None:
        """Count a micro-batch after its forward pass: its kept tokens, and its response tokens."""
        if self.due and kept is not None:
            self._kept = kept if self._kept is None else self._kept + kept
            self._divided_by += num_tokens

    def after_backward(
        self, loss: Tensor, model: nn.Module, of_all_processes: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        """Record a micro-batch's loss, divided by the provisional divisor; after the last one, rescale the gradients.

        Args:
            loss: detached.
            model: its gradients are complete after the last micro-batch.
            of_all_processes: sums a count over processes; None: more micro-batches follow.

        Returns:
            The amount to add to the step's loss.
        """
        if of_all_processes is None or self._kept is None:
            self._loss = loss if self._loss is None else self._loss + loss
            return loss
        divided_by = torch.tensor(self._divided_by, device=self._kept.device)
        factor = of_all_processes(divided_by) / of_all_processes(self._kept).clamp(min=1)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
        if self._loss is None:
            return loss * factor
        return (self._loss + loss) * factor - self._loss
