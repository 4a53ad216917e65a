"""Stage `score`: measure signals of every response token under one checkpoint."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sstoken.errors import SstokenError, UsageError
from sstoken.signals import ATTENTION, LOSS, Signal, get_signal, get_signals
from sstoken.stages import checkpoints, joins, tables
from sstoken.stages.backends import Backend, BackendOptions, Latest, check_backend, make_backend
from sstoken.stages.machine import multiplies_bfloat16
from sstoken.stages.model_options import ModelOptions, check_lengths
from sstoken.stages.scores_file import Column, summarize_scores, write_scores
from sstoken.stages.sharded import Work
from sstoken.stages.stage import BY_CONTENT, SPEED_ONLY, Context, Task, Worker
from sstoken.stages.vocabularies import check_vocabulary
from sstoken.stages.windows import Windows, windows


class ScoreOptions(ModelOptions):
    """How checkpoints are scored: what all checkpoints of a run share."""

    signals: tuple[str, ...] = ()
    """Signals to measure under every checkpoint: loss, attention, entropy, rank, ... None: the loss."""
    layer: int | None = None
    """Decoder layer of the signal `attention`; negative counts from the last. None: the last layer with softmax
    attention."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Measure examples longer than the model takes in overlapping windows, each this many tokens after the last; late
    tokens then lack the earliest context. Not for signals that need the prompt. None: refuse such examples."""
    workers: Annotated[int | None, Field(ge=1), SPEED_ONLY] = None
    """Processes, each with the model in memory. Default: 1, or one for each device of a list."""


class Score(ScoreOptions):
    """Score one checkpoint: reads `tokens`, writes a row-aligned shard for each."""

    name: ClassVar[str] = "score"
    folder: ClassVar[str] = "scores"
    unit: ClassVar[str] = "tokens"
    follows_sources: ClassVar[bool] = True  # a checkpoint may be trained further in the same folder

    checkpoint: Annotated[str, BY_CONTENT]
    """A folder, a LoRA adapter's folder, or a Hub id."""
    attention: bool = False
    """Measure the signal `attention` too."""
    references: Annotated[dict[str, str], BY_CONTENT] = Field(default_factory=dict)
    """Checkpoints that signals such as `kl@NAME` compare with, by name."""

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of all signals that are measured, in the order of their columns."""
        names = self.signals or (LOSS,)
        return tuple(s.name for s in get_signals((*names, ATTENTION) if self.attention else names))

    def holding(self, settings: Mapping[str, Any]) -> "Score":
        """Return this stage with all the signals of finished scores, if they include its own.

        Args:
            settings: fields of the stage that made the scores, from their manifest.
        """
        finished = (
            *(settings.get("signals") or (LOSS,)),
            *((ATTENTION,) if settings.get("attention") else ()),
        )
        return self.model_copy(update={"signals": finished}) if {*finished} > {*self.measured} else self

    def check(self) -> None:
        """Refuse an unknown signal, and a checkpoint that is incomplete or that the backend does not support.

        Raises:
            UsageError: also for a signal that windows cannot give.
        """
        if self.stride is not None:
            whole = [s.name for s in get_signals(self.measured) if s.needs in ("attention", "second pass")]
            if whole:
                raise UsageError(
                    f"stride is {self.stride}: a window may lack the prompt, which {', '.join(whole)} needs; measure "
                    "other signals (--attention-from none), or leave out stride"
                )
        for ref in (self.checkpoint, *self.references.values()):
            checkpoints.check_loadable(ref)
        check_backend(self.backend, self.for_backend(), self.workers or 1)

    def sources(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """Identify the content of the checkpoint and of those it is compared with, wherever they lie."""
        sources: dict[str, Any] = {"checkpoint": checkpoints.identity(self.checkpoint, digest)}
        if self.references:
            sources["references"] = {
                name: checkpoints.identity(ref, digest) for name, ref in self.references.items()
            }
        return sources

    def fingerprinted(self) -> dict[str, Any]:
        """See `Settings.fingerprinted`: the layer counts only if attention is measured."""
        fields = self.fingerprinted_for(self.for_backend())
        measured = set(self.measured)
        fields["attention"] = ATTENTION in measured
        if not fields["attention"]:
            del fields["layer"]
        if self.stride is None:
            del fields["stride"]
        # Loss and attention came before `signals`: leave it out, so that scores made before stay finished.
        del fields["signals"]
        if measured - {ATTENTION} != {LOSS}:
            fields["signals"] = sorted(measured)
        return fields

    def for_backend(self, log_folder: Path | None = None, device: str | None = None) -> BackendOptions:
        """Return the backend's options for this stage."""
        return self.backend_for(
            log_folder=log_folder,
            device=device,
            signals=self.measured,
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
        """See `ShardedStage.work`."""
        token_parts = tables.parts(context.inputs["tokens"])
        for ref in (self.checkpoint, *self.references.values()):
            own = checkpoints.own_tokenizer(ref, trust_remote_code=self.trust_remote_code)
            check_vocabulary(ref, own, context.inputs["tokens"])
        return Work(
            partial(_score_shard, self, context.out, context.fingerprint),
            [Task(context.out / path.name, tables.num_tokens(path), path) for path in token_parts],
        )

    def finish(self, context: Context) -> dict[str, Any]:
        """Add up the shards' sums."""
        summary = summarize_scores(context.out, self.checkpoint)
        if self.stride is not None:
            counts = [tables.read_metadata(part)["in_windows"] for part in tables.parts(context.out)]
            summary["in_windows"] = sum(counts)
            cut = f"{sum(counts)} of {summary['examples']} examples in windows, a stride of {self.stride} tokens"
            summary["computed_with"] = "; ".join(filter(None, [summary.get("computed_with"), cut]))
        if joins.trained_on_others(self.checkpoint, context.inputs["tokens"]):
            summary["trained_on_other_tokens"] = True
        return summary


def compared(options: Mapping[str, Any], name: str, named: Mapping[str, str]) -> dict[str, Any]:
    """Return the options for scoring one of several checkpoints, with the `references` that its signals need.

    Args:
        options: the fields of `ScoreOptions`.
        name: the checkpoint's name; signals that compare it with itself are left out.
        named: all checkpoints that are scored, by name.

    Raises:
        UsageError: a signal refers to a checkpoint that is not scored.
    """
    wanted = get_signals(options["signals"])
    against = {s.name: s.argument for s in wanted if s.needs == "second checkpoint"}
    for signal, other in against.items():
        if other not in named:
            raise UsageError(
                f"signal {signal!r}: no checkpoint is called {other!r}; legal: {', '.join(named)} (name another with "
                "--ckpt NAME=PATH)"
            )
        if list(named) == [other]:
            raise UsageError(f"signal {signal!r}: it compares {other} with itself; name another --ckpt")
    signals = tuple(s.name for s in wanted if against.get(s.name) != name)
    references = {str(other): named[str(other)] for other in against.values() if other != name}
    return {**options, "signals": signals, "references": references}


_backend = Latest(make_backend)
"""This process's backend, shared by all shards."""


def _score_shard(stage: Score, out: Path, run: str, tokens: Path, worker: Worker) -> None:
    """Write the scores of one shard of tokens."""
    options = stage.for_backend(out.parent, worker.device)
    stamps = tuple(map(checkpoints.stamp, (stage.checkpoint, *stage.references.values())))
    backend = _backend(stamps, stage.backend, options)
    table = tables.read_table(tokens)
    sequences, masks = tables.rows(table["input_ids"]), tables.rows(table["response_mask"])
    example_ids = table["example_id"].to_pylist()
    pieces = windows(sequences, masks, backend.max_length, stage.stride)
    names = [example_ids[i] for i in pieces.examples]
    check_lengths(stage.checkpoint, backend, tokens, names, pieces.sequences, ", or score with --stride")
    response, offsets = tables.flatten(table["response_mask"])
    columns = _measure(stage, tokens.name, backend, names, pieces, worker)
    layers = backend.attention_layers
    provenance = {
        "checkpoint": stage.checkpoint,
        "layer": layers.get(ATTENTION, stage.layer) if ATTENTION in stage.measured else None,
        "layers": layers,
        "dtype": backend.dtype or stage.dtype,
        "computed_with": backend.remark,
        joins.RUN: run,
        joins.TOKENS: joins.measured_fingerprint(tokens, table),
    }
    if stage.stride is not None:
        provenance["in_windows"] = pieces.cut
    write_scores(out / tokens.name, example_ids, offsets, response.astype(bool), columns, provenance)


def _not_finite(stage: Score, signal: Signal, values: NDArray[Any], place: str) -> SstokenError:
    """Say what is wrong with an example's values, one of which is NaN or infinite; `place` names the example."""
    if (
        signal.argument in stage.references and not np.isnan(values).any()
    ):  # a divergence, infinite by definition
        both = [f"{signal.argument} ({stage.references[signal.argument]})", stage.checkpoint]
        masking, other = reversed(both) if signal.base == "reverse_kl" else both
        return SstokenError(
            f"{stage.checkpoint}: {signal.name} is infinite in {place}: {masking} gives logits of minus infinity to "
            f"tokens to which {other} does not; leave the signal out, or compare checkpoints that mask the same tokens"
        )
    return SstokenError(
        f"{stage.checkpoint}: NaN or infinite {signal.name} in {place}; the checkpoint or its dtype ({stage.dtype}) is "
        "broken"
    )


def _measure(
    stage: Score, shard: str, backend: Backend, example_ids: list[str], pieces: Windows, worker: Worker
) -> dict[str, Column]:
    """Return each signal over all examples, one after the other: values of its measured tokens only."""
    sequences, masks = pieces.sequences, pieces.masks
    named = {name: get_signal(name) for name in stage.measured}
    counts = np.array([mask.sum() for mask in masks], dtype=np.int64)
    starts = {
        name: np.concatenate([[0], np.cumsum(np.maximum(counts - signal.from_second, 0))])
        for name, signal in named.items()
    }
    # One flat array per signal: thousands of small ones would fragment the heap.
    columns: dict[str, Column] = {
        name: np.zeros(starts[name][-1], np.dtype(signal.dtype)) for name, signal in named.items()
    }
    left = set(range(len(sequences)))
    for index, signals in backend.measure(sequences, masks):
        if not named.keys() <= signals.keys():
            continue
        for name, column in columns.items():
            if not np.isfinite(signals[name]).all():
                place = f"{shard}, example {example_ids[index]!r}"
                raise _not_finite(stage, named[name], signals[name], place)
            column[starts[name][index] : starts[name][index + 1]] = signals[name]
        left.discard(index)
        worker.advance(pieces.fresh[index])
    if left:
        raise SstokenError(
            f"backend {stage.backend!r} did not measure {len(left)} of {len(sequences)} examples of {shard} "
            f"(first: {example_ids[min(left)]!r}); report it to the backend's authors"
        )
    return columns
