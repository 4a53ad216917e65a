"""`HistorySnapshots`: a callback that saves a training run's history, in any transformers or TRL trainer.

trainer = SFTTrainer(..., callbacks=[HistorySnapshots("history", num_snapshots=4)])
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import storage
from sstoken.stages.checkpoints import lasting_reference
from sstoken.stages.hub_models import split_revision
from sstoken.stages.storage import write_atomic
from sstoken.stages.training.history_index import INDEX, Entry, Kind, read_index, reference, write_index
from sstoken.stages.weight_files import ADAPTER_CONFIG, read_json


class HistorySnapshots(TrainerCallback):
    """Saves evenly spaced snapshots of the model, each as a folder that `from_pretrained` loads.

    Writes `out/step-<K>/` (safetensors and tokenizer; for a PEFT model, the adapter only) and `out/history.json`, whose
    first entry, `step-0`, refers to the base model without copying it. The last step is always a snapshot. The loss is
    logged at every snapshot, whatever `logging_steps` is.

    Weights are saved in the dtype they are trained in. In a distributed run, the main process writes.

    Args:
        out: the history's folder.
        num_snapshots: number of snapshots, the last at the last step (default 4, unless `every_steps` is given).
        every_steps: optimizer steps between snapshots, instead of `num_snapshots`; the last step is one, too.
        ema_decay: in (0, 1): also save an exponential moving average of the trained weights in float32,
            `average = ema_decay * average + (1 - ema_decay) * weights` after each step, starting from the initial
            weights, as `step-<K>-ema`. Training can then resume only at a snapshot's step.
        base: the checkpoint that `step-0` refers to; by default, the one that the model was loaded from.

    Raises:
        UsageError: a value is out of range.
        SstokenError: during training, if the weights are sharded or the average cannot be resumed.
    """

    def __init__(
        self,
        out: str | Path,
        num_snapshots: int | None = None,
        every_steps: int | None = None,
        *,
        ema_decay: float | None = None,
        base: str | None = None,
    ) -> None:
        if num_snapshots is not None and every_steps is not None:
            raise UsageError(
                f"num_snapshots is {num_snapshots} and every_steps is {every_steps}; give one, not both"
            )
        if every_steps is None and num_snapshots is None:
            num_snapshots = 4
        for name, value in (("num_snapshots", num_snapshots), ("every_steps", every_steps)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise UsageError(f"ema_decay is {ema_decay}; it must lie between 0 and 1, for example 0.99")
        self.steps: frozenset[int] = frozenset()
        """The steps of the snapshots; set when training starts."""
        self._out, self._ema_decay, self._base = Path(out), ema_decay, base
        self._num_snapshots, self._every_steps = num_snapshots, every_steps
        self._lasting_base: str | None = None
        self._entries: list[Entry] = []
        self._average: _Average | None = None
        self._last_step = 0
        self._last_loss: float | None = None
        self._tokens_seen: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plan the snapshots; drop the entries that training will make again."""
        self.steps = snapshot_steps(state.max_steps, self._num_snapshots, self._every_steps)
        self._last_step = state.global_step
        self._last_loss = self._tokens_seen = None
        model = extract_model_from_parallel(kwargs["model"])
        _refuse_sharded(model)
        if not state.is_world_process_zero:
            return
        storage.of(self._out).make_folder(self._out)
        storage.of(self._out).sweep(self._out)
        earlier = read_index(self._out) if (self._out / INDEX).exists() else []
        self._entries = [e for e in earlier if 0 < e.step <= state.global_step]
        bare = model.get_base_model() if _is_adapted(model) else model
        base, self._lasting_base = self._base or getattr(bare, "name_or_path", None), None
        if base:  # unless it was built from scratch
            self._lasting_base = lasting_reference(base, getattr(bare.config, "_commit_hash", None))
            self._entries.insert(0, reference(self._out, self._lasting_base))
        write_index(self._out, self._entries)
        if self._ema_decay is not None:
            self._average = _Average(model, self._ema_decay)
            if (step := state.global_step) > 0:
                name = f"step-{step}-ema"
                if not any(entry.name == name for entry in self._entries):
                    raise SstokenError(
                        f"{self._out}: no {name}, so the average cannot resume at step {step}; resume at a snapshot's "
                        "step, or leave ema_decay out"
                    )
                self._average.load(model, self._out / name)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Update the average; request the loss if a snapshot is due."""
        if self._average is not None:
            self._average.update(extract_model_from_parallel(kwargs["model"]))
        if state.global_step in self.steps:
            control.should_log = True  # on every process, since the loss is gathered from all
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take a snapshot if one is due. The trainer logs before it saves, so no checkpoint precedes its snapshot."""
        logs = logs or {}
        self._last_loss = logs.get("loss", self._last_loss)
        trl_count = logs.get("num_tokens")
        self._tokens_seen = state.num_input_tokens_seen or trl_count or self._tokens_seen
        if state.global_step in self.steps:
            self._take(state, kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the last snapshot of a run that stops early, before a best model replaces the last one."""
        if control.should_training_stop:
            self._take(state, kwargs)

    def _take(self, state: TrainerState, kwargs: dict[str, Any]) -> None:
        if state.global_step <= self._last_step:
            return
        self._last_step = state.global_step
        if not state.is_world_process_zero:
            return
        model = extract_model_from_parallel(kwargs["model"])
        tokenizer = kwargs.get("processing_class")
        name = f"step-{state.global_step}"
        self._save(name, "lora" if _is_adapted(model) else "full", model, tokenizer, state)
        if self._average is not None:
            with self._average.installed_in(model):
                self._save(f"{name}-ema", "ema", model, tokenizer, state)
        write_index(self._out, self._entries)

    def _save(self, name: str, kind: Kind, model: Any, tokenizer: Any, state: TrainerState) -> None:
        # Replaces one of that name, which an interrupted run may have left after its last checkpoint.
        with storage.of(self._out).put_folder(self._out / name) as folder:
            model.save_pretrained(folder)
            if _is_adapted(model) and self._lasting_base is not None:
                _name_base(folder, self._lasting_base)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        tokens_seen = None if self._tokens_seen is None else int(self._tokens_seen)
        self._entries.append(Entry(name, name, state.global_step, tokens_seen, self._last_loss, kind))


def snapshot_steps(max_steps: int, num_snapshots: int | None, every_steps: int | None) -> frozenset[int]:
    """Return the steps at which snapshots are taken: evenly spaced or every so many steps, and the last."""
    if every_steps is not None:
        return frozenset([*range(every_steps, max_steps, every_steps), max_steps])
    count = num_snapshots or 1
    return frozenset(max(1, round(k * max_steps / count)) for k in range(1, count + 1))


class _Average:
    """An exponential moving average of the trained parameters in float32."""

    def __init__(self, model: Any, decay: float) -> None:
        weights = _float_weights(model)
        self._shadow = AveragedModel(weights, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._shadow.update_parameters(weights)  # the first update copies the initial weights

    def update(self, model: Any) -> None:
        self._shadow.update_parameters(_float_weights(model))

    @contextmanager
    def installed_in(self, model: Any) -> Iterator[None]:
        """Put the averaged weights into the model; restore its own exactly afterwards."""
        parameters = list(_trained(model).values())
        own = [p.data for p in parameters]
        try:
            for parameter, averaged in zip(parameters, self._shadow.module.parameters(), strict=True):
                parameter.data = averaged.data
            yield
        finally:
            for parameter, data in zip(parameters, own, strict=True):
                parameter.data = data

    def load(self, model: Any, folder: Path) -> None:
        """Resume from a saved average."""
        if isinstance(model, PreTrainedModel):
            saved = type(model).from_pretrained(folder, dtype=torch.float32).to(model.device)
            weights = dict(saved.named_parameters())
            with torch.no_grad():
                for name, averaged in zip(_trained(model), self._shadow.module.parameters(), strict=True):
                    averaged.copy_(weights[name])
        else:
            from peft import load_peft_weights, set_peft_model_state_dict

            with self.installed_in(model):
                set_peft_model_state_dict(model, load_peft_weights(str(folder), device=str(model.device)))


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _float_weights(model: Any) -> torch.nn.ParameterList:
    """Return the trained parameters in float32, without a copy if they already are."""
    weights = (p.detach().float() for p in _trained(model).values())
    return torch.nn.ParameterList(torch.nn.Parameter(w, requires_grad=False) for w in weights)


def _is_adapted(model: Any) -> bool:
    return not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config")


def _name_base(adapter: Path, base: str) -> None:
    """Write the base into an adapter's configuration in a form that works in any working directory."""
    for path in (adapter / ADAPTER_CONFIG, *adapter.glob(f"*/{ADAPTER_CONFIG}")):
        if path.is_file():
            name, revision = (base, None) if Path(base).is_absolute() else split_revision(base)
            config = read_json(path) | {"base_model_name_or_path": name, "revision": revision}
            write_atomic(path, json.dumps(config, indent=2, sort_keys=True))


def _refuse_sharded(model: Any) -> None:
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if (
            isinstance(parameter, DTensor)
            or hasattr(parameter, "ds_id")
            or type(model).__name__.startswith("FSDP")
        ):
            raise SstokenError(
                f"parameter {name} is sharded over processes (FSDP or DeepSpeed ZeRO-3), which snapshots do not "
                "support; train with plain data parallelism, or with LoRA to need less memory"
            )
