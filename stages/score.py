"""`score`: signals of every response token under one checkpoint."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sstoken.errors import SstokenError, UsageError
from sstoken.signals import ATTENTION, LOSS, get_signal, get_signals
from sstoken.stages import checkpoints, joins, tables
from sstoken.stages.backends import Backend, BackendOptions, Latest, check_backend, make_backend
from sstoken.stages.model_options import ModelOptions, check_lengths
from sstoken.stages.processor import multiplies_bfloat16
from sstoken.stages.scores_file import Column, summarize_scores, write_scores
from sstoken.stages.sharded import Work
from sstoken.stages.stage import BY_CONTENT, SPEED_ONLY, Context, Task, Worker
from sstoken.stages.vocabularies import check_vocabulary


class ScoreOptions(ModelOptions):
    """How checkpoints are scored, whichever they are."""

    signals: tuple[str, ...] = ()
    """What is measured under every checkpoint, by name: loss, attention, entropy, rank, ... None: the loss."""
    layer: int | None = None
    """Decoder layer of the signal `attention`; negative counts from the last. None: the last layer that has softmax
    attention."""
    workers: Annotated[int | None, Field(ge=1), SPEED_ONLY] = None
    """Processes, each with the model in memory. Default: 1, or one for each device of a list."""


class Score(ScoreOptions):
    """Score one checkpoint. Reads `tokens`; writes row-aligned shards of the same names."""

    name: ClassVar[str] = "score"
    folder: ClassVar[str] = "scores"
    unit: ClassVar[str] = "tokens"
    follows_sources: ClassVar[bool] = True  # a checkpoint folder that was trained further

    checkpoint: Annotated[str, BY_CONTENT]
    """A folder, a LoRA adapter's folder, or a Hub id."""
    attention: bool = False
    """Measure the signal `attention` too."""
    references: Annotated[dict[str, str], BY_CONTENT] = Field(default_factory=dict)
    """The checkpoints that signals such as `kl@NAME` compare with, by name."""

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of all signals that are measured, in the order of their columns."""
        names = self.signals or (LOSS,)
        return tuple(s.name for s in get_signals((*names, ATTENTION) if self.attention else names))

    def holding(self, settings: Mapping[str, Any]) -> "Score":
        """This stage with all the signals that finished scores hold, if these are at least its own.

        Args:
            settings: the fields of the stage that made them, as its manifest has them.
        """
        there = (*(settings.get("signals") or (LOSS,)), *((ATTENTION,) if settings.get("attention") else ()))
        return self.model_copy(update={"signals": there}) if {*there} > {*self.measured} else self

    def check(self) -> None:
        """Refuse an unknown signal, an incomplete checkpoint, or one that the backend does not take."""
        for ref in (self.checkpoint, *self.references.values()):
            checkpoints.check_loadable(ref)
        check_backend(self.backend, self.for_backend(), self.workers or 1)

    def sources(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """The content of the checkpoint and of what it is compared with; their places do not matter."""
        sources: dict[str, Any] = {"checkpoint": checkpoints.identity(self.checkpoint, digest)}
        if self.references:
            sources["references"] = {
                name: checkpoints.identity(ref, digest) for name, ref in self.references.items()
            }
        return sources

    def fingerprinted(self) -> dict[str, Any]:
        """Without the layer where none is looked at; the backend is the one that runs."""
        fields = self.fingerprinted_for(self.for_backend())
        measured = set(self.measured)
        fields["attention"] = ATTENTION in measured
        if not fields["attention"]:
            del fields["layer"]
        # With the signals that there always were, it stays what it always was: finished scores stay finished.
        del fields["signals"]
        if measured - {ATTENTION} != {LOSS}:
            fields["signals"] = sorted(measured)
        return fields

    def for_backend(self, log_folder: Path | None = None, device: str | None = None) -> BackendOptions:
        """What the backend gets to know."""
        return self.backend_for(
            self.checkpoint,
            log_folder=log_folder,
            device=device,
            signals=self.measured,
            layer=self.layer,
            references=tuple(sorted(self.references.items())),
        )

    def faster(self) -> str:
        """See `Stage.faster`."""
        import torch

        levers = []
        if not torch.accelerator.is_available() or self.device.startswith("cpu"):
            if self.dtype == "float32" and multiplies_bfloat16():
                levers.append("--dtype bfloat16, which this processor multiplies natively (see doctor)")
            levers.append("a GPU")
        else:
            if self.dtype == "float32":
                levers.append("--dtype bfloat16")
            if self.backend in ("auto", "hf"):
                levers.append("--backend vllm")
        if self.batch_tokens is not None:
            levers.append("the default --batch-tokens")
        return "; ".join(levers)

    def work(self, context: Context) -> Work:
        """A task a shard."""
        token_parts = tables.parts(context.inputs["tokens"])
        for ref in (self.checkpoint, *self.references.values()):
            own = checkpoints.own_tokenizer(ref, trust_remote_code=self.trust_remote_code)
            check_vocabulary(ref, own, context.inputs["tokens"])
        return Work(
            _ScoreShard(self, context.out, context.fingerprint),
            [Task(context.out / path.name, tables.num_tokens(path), path) for path in token_parts],
        )

    def finish(self, context: Context) -> dict[str, Any]:
        """Sum up the shards."""
        summary = summarize_scores(context.out, self.checkpoint)
        if joins.trained_on_others(self.checkpoint, context.inputs["tokens"]):
            summary["trained_on_other_tokens"] = True
        return summary


def compared(options: Mapping[str, Any], name: str, named: Mapping[str, str]) -> dict[str, Any]:
    """The options for one of several checkpoints: its signals, and the checkpoints that these compare it with.

    Args:
        options: the fields of `ScoreOptions`.
        name: the checkpoint's; it is not compared with itself.
        named: all checkpoints that are scored, by name.

    Raises:
        UsageError: a signal names a checkpoint that is not scored.
    """
    wanted = get_signals(options["signals"])
    against = {s.name: s.argument for s in wanted if s.needs == "second checkpoint"}
    for signal, other in against.items():
        if other not in named:
            raise UsageError(
                f"signal {signal!r}: no checkpoint is called {other!r}; legal: {', '.join(named)} (name another with "
                "--ckpt NAME=PATH)"
            )
    signals = tuple(s.name for s in wanted if against.get(s.name) != name)
    references = {str(other): named[str(other)] for other in against.values() if other != name}
    return {**options, "signals": signals, "references": references}


@Latest
def _backend(name: str, options: BackendOptions, stamp: tuple[Any, ...]) -> Backend:
    """One backend per process: shards of a checkpoint share it; `stamp` tells when its files have changed."""
    return make_backend(name, options)


class _ScoreShard:
    """Scores one shard of tokens; pickles into worker processes."""

    def __init__(self, stage: Score, out: Path, run: str) -> None:
        self._stage, self._out, self._run = stage, out, run

    def __call__(self, tokens: Path, worker: Worker) -> None:
        """Write the scores of the shard."""
        stage = self._stage
        options = stage.for_backend(self._out.parent, worker.device)
        stamps = tuple(map(checkpoints.stamp, (stage.checkpoint, *stage.references.values())))
        backend = _backend(stage.backend, options, stamps)
        table = tables.read_table(tokens)
        sequences, masks = tables.rows(table["input_ids"]), tables.rows(table["response_mask"])
        example_ids = table["example_id"].to_pylist()
        check_lengths(stage.checkpoint, backend, tokens, example_ids, sequences)
        response, offsets = tables.flatten(table["response_mask"])
        columns = self._measure(tokens.name, backend, example_ids, sequences, masks, worker)
        provenance = self._provenance(backend) | {joins.TOKENS: joins.measured_fingerprint(tokens, table)}
        write_scores(
            self._out / tokens.name, example_ids, offsets, response.astype(bool), columns, provenance
        )

    def _measure(
        self,
        shard: str,
        backend: Backend,
        example_ids: list[str],
        sequences: list[NDArray[np.int32]],
        masks: list[NDArray[np.bool_]],
        worker: Worker,
    ) -> dict[str, Column]:
        """The signals of all examples, compact and one after the other."""
        stage = self._stage
        named = {name: get_signal(name) for name in stage.measured}
        counts = np.array([mask.sum() for mask in masks], dtype=np.int64)
        starts = {
            name: np.concatenate([[0], np.cumsum(np.maximum(counts - signal.from_second, 0))])
            for name, signal in named.items()
        }
        # Flat from the start: thousands of small arrays would keep the heap in pieces.
        columns: dict[str, Column] = {
            name: np.zeros(starts[name][-1], np.dtype(signal.dtype)) for name, signal in named.items()
        }
        left = set(range(len(sequences)))
        for index, signals in backend.measure(sequences, masks):
            if not named.keys() <= signals.keys():
                continue
            for name, column in columns.items():
                if not np.isfinite(signals[name]).all():
                    raise SstokenError(
                        f"{stage.checkpoint}: NaN or infinite {name} in {shard}, example {example_ids[index]!r}; the "
                        f"checkpoint or its dtype ({stage.dtype}) is broken"
                    )
                column[starts[name][index] : starts[name][index + 1]] = signals[name]
            left.discard(index)
            worker.advance(sequences[index].size)
        if left:
            raise SstokenError(
                f"backend {stage.backend!r} did not measure all that was asked for: {len(left)} of {len(sequences)} "
                f"examples of {shard} are missing ({example_ids[min(left)]!r}); report it to its authors"
            )
        return columns

    def _provenance(self, backend: Backend) -> dict[str, Any]:
        stage = self._stage
        layers = backend.attention_layers
        return {
            "checkpoint": stage.checkpoint,
            "layer": layers.get(ATTENTION, stage.layer) if ATTENTION in stage.measured else None,
            "layers": layers,
            "dtype": stage.dtype,
            "computed_with": backend.remark,
            joins.RUN: self._run,
        }
