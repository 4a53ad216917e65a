"""Stage `critical`: find the response tokens that a right answer depends on, by generating and checking answers."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sstoken.errors import SstokenError
from sstoken.stages import checkpoints, joins, tables
from sstoken.stages.backends import BackendOptions, Latest
from sstoken.stages.backends.generation import check_generator, make_generator
from sstoken.stages.criticality.checkers import Checker
from sstoken.stages.criticality.judge import (
    NO_REFERENCE,
    OUTCOMES,
    RAISED,
    RIGHT,
    WRONG,
    Judge,
    Problem,
    Verdict,
)
from sstoken.stages.model_options import ModelOptions, check_lengths
from sstoken.stages.scores_file import remarks, write_columns
from sstoken.stages.sharded import Work
from sstoken.stages.stage import BY_CONTENT, Context, Task, Worker
from sstoken.stages.token_text import special_ids
from sstoken.stages.vocabularies import check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CRITICAL = "critical"
_PROBLEMS_TOGETHER = 64
_BUDGET, _EARLIER_TURN = "over max_positions", "earlier turn"
_WHY_NOT = {WRONG: "answer wrong", NO_REFERENCE: "reference not accepted by the checker", RAISED: RAISED}


class Critical(ModelOptions):
    """Measure the signal `critical` under one checkpoint: reads `tokens`, writes a row-aligned shard for each."""

    name: ClassVar[str] = "critical"
    folder: ClassVar[str] = "scores"
    unit: ClassVar[str] = "examples"
    follows_sources: ClassVar[bool] = True

    checkpoint: Annotated[str, BY_CONTENT]
    """A folder, a LoRA adapter's folder, or a Hub id."""
    checker: str = "final-number"
    """How an answer is checked: final-number (the number after `####`, else the last number), exact (the same text),
    or MODULE:FUNCTION, called as function(answer, reference)."""
    max_positions: Annotated[int, Field(ge=0)] = 32
    """Response tokens tried in each example, evenly spaced; the others are null. 0: all."""
    alternatives: Annotated[int, Field(ge=1, le=8)] = 2
    """Number of other tokens tried in its place, likeliest first. A token is critical if all of them end wrong."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest continuation in tokens; a longer one is cut and checked as it stands."""

    def check(self) -> None:
        """Refuse a missing checker, an incomplete checkpoint, and a backend that cannot generate."""
        Checker(self.checker)
        checkpoints.check_loadable(self.checkpoint)
        check_generator(self.backend, self.for_backend(), self.workers or 1)

    def sources(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """Identify the checkpoint's content and the checker's file."""
        found: dict[str, Any] = {"checkpoint": checkpoints.identity(self.checkpoint, digest)}
        if (source := Checker(self.checker).source) is not None:
            found["checker"] = digest(source)
        return found

    def fingerprinted(self) -> dict[str, Any]:
        """See `Stage.fingerprinted`."""
        return self.fingerprinted_for(self.for_backend())

    def for_backend(self, log_folder: Path | None = None, device: str | None = None) -> BackendOptions:
        """Return the backend's options for this stage."""
        return self.backend_for(log_folder=log_folder, device=device, signals=(), layer=None)

    def work(self, context: Context) -> Work:
        """See `ShardedStage.work`."""
        tokens = context.inputs["tokens"]
        own = checkpoints.own_tokenizer(self.checkpoint, trust_remote_code=self.trust_remote_code)
        check_vocabulary(self.checkpoint, own, tokens)
        parts = tables.parts(tokens)
        return Work(
            partial(_judge_shard, self, context.out, context.fingerprint),
            [Task(context.out / path.name, tables.num_rows(path), path) for path in parts],
        )

    def finish(self, context: Context) -> dict[str, Any]:
        """Add up the shards' counts."""
        metadata = [tables.read_metadata(path) for path in tables.parts(context.out)]
        stats = [m["stats"] for m in metadata]
        summary: dict[str, Any] = {"checkpoint": self.checkpoint, "checker": self.checker}
        for key, value in (stats[0] if stats else {}).items():
            if isinstance(value, int):
                summary[key] = sum(s[key] for s in stats)
            elif isinstance(value, dict):
                summary[key] = dict(sum((Counter(s[key]) for s in stats), Counter()))
            else:
                summary[key] = next((s[key] for s in stats if s[key] is not None), None)
        return summary | remarks(metadata)


_generator = Latest(make_generator)
"""This process's generator, shared by all shards."""


def _judge_shard(stage: Critical, out: Path, run: str, tokens: Path, worker: Worker) -> None:
    """Write the signal of one shard of tokens."""
    table = tables.read_table(tokens)
    sequences, masks = tables.rows(table["input_ids"]), tables.rows(table["response_mask"])
    example_ids = table["example_id"].to_pylist()
    options = stage.for_backend(out.parent, worker.device)
    generator = _generator(checkpoints.stamp(stage.checkpoint), stage.backend, options)
    check_lengths(stage.checkpoint, generator, tokens, example_ids, sequences)
    found = (_problem(ids, mask) for ids, mask in zip(sequences, masks, strict=True))
    problems = {i: problem for i, problem in enumerate(found) if problem is not None}
    tokenizer = checkpoints.load_tokenizer(str(tokens.parent / "tokenizer"))
    judge = Judge(
        generator=generator,
        checker=Checker(stage.checker),
        text=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        stop=_stop_tokens(stage.checkpoint, tokenizer, problems.values()),
        max_positions=stage.max_positions,
        alternatives=stage.alternatives,
        max_new_tokens=stage.max_new_tokens,
        advance=worker.advance,
    )
    asked, verdicts = list(problems), dict[int, Verdict]()
    worker.advance(len(sequences) - len(asked))
    for start in range(0, len(asked), _PROBLEMS_TOGETHER):
        some = asked[start : start + _PROBLEMS_TOGETHER]
        judged = judge([problems[i] for i in some])
        verdicts |= zip(some, judged, strict=True)
        if not start:
            _check_not_all_raised(judged, [example_ids[i] for i in some])
    offsets = tables.flatten(table["input_ids"])[1]
    critical = np.full(offsets[-1], np.nan, np.float32)
    for i, verdict in verdicts.items():
        begin = offsets[i] + problems[i].first
        critical[begin : begin + verdict.critical.size] = verdict.critical
    provenance = {
        "checkpoint": stage.checkpoint,
        "checker": stage.checker,
        "layer": None,
        "dtype": generator.dtype or stage.dtype,
        "computed_with": generator.remark,
        joins.TOKENS: joins.measured_fingerprint(tokens, table),
        joins.RUN: run,
    }
    columns = {CRITICAL: tables.lists(critical, offsets, tables.VALUES)}
    stats = _stats(example_ids, masks, verdicts)
    write_columns(out / tokens.name, example_ids, columns, provenance, stats)


def _problem(ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> Problem | None:
    """Return the last run of response tokens with everything before it; None without a response."""
    places = np.flatnonzero(mask)
    if not places.size:
        return None
    breaks = np.flatnonzero(np.diff(places) > 1)
    return Problem(ids[: places[-1] + 1], int(places[breaks[-1] + 1] if breaks.size else places[0]))


def _stop_tokens(
    checkpoint: str, tokenizer: "PreTrainedTokenizerBase", problems: Iterable[Problem]
) -> frozenset[int]:
    """Return the ids that stop generation: the checkpoint's own, and special tokens that end these responses."""
    base = checkpoints.adapter_base(checkpoint) or checkpoint
    named = tokenizer.convert_tokens_to_ids(checkpoints.stop_tokens(base, tokenizer))
    ends = {int(problem.ids[-1]) for problem in problems}
    return frozenset({*(i for i in named if isinstance(i, int)), *(ends & special_ids(tokenizer))})


def _check_not_all_raised(verdicts: Sequence[Verdict], example_ids: Sequence[str]) -> None:
    """Stop early if the checker raised an exception on every one of the first problems.

    Raises:
        SstokenError: quotes the first exception.
    """
    if verdicts and all(verdict.outcome == RAISED for verdict in verdicts):
        raise SstokenError(
            f"{verdicts[0].error} (example {example_ids[0]!r}, and all of the first {len(verdicts)}); fix the "
            "checker, called as function(answer, reference), and run the same command again"
        )


def _stats(
    example_ids: Sequence[str], masks: Sequence[NDArray[np.bool_]], verdicts: dict[int, Verdict]
) -> dict[str, Any]:
    """Return a shard's counts.

    `tried` plus `not_tried` is `response_tokens`; `outcomes` plus `no_response` is `examples`.
    """
    outcomes, not_tried = Counter[str](), Counter[str]()
    firsts: dict[str, str] = {}
    errors = [f"{v.error} (example {example_ids[i]!r})" for i, v in verdicts.items() if v.error is not None]
    for i, verdict in verdicts.items():
        outcomes[verdict.outcome] += 1
        firsts.setdefault(verdict.outcome, example_ids[i])
        count = verdict.critical.size
        not_tried[_EARLIER_TURN] += int(masks[i].sum()) - count
        if verdict.outcome != RIGHT:
            not_tried[_WHY_NOT[verdict.outcome]] += count
            continue
        not_tried[_BUDGET] += int((~verdict.tried).sum())
        not_tried[RAISED] += int((verdict.tried & np.isnan(verdict.critical)).sum())
    values = np.concatenate([np.zeros(0, np.float32), *(v.critical for v in verdicts.values())])
    return {
        "examples": len(masks),
        "no_response": len(masks) - len(verdicts),
        "outcomes": {name: outcomes[name] for name in OUTCOMES if outcomes[name]},
        "response_tokens": sum(int(mask.sum()) for mask in masks),
        "tried": int(np.isfinite(values).sum()),
        "critical": int((values == 1).sum()),
        "not_tried": {name: count for name, count in sorted(not_tried.items()) if count},
        "answers_cut": sum(verdict.cut for verdict in verdicts.values()),
        "continuations_cut": sum(verdict.cut_branches for verdict in verdicts.values()),
        "first_wrong": firsts.get(WRONG),
        "first_error": errors[0] if errors else None,
    }
