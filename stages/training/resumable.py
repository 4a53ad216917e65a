"""Resume an interrupted run from the trainer's own checkpoints, saved at snapshots and used only if complete."""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sstoken.errors import SstokenError
from sstoken.stages import plain_json, storage
from sstoken.stages.processes import is_main_process, num_processes
from sstoken.stages.stage import Progress, ProgressBar
from sstoken.stages.storage import write_atomic
from sstoken.stages.training import sealing
from sstoken.stages.training.history import HistorySnapshots

_COMPLETE = "whole.json"


def clean(folder: Path) -> None:
    """Delete checkpoints whose saving was interrupted."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / _COMPLETE).exists():
            storage.of(checkpoint).delete(checkpoint)


def last_complete(folder: Path) -> Path | None:
    """Return the checkpoint to resume from, or None.

    Raises:
        SstokenError: it was made by a different number of processes, which see the data in another order; or one of
            its files was changed since.
    """
    complete = [c for c in folder.glob("checkpoint-*") if (c / _COMPLETE).exists()]
    if not complete:
        return None
    last = max(complete, key=lambda c: int(c.name.rpartition("-")[2]))
    try:
        seal = plain_json.parse_object((last / _COMPLETE).read_bytes())
        then, now = int(seal["processes"]), num_processes()
    except (ValueError, TypeError, KeyError):
        raise SstokenError(f"{last / _COMPLETE}: damaged; remove {folder.parent} to start over") from None
    if then != now:
        raise SstokenError(
            f"{last}: made by {then} processes, but now there are {now}; resume with {then}, or remove "
            f"{folder.parent} to start over"
        )
    if is_main_process():
        sealing.check(folder.parent, seal)
    return last


class Resumable(TrainerCallback):
    """Makes the trainer save a checkpoint at every snapshot but the last, and keeps only the last complete one."""

    def __init__(self, folder: Path, snapshots: HistorySnapshots, keep: Callable[[], None]) -> None:
        self._folder, self._snapshots, self._keep = folder, snapshots, keep
        self._seals = sealing.Seals(folder.parent)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save at a snapshot, which is taken while logging, before the trainer saves."""
        if state.global_step in self._snapshots.steps and state.global_step < state.max_steps:
            control.should_save = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the checkpoint as complete once every process has written its part; delete the previous one."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        saved = self._folder / f"checkpoint-{state.global_step}"
        storage.of(saved).flush(saved)
        examples = self._folder.glob("examples.*")
        seal = self._seals.upto(state.global_step, [saved, *examples])
        write_atomic(saved / _COMPLETE, json.dumps({"processes": num_processes(), **seal}))
        for earlier in self._folder.glob("checkpoint-*"):
            if earlier != saved:
                storage.of(earlier).delete(earlier)
        self._keep()


def log_lines(history: Sequence[dict[str, Any]]) -> str:
    """Return one JSON line for each step of the trainer's log."""
    lines = [
        {
            "step": entry["step"],
            "loss": entry["loss"],
            "learning_rate": entry["learning_rate"],
            "tokens_seen": entry["num_input_tokens_seen"],
        }
        for entry in history
        if "loss" in entry
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


class LiveLog(TrainerCallback):
    """Writes `log.jsonl` during training; a run that resumes drops the lines after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the lines up to the step the run resumes from."""
        if state.is_world_process_zero:
            write_atomic(self._path, log_lines(state.log_history))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append the newest line."""
        if state.is_world_process_zero:
            with self._path.open("a") as file:
                file.write(log_lines(state.log_history[-1:]))


class Watch(TrainerCallback):
    """Shows progress, and stops the run if the loss is not finite. Must come before the snapshots."""

    def __init__(self, stack: ExitStack, progress: ProgressBar, learning_rate: float) -> None:
        self._stack, self._open, self._learning_rate = stack, progress, learning_rate
        self._progress: Progress | None = None
        self._began = 0.0, 0
        """Time at which training started or resumed, and the tokens seen by then."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the progress bar at the step the run resumes from."""
        if state.is_world_process_zero:
            self._progress = self._stack.enter_context(self._open("steps", state.max_steps))
            self._progress.skip(state.global_step)
            self._began = time.monotonic(), state.num_input_tokens_seen

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step."""
        if self._progress is not None:
            self._progress.advance()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Stop at a loss or gradient that is NaN or infinite, before anything is saved.

        Raises:
            SstokenError: the loss or gradient norm is not finite.
        """
        logs = logs or {}
        if self._progress is not None and "loss" in logs:
            began, seen = self._began
            rate = (state.num_input_tokens_seen - seen) / max(1e-9, time.monotonic() - began)
            self._progress.note(f"loss {logs['loss']:.3f}, {rate:,.0f} tokens/s")
        for what, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
            value = logs.get(key, 0.0)
            if not math.isfinite(value):
                raise SstokenError(
                    f"training failed at step {state.global_step}: the {what} is {value}; lower learning_rate "
                    f"(now {self._learning_rate:g}), or check the data of that step"
                )
