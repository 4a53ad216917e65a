"""`SelfModulatedMixin`: in-loop selection for `transformers.Trainer` and its subclasses.

class MyTrainer(SelfModulatedMixin, SFTTrainer): ...
trainer = MyTrainer(..., selection=SelfModulation(rho=0.6))
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sstoken.errors import SstokenError
from sstoken.in_loop.checks import check_trainer, choose_layer, try_out
from sstoken.in_loop.column import HISTORY, CarryHistory, check_column, join_history, split_history
from sstoken.in_loop.core import keep_tokens
from sstoken.in_loop.forward import SelectingModel, measure_losses
from sstoken.in_loop.head import HeadLosses, rounds
from sstoken.in_loop.metrics import SelectionMetrics, TrainedBatch
from sstoken.in_loop.observation import Observer
from sstoken.in_loop.remarks import remarks_on_column, remarks_on_examples, remarks_on_losses
from sstoken.in_loop.response_tokens import ResponseTokens, find_response_tokens
from sstoken.in_loop.settings import SelfModulation
from sstoken.in_loop.together import remarks_on_batch
from sstoken.in_loop.weights import History, as_history, make_history
from sstoken.measure.capture import AttentionCapture

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

_PLAN = "selection_plan"
_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Plan:
    """Settings of one forward pass, known before it runs; travels with its batch."""

    tokens: ResponseTokens
    rho: float
    gamma: float
    step: int


class SelfModulatedMixin(_Base):
    """Trains on the tokens that ssToken selects with the model as it is at each step.

    The loss of an optimisation step is the mean over the kept tokens of all its batches and processes. Evaluation and
    prediction are the trainer's own. Metrics are logged under `selection/`.
    """

    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        selection: SelfModulation | None = None,
        observers: Sequence[Observer] = (),
        **kwargs: Any,
    ) -> None:
        """Make the trainer.

        Args:
            args: the trainer's.
            selection: the settings; None: the defaults.
            observers: called with every example that was trained on, one step later (`observation.Observation`).
            kwargs: the trainer's.

        Raises:
            UsageError: the data, the model or the trainer's settings do not allow in-loop selection.
        """
        self._selection = selection or SelfModulation()
        self._observers = tuple(observers)
        self._selection_metrics = SelectionMetrics()
        self._unseen: list[TrainedBatch] = []
        self._history: History | None = None
        self._history_made = False
        self._column_checked = False
        self._remarked: set[str] = set()
        super().__init__(*args, **kwargs)
        check_trainer(self)
        if self._carries_history and not self._column_checked and self.train_dataset is not None:
            check_column(self.train_dataset)
        if self._selection.history == "base":
            make_history(self.model, self._selection, 0)
        self._capture: AttentionCapture | None = None
        if self._selection.needs_attention:
            self._capture = AttentionCapture(self.model, choose_layer(self))
        self._head = HeadLosses(self.model)
        try_out(self)

    @property
    def _carries_history(self) -> bool:
        return self._selection.history == "scores" and self._selection.needs_history

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Carry the history losses through TRL's truncation and packing."""
        prepare = super()._prepare_dataset
        given = inspect.signature(prepare).bind(dataset, *args, **kwargs).arguments
        evaluates = given.get("dataset_name", "train") != "train" or self._column_checked
        if not self._carries_history or evaluates:
            return prepare(dataset, *args, **kwargs)
        check_column(dataset)
        self._column_checked = True
        from accelerate import PartialState

        with PartialState().main_process_first():  # the others read its cache
            joined = dataset.map(join_history, batched=True, remove_columns=["labels", HISTORY])
        prepared = prepare(joined.rename_column("joined", "labels"), *args, **kwargs)
        prepared = prepared.rename_column("labels", "joined")
        with PartialState().main_process_first():
            return prepared.map(split_history, batched=True, remove_columns=["joined"])

    def get_train_dataloader(self) -> Any:
        """Return the trainer's own data loader, with history losses in its batches."""
        if not self._carries_history:
            return super().get_train_dataloader()
        self._set_signature_columns_if_needed()
        collator, columns = self.data_collator, self._signature_columns
        self.data_collator, self._signature_columns = CarryHistory(collator), [*columns, HISTORY]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator, self._signature_columns = collator, columns

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the batches of an optimisation step, and the number of tokens that all processes will keep."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._look_back()
        settings, step = self._selection, self.state.global_step
        if not self._history_made:
            self._history, self._history_made = make_history(self.model, settings, step), True
        if self._history is not None:
            self._history.follow(step)
        rho, gamma = settings.at(step, self.state.max_steps)
        planned, kept = [], 0
        for batch in batches:
            tokens = find_response_tokens(batch, device)
            kept += sum(tokens.quotas(rho, settings.scope))
            planned.append({**batch, _PLAN: _Plan(tokens, rho, gamma, step)})
        responses = [batch[_PLAN].tokens for batch in planned]
        self._remark("tokens", lambda: remarks_on_examples(responses, settings, rho))
        count = torch.tensor(kept, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return planned, count

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the trainer's loss of the kept tokens; outside of training steps, of all tokens."""
        plan = inputs.pop(_PLAN, None)
        if plan is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        selector = _StepSelector(self, plan, inputs.pop(HISTORY, None), inputs["input_ids"])
        share = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        standin = SelectingModel(
            model, self._head, plan.tokens, selector, self.current_gradient_accumulation_steps * share
        )
        loss = super().compute_loss(standin, inputs, *args, **kwargs)
        if standin.calls != 1:
            raise SstokenError(
                f"compute_loss of {type(self).__name__} calls the model {standin.calls} times in a step; in-loop "
                "selection works on trainers that call it once"
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the selection's metrics with the training loss."""
        if self.model.training and "loss" in logs:
            logs.update(self._selection_metrics.read(self.accelerator.gather, self.args.device))
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. Observers have seen every step when this returns."""
        self._history_made = False
        result = super().train(*args, **kwargs)
        self._look_back()
        return result

    def _remark(self, about: str, remarks: Callable[[], Iterator[str]]) -> None:
        """Warn about a meaningless selection, once for each topic, in the first process."""
        if about not in self._remarked and self.is_world_process_zero():
            self._remarked.add(about)
            for text in remarks():
                warnings.warn(f"in-loop selection: {text}", UserWarning, stacklevel=2)

    def _look_back(self) -> None:
        """Show observers what was trained on; by now, this does not delay the device."""
        for step in self._unseen:
            for observation in step.observations():
                self._selection_metrics.remember(observation)
                for observer in self._observers:
                    observer(observation)
        self._unseen.clear()


class SelfModulatedTrainer(SelfModulatedMixin, Trainer):
    """`transformers.Trainer` with in-loop selection."""


class _StepSelector:
    """Selects the tokens of one forward pass of a trainer."""

    def __init__(self, trainer: Any, plan: _Plan, column: Tensor | None, input_ids: Tensor) -> None:
        self._trainer, self._plan, self._input_ids = trainer, plan, input_ids
        self._metrics: SelectionMetrics = trainer._selection_metrics
        self._history_loss = None if column is None else plan.tokens.gather(column)
        self._capture: AttentionCapture | None = None
        if (plan.gamma < 1 and plan.rho < 1) or trainer._observers:
            self._capture = trainer._capture

    def prepare(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Measure the history's losses; announce which attention to capture."""
        plan, history, trainer = self._plan, self._trainer._history, self._trainer
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            half = rounds(trainer.model.get_input_embeddings().weight)
            own = trainer.model
            trainer._remark("batch", lambda: remarks_on_batch(own, trainer._head, inputs, plan.tokens, half))
        if history is not None and plan.gamma > 0 and plan.rho < 1:
            with self._metrics.timed(self._input_ids.device), as_history(trainer.model, history):
                self._history_loss = measure_losses(model, trainer._head, inputs, plan.tokens)
        if self._capture is not None:
            self._capture.expect(plan.tokens.response_mask, plan.tokens.segments)

    @property
    def measures(self) -> bool:
        """See `Selector.measures`."""
        return self._plan.rho < 1 or self._history_loss is not None or bool(self._trainer._observers)

    @property
    def num_kept(self) -> int:
        """See `Selector.num_kept`."""
        return sum(self._plan.tokens.quotas(self._plan.rho, self._trainer._selection.scope))

    def select(self, losses: Tensor | None) -> Tensor:
        """See `Selector.select`."""
        plan, history = self._plan, self._history_loss
        attention = None if self._capture is None else plan.tokens.gather(self._capture.take())
        with self._metrics.timed(plan.tokens.positions.device):
            keep = keep_tokens(
                losses,
                history,
                attention,
                plan.tokens,
                rho=plan.rho,
                gamma=plan.gamma,
                scope=self._trainer._selection.scope,
            )
            if losses is not None:
                self._remark(losses)
            rel = None if history is None or losses is None else history - losses
            self._metrics.count(keep, rel, attention)
        self._trainer._unseen.append(
            TrainedBatch(plan.step, plan.tokens, self._input_ids, keep, losses, attention)
        )
        return keep

    def _remark(self, losses: Tensor) -> None:
        trainer, column = self._trainer, self._history_loss
        if self._plan.step == 0 and column is not None and trainer._carries_history:
            trainer._remark("column", lambda: remarks_on_column(losses, column, _noisy(trainer)))
        if self._plan.rho == 1:
            return
        needed = column if self._plan.gamma > 0 else None
        dtype = _MIXED.get(str(trainer.accelerator.mixed_precision), trainer.model.dtype)
        vocabulary = trainer.model.get_input_embeddings().weight.shape[0]
        trainer._remark(
            "losses",
            lambda: remarks_on_losses(
                losses, needed, trainer._selection, self._plan.step, vocabulary, dtype, _noisy(trainer)
            ),
        )


def _noisy(trainer: Any) -> bool:
    """Return whether training's losses are random. An adapter's dropout does not count: it starts on zeros."""
    config = trainer.model.config.get_text_config()
    dropouts = [
        m.p for n, m in trainer.model.named_modules() if isinstance(m, nn.Dropout) and "lora_" not in n
    ]
    dropouts.append(getattr(config, "attention_dropout", 0.0) or 0.0)
    return any(dropouts) or bool(trainer.args.neftune_noise_alpha)
