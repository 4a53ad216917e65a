"""`score`: the loss of every response token under one checkpoint, and its attention importance if asked."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from sstoken.errors import SstokenError
from sstoken.stages import checkpoints, joins, tables
from sstoken.stages.backends import (
    Backend,
    BackendOptions,
    Latest,
    Setting,
    check_backend,
    deciding_settings,
    make_backend,
    resolve_backend,
)
from sstoken.stages.scores_file import summarize_scores, write_scores
from sstoken.stages.stage import BY_CONTENT, SPEED_ONLY, Context, Stage
from sstoken.stages.vocabularies import check_vocabulary


class ScoreOptions(Stage):
    """How checkpoints are scored, whichever they are."""

    layer: int | None = None
    """Decoder layer whose attention is measured; negative counts from the last. None: the last layer that has softmax
    attention."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Of the weights; softmax and loss are fp32 whatever it is. auto: as the checkpoint stores them."""
    backend: str = "auto"
    """Inference backend: hf (transformers), vllm, or another package's. auto: vllm on a GPU where it is installed and
    takes the checkpoint, else hf."""
    backend_options: dict[str, Setting] = Field(default_factory=dict)
    """The backend's own settings, such as vllm's `tensor_parallel_size`."""
    batch_tokens: Annotated[int | None, Field(ge=1), SPEED_ONLY] = None
    """Positions in a batch, at most (padding counted); a longer sequence runs alone. None: from the free memory. Halved
    when a batch does not fit."""
    device: Annotated[str, SPEED_ONLY] = "auto"
    """cpu, cuda, mps, ...; auto: the best that is there."""
    workers: Annotated[int, Field(ge=1), SPEED_ONLY] = 1
    """Processes, each with the model in memory."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""


class Score(ScoreOptions):
    """Score one checkpoint. Reads `tokens`; writes row-aligned shards of the same names."""

    name: ClassVar[str] = "score"
    folder: ClassVar[str] = "scores"
    follows_sources: ClassVar[bool] = True  # a checkpoint folder that was trained further

    checkpoint: Annotated[str, BY_CONTENT]
    """A folder, a LoRA adapter's folder, or a Hub id."""
    attention: bool = False
    """Measure attention importance in the same forward pass."""

    def check(self) -> None:
        """Refuse a checkpoint that is not whole, or that the backend does not take."""
        checkpoints.check_whole(self.checkpoint)
        check_backend(self.backend, self.for_backend(), self.workers)

    def sources(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """The checkpoint's content; its place and name do not matter."""
        return {"checkpoint": checkpoints.identity(self.checkpoint, digest)}

    def fingerprinted(self) -> dict[str, Any]:
        """Without the layer where none is looked at; the backend is the one that runs."""
        options = self.for_backend()
        backend = resolve_backend(self.backend, options)
        fields = super().fingerprinted() | {"backend": backend}
        del fields["backend_options"]
        if deciding := deciding_settings(backend, options):
            fields["backend_options"] = deciding
        if not self.attention:
            del fields["layer"]
        return fields

    def for_backend(self, log_folder: Path | None = None) -> BackendOptions:
        """What the backend gets to know."""
        return BackendOptions(
            checkpoint=self.checkpoint,
            attention=self.attention,
            layer=self.layer,
            dtype=self.dtype,
            device=self.device,
            batch_tokens=self.batch_tokens,
            trust_remote_code=self.trust_remote_code,
            settings=tuple(sorted(self.backend_options.items())),
            log_folder=log_folder,
        )

    def run(self, context: Context) -> dict[str, Any]:
        """Score the shards that are not there yet."""
        token_parts = tables.parts(context.inputs["tokens"])
        own = checkpoints.own_tokenizer(self.checkpoint, trust_remote_code=self.trust_remote_code)
        check_vocabulary(self.checkpoint, own, context.inputs["tokens"])
        total = sum(tables.num_rows(p) for p in token_parts)
        todo = [p for p in token_parts if not (context.out / p.name).exists()]
        score_shard = _ScoreShard(self, context, todo if self.workers == 1 else [])
        with score_shard, context.progress("examples", total) as progress:
            progress.advance(total - sum(tables.num_rows(p) for p in todo))
            for rows in context.map(score_shard, todo, workers=self.workers):
                progress.advance(rows)
        summary = summarize_scores(context.out, self.checkpoint)
        if joins.trained_on_others(self.checkpoint, context.inputs["tokens"]):
            summary["trained_on_other_tokens"] = True
        return summary


@Latest
def _backend(name: str, options: BackendOptions, stamp: tuple[Any, ...]) -> Backend:
    """One backend per process: shards of a checkpoint share it; `stamp` tells when its files have changed."""
    return make_backend(name, options)


class _ScoreShard:
    """Scores one shard of tokens; pickles into worker processes.

    In one process, the next shard is read and the last one written while this one is computed.
    """

    def __init__(self, stage: Score, context: Context, in_order: Sequence[Path]) -> None:
        self._stage, self._out, self._run = stage, context.out, context.fingerprint
        self._following = dict(pairwise(in_order))
        self._files: ThreadPoolExecutor | None = None
        self._reading: dict[Path, Future[pa.Table]] = {}
        self._writing: Future[None] | None = None

    def __enter__(self) -> None:
        if self._following:
            self._files = ThreadPoolExecutor(2)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._files is not None:
            self._files.shutdown()
            self._files = None
        if self._writing is not None and kind is None:
            self._writing.result()

    def __call__(self, tokens: Path) -> int:
        """Write the scores of the shard, or begin to; return its number of rows."""
        stage = self._stage
        options = stage.for_backend(log_folder=self._out.parent)
        backend = _backend(stage.backend, options, checkpoints.stamp(stage.checkpoint))
        table = self._read(tokens)
        sequences, masks = tables.rows(table["input_ids"]), tables.rows(table["response_mask"])
        example_ids = table["example_id"].to_pylist()
        _check_lengths(stage, tokens, backend, example_ids, sequences)
        # Flat from the start: thousands of small arrays would keep the heap in pieces.
        ids, offsets = tables.flatten(table["input_ids"])
        loss = np.full(ids.size, np.nan, np.float32)
        attention = np.full(ids.size, np.nan, np.float32) if stage.attention else None
        left = set(range(len(sequences)))
        for index, signal in backend.measure(sequences, masks):
            if not np.isfinite(signal.loss[masks[index]]).all():
                raise SstokenError(
                    f"{stage.checkpoint}: NaN or infinite loss in {tokens.name}, example "
                    f"{example_ids[index]!r}; the checkpoint or its dtype ({stage.dtype}) is broken"
                )
            row = slice(offsets[index], offsets[index + 1])
            loss[row] = signal.loss
            if attention is not None:
                if signal.attention is None:
                    continue
                attention[row] = signal.attention
            left.discard(index)
        if left:
            raise SstokenError(
                f"backend {stage.backend!r} did not measure all that was asked for: {len(left)} of {len(sequences)} "
                f"examples of {tokens.name} are missing ({example_ids[min(left)]!r}); report it to its authors"
            )
        provenance = self._provenance(backend) | {joins.TOKENS: joins.measured_fingerprint(tokens, table)}
        self._write(self._out / tokens.name, example_ids, offsets, loss, attention, provenance)
        return len(sequences)

    def _provenance(self, backend: Backend) -> dict[str, Any]:
        stage = self._stage
        return {
            "checkpoint": stage.checkpoint,
            "layer": (backend.attention_layer if backend.attention_layer is not None else stage.layer)
            if stage.attention
            else None,
            "dtype": stage.dtype,
            "computed_with": backend.remark,
            joins.RUN: self._run,
        }

    def _read(self, tokens: Path) -> pa.Table:
        ahead = self._reading.pop(tokens, None)
        table = tables.read_table(tokens) if ahead is None else ahead.result()
        following = self._following.get(tokens)
        if following is not None and self._files is not None:
            self._reading[following] = self._files.submit(tables.read_table, following)
        return table

    def _write(self, *what: Any) -> None:
        if self._files is None:
            write_scores(*what)
            return
        if self._writing is not None:
            self._writing.result()
        self._writing = self._files.submit(write_scores, *what)


def _check_lengths(
    stage: Score, tokens: Path, backend: Backend, example_ids: list[str], sequences: list[NDArray[np.int32]]
) -> None:
    for example_id, ids in zip(example_ids, sequences, strict=True):
        if int(ids.max()) >= backend.vocab_size:
            raise SstokenError(
                f"{stage.checkpoint}: {tokens.name}, example {example_id!r} has token id {int(ids.max())}, beyond "
                f"the model's vocabulary of {backend.vocab_size}; encode with this model's tokenizer"
            )
        if backend.max_length is not None and ids.size > backend.max_length:
            raise SstokenError(
                f"{stage.checkpoint}: {tokens.name}, example {example_id!r} has {ids.size} tokens, the model "
                f"takes {backend.max_length}; encode with --max-length {backend.max_length}"
            )
