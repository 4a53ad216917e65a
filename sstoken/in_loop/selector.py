"""`StepSelector`: selects the tokens of one forward pass of a trainer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sstoken.in_loop.forward import Decision, measure_signals
from sstoken.in_loop.head import MeasuredStates
from sstoken.in_loop.histories import as_history
from sstoken.in_loop.metrics import SelectionMetrics, TrainedBatch
from sstoken.in_loop.remarks import remarks_on_batch, remarks_on_column, remarks_on_losses
from sstoken.in_loop.response_tokens import ResponseTokens
from sstoken.in_loop.rule import CURRENT, CURRENT_ATTENTION, Rule, column_of
from sstoken.methods import Input
from sstoken.signals import get_signal

_LOSS = f"{CURRENT}.loss"
_HISTORY_LOSS = "history.loss"


@dataclass(frozen=True)
class Plan:
    """What is known about a forward pass before it runs; travels with its batch."""

    tokens: ResponseTokens
    rule: Rule
    step: int
    batch: int
    """Index of the micro-batch within the step, counted over all processes."""


class StepSelector:
    """Selects the tokens of one forward pass of a trainer (`forward.Selector`)."""

    reference: MeasuredStates | None = None

    def __init__(self, trainer: Any, plan: Plan, columns: Mapping[str, Tensor], input_ids: Tensor) -> None:
        """Collect what is known before the forward pass; `columns` are the batch's history signals [B, T] by column."""
        self._trainer, self._plan, self._input_ids = trainer, plan, input_ids
        self._metrics: SelectionMetrics = trainer._selection_metrics
        self._signals: dict[str, Tensor] = {
            name: plan.tokens.gather(columns[column_of(name)])
            for name in trainer._selection.inputs
            if column_of(name) in columns
        }
        self._capture = None
        if CURRENT_ATTENTION in plan.rule.inputs or trainer._observers:
            self._capture = trainer._capture
        live = [Input(name).signal for name in plan.rule.inputs if Input(name).role == CURRENT]
        self.signals = tuple(sorted(s for s in live if get_signal(s).needs != "attention"))
        if "loss" not in self.signals and (trainer._observers or _HISTORY_LOSS in self._signals):
            self.signals += ("loss",)

    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Measure the history's signals, and announce which attention to capture."""
        plan, trainer = self._plan, self._trainer
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer._remark("batch", lambda: remarks_on_batch(trainer, inputs, plan.tokens))
        if trainer._history is not None:
            self._measure_history(model, inputs)
        if self._capture is not None:
            self._capture.expect(plan.tokens.response_mask, plan.tokens.segments)

    def _measure_history(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        trainer, plan = self._trainer, self._plan
        frozen = [name for name in plan.rule.inputs if Input(name).role != CURRENT]
        compares = any("@" in name for name in self.signals)
        if not frozen and not compares:
            return
        names = tuple(sorted(Input(name).signal for name in frozen))
        if compares:
            names += tuple(name for name in self.signals if "@" in name)  # so that their states are kept
        with self._metrics.timed(self._input_ids.device), as_history(trainer.model, trainer._history):
            measured, states = measure_signals(model, trainer._head, inputs, plan.tokens, names)
        self._signals |= {name: measured[Input(name).signal] for name in frozen}
        self.reference = states if compares else None

    def select(self, signals: Mapping[str, Tensor]) -> Decision:
        """See `forward.Selector.select`."""
        plan, tokens = self._plan, self._plan.tokens
        known = self._signals | {f"{CURRENT}.{name}": values for name, values in signals.items()}
        if self._capture is not None:
            known[CURRENT_ATTENTION] = tokens.gather(self._capture.take())
        losses, history, attention = (known.get(name) for name in (_LOSS, _HISTORY_LOSS, CURRENT_ATTENTION))
        with self._metrics.timed(tokens.positions.device):
            seed = (self._trainer.args.seed, plan.step, plan.batch)
            keep, weight = plan.rule.decide(known, tokens, seed)
            if losses is not None:
                self._remark(losses, history)
            rel = None if history is None or losses is None else history - losses
            self._metrics.count(keep, rel, attention, weight)
        self._trainer._unseen.append(
            TrainedBatch(plan.step, tokens, self._input_ids, keep, losses, attention, weight)
        )
        return Decision(keep, plan.rule.loss_weight(weight, tokens), plan.rule.num_kept(tokens))

    def _remark(self, losses: Tensor, history: Tensor | None) -> None:
        trainer, plan = self._trainer, self._plan
        if plan.step == 0 and history is not None and trainer._selection.columns:
            trainer._remark("column", lambda: remarks_on_column(trainer, losses, history))
        if plan.rule.keeps_all:
            return
        needed = history if _HISTORY_LOSS in plan.rule.inputs else None
        trainer._remark("losses", lambda: remarks_on_losses(trainer, losses, needed, plan.step))
