"""The trainer's own checkpoints, from which an interrupted run goes on: whole ones only, at snapshots only."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sstoken.errors import SstokenError
from sstoken.stages.files import flush_to_disk, write_atomic
from sstoken.stages.processes import num_processes
from sstoken.stages.stage import Progress
from sstoken.stages.training.history import HistorySnapshots

_WHOLE = "whole.json"


def clean(folder: Path) -> None:
    """Remove checkpoints whose saving was interrupted."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / _WHOLE).exists():
            shutil.rmtree(checkpoint)


def last_whole(folder: Path) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        SstokenError: it was made by another number of processes, which see the data in another order.
    """
    whole = [c for c in folder.glob("checkpoint-*") if (c / _WHOLE).exists()]
    if not whole:
        return None
    last = max(whole, key=lambda c: int(c.name.rpartition("-")[2]))
    then, now = json.loads((last / _WHOLE).read_text())["processes"], num_processes()
    if then != now:
        raise SstokenError(
            f"{last}: made by {then} processes, and now there are {now}; go on with {then}, or remove {folder.parent} "
            "to start over"
        )
    return last


class Resumable(TrainerCallback):
    """Has the trainer save itself wherever a snapshot was taken, and keeps the last whole checkpoint.

    There is none at the last step: there, nothing is left to go on with.
    """

    def __init__(self, folder: Path, snapshots: HistorySnapshots) -> None:
        self._folder = folder
        self._snapshots = snapshots

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Save at a snapshot: it is taken while logging, before the trainer saves."""
        if state.global_step in self._snapshots.steps and state.global_step < state.max_steps:
            control.should_save = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the checkpoint as whole once every process has written its part; drop the one before."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        saved = self._folder / f"checkpoint-{state.global_step}"
        flush_to_disk(saved)
        write_atomic(saved / _WHOLE, json.dumps({"processes": num_processes()}))
        for earlier in self._folder.glob("checkpoint-*"):
            if earlier != saved:
                (earlier / _WHOLE).unlink(missing_ok=True)  # first, so that a half-removed one is not whole
                shutil.rmtree(earlier)


class Watch(TrainerCallback):
    """Shows progress, and stops the run where the loss is not a number. Goes before the snapshots."""

    def __init__(
        self,
        stack: ExitStack,
        progress: Callable[[str, int | None], AbstractContextManager[Progress]],
        learning_rate: float,
    ) -> None:
        self._stack = stack
        self._open = progress
        self._learning_rate = learning_rate
        self._progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, with what an earlier run did counted as done."""
        if state.is_world_process_zero:
            self._progress = self._stack.enter_context(self._open("steps", state.max_steps))
            self._progress.advance(state.global_step)

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
        """Refuse to go on, or to save anything, after a loss or gradient that is NaN or infinite.

        Raises:
            SstokenError: it is.
        """
        for what, key in (("loss", "loss"), ("gradient norm", "grad_norm")):
            value = (logs or {}).get(key, 0.0)
            if not math.isfinite(value):
                raise SstokenError(
                    f"training failed at step {state.global_step}: the {what} is {value}; lower learning_rate "
                    f"(now {self._learning_rate:g}) or look at the data of that step"
                )
