"""`SelfModulatedMixin`: in-loop selection for `transformers.Trainer` and its subclasses.

class MyTrainer(SelfModulatedMixin, SFTTrainer): ...
trainer = MyTrainer(..., selection=SelfModulation(rho=0.6))
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from sstoken.errors import SstokenError
from sstoken.in_loop.checks import check_trainer, choose_layer, try_out
from sstoken.in_loop.forward import SelectingModel
from sstoken.in_loop.head import HeadSignals
from sstoken.in_loop.histories import History, make_history
from sstoken.in_loop.history_columns import CarryHistory, check_columns, prepare_with_columns
from sstoken.in_loop.metrics import SelectionMetrics, TrainedBatch
from sstoken.in_loop.observation import Observer
from sstoken.in_loop.remarks import remarks_on_changes, remarks_on_examples
from sstoken.in_loop.rescale import Rescale
from sstoken.in_loop.response_tokens import find_response_tokens
from sstoken.in_loop.selector import Plan, StepSelector
from sstoken.in_loop.settings import SelfModulation
from sstoken.measure.capture import AttentionCapture

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

_PLAN = "selection_plan"


class SelfModulatedMixin(_Base):
    """Selects or weights the tokens of each training step, by ssToken or another method, with the current model.

    The loss of an optimisation step is the mean over the kept tokens of all its batches and processes, or the weighted
    sum divided by the number of response tokens. Evaluation and prediction are unchanged. Metrics are logged under
    `selection/`.
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
        """Create the trainer; `args` and `kwargs` are passed on to it.

        Args:
            selection: the settings; None: the defaults.
            observers: each is called with every trained example, one step later (`observation.Observation`).

        Raises:
            UsageError: the data, the model or the trainer's settings do not allow in-loop selection.
        """
        self._selection = selection or SelfModulation()
        self._observers = tuple(observers)
        self._selection_metrics = SelectionMetrics()
        self._unseen: list[TrainedBatch] = []
        self._history: History | None = None
        self._history_made = False
        self._rescale: Rescale | None = None
        self._column_checked = False
        self._remarked: set[str] = set()
        super().__init__(*args, **kwargs)
        check_trainer(self)
        if self._selection.columns and not self._column_checked and self.train_dataset is not None:
            check_columns(self.train_dataset, self._selection.columns)
        if self._selection.history == "base":
            make_history(self.model, self._selection, 0)
        self._capture: AttentionCapture | None = None
        if self._selection.needs_attention:
            self._capture = AttentionCapture(self.model, choose_layer(self))
        self._head = HeadSignals(self.model)
        try_out(self)
        self.add_callback(_beginning(self))

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Carry the history losses through TRL's truncation and packing."""
        prepare, columns = super()._prepare_dataset, self._selection.columns
        given = inspect.signature(prepare).bind(dataset, *args, **kwargs).arguments
        evaluates = given.get("dataset_name", "train") != "train" or self._column_checked
        if not columns or evaluates:
            return prepare(dataset, *args, **kwargs)
        check_columns(dataset, columns)
        self._column_checked = True
        return prepare_with_columns(lambda rows: prepare(rows, *args, **kwargs), dataset, columns)

    def get_train_dataloader(self) -> Any:
        """Return the trainer's own data loader, with history losses in its batches."""
        carried = self._selection.columns
        if not carried:
            return super().get_train_dataloader()
        self._set_signature_columns_if_needed()
        collator, columns = self.data_collator, self._signature_columns
        self.data_collator = CarryHistory(collator, carried)
        self._signature_columns = [*columns, *carried]
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator, self._signature_columns = collator, columns

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the batches of an optimisation step, and the number of tokens that all processes keep."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._show_observers()
        settings, step = self._selection, self.state.global_step
        if not self._history_made:
            self._history, self._history_made = make_history(self.model, settings, step), True
        if self._history is not None:
            self._history.follow(step)
        rule = settings.rule(step, self.state.max_steps)
        planned, divisor = [], 0
        self._rescale = Rescale(rule)
        for index, batch in enumerate(batches):
            tokens = find_response_tokens(batch, device)
            divisor += self._rescale.planned(tokens)
            number = self.accelerator.process_index + index * self.accelerator.num_processes
            planned.append({**batch, _PLAN: Plan(tokens, rule, step, number)})
        responses = [batch[_PLAN].tokens for batch in planned]
        num_steps = self.state.max_steps
        self._remark("tokens", lambda: remarks_on_examples(responses, settings, rule, num_steps))
        return planned, self._of_all_processes(torch.tensor(divisor, device=device))

    def _of_all_processes(self, count: Tensor) -> Tensor:
        """Sum a count over the processes whose gradients are averaged."""
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Run a micro-batch; after the last of a step, rescale if the number of kept tokens is known only now."""
        loss: Tensor = super().training_step(model, *args, **kwargs)
        if self._rescale is not None and self._rescale.due:
            last = self.accelerator.sync_gradients
            return self._rescale.after_backward(loss, self.model, self._of_all_processes if last else None)
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the trainer's loss over the kept tokens; outside training steps, over all tokens."""
        plan = inputs.pop(_PLAN, None)
        if plan is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        columns = {name: inputs.pop(name) for name in self._selection.columns if name in inputs}
        selector = StepSelector(self, plan, columns, inputs["input_ids"])
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
        if self._rescale is not None:
            self._rescale.add(standin.num_kept, plan.tokens.num_tokens)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the selection's metrics with the training loss."""
        if self.model.training and "loss" in logs:
            logs.update(self._selection_metrics.read(self.accelerator.gather, self.args.device))
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; observers have seen every step when this returns."""
        result = super().train(*args, **kwargs)
        self._show_observers()
        return result

    def _begin(self) -> None:
        """Drop what an attempt left that failed in the midst of a step (`auto_find_batch_size`)."""
        self._history, self._history_made = None, False
        self._unseen.clear()
        self._selection_metrics.drop()

    def _remark(self, about: str, remarks: Callable[[], Iterator[str]]) -> None:
        """Warn about a meaningless selection, once for each topic, in the first process."""
        if about not in self._remarked and self.is_world_process_zero():
            self._remarked.add(about)
            for text in remarks():
                warnings.warn(f"in-loop selection: {text}", UserWarning, stacklevel=2)

    def _show_observers(self) -> None:
        """Show observers what was trained on. One step later, this no longer delays the device."""
        for step in self._unseen:
            for observation in step.observations():
                self._selection_metrics.remember(observation)
                for observer in self._observers:
                    observer(observation)
        self._unseen.clear()


class SelfModulatedTrainer(SelfModulatedMixin, Trainer):
    """`transformers.Trainer` with in-loop selection."""


def _beginning(trainer: SelfModulatedMixin) -> TrainerCallback:
    """Return a callback that begins each run, records the settings in checkpoints, and compares them with those there.

    They are a callback's state in `trainer_state.json`. A trainer that restores its callbacks makes this one anew
    without arguments: hence a class of its own, which has the settings of now.
    """

    class SelectionRecord(TrainerCallback, ExportableState):
        def __init__(self) -> None:
            self._record: Mapping[str, Any] = {}

        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {}, "selection": self._record}

        def on_train_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            trainer._begin()
            name = type(self).__name__
            self._record = trainer._selection.record(state.max_steps)
            if state.global_step and state.is_world_process_zero:
                then = state.stateful_callbacks.get(name, {}).get("selection", {})
                for text in remarks_on_changes(then, self._record, state.global_step):
                    warnings.warn(f"in-loop selection: {text}", UserWarning, stacklevel=2)
            # The trainer expects it, and older checkpoints lack it.
            state.stateful_callbacks[name] = self.state()

    return SelectionRecord()
