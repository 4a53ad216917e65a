"""Stage `select`: turn scores into a masked dataset. It needs no model, so a sweep over a parameter takes seconds."""

from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from sstoken.errors import NothingLeftError, UsageError
from sstoken.labels import labels_from_mask
from sstoken.methods import Method, Params, Top, get_method
from sstoken.methods.presets import expand, shown_name
from sstoken.stages import folders, joins, tables
from sstoken.stages.masked_card import write_card
from sstoken.stages.masked_stats import PROTECTED, merge_stats, notes_on, shard_stats, signal_stats
from sstoken.stages.selecting.deciding import Decided, Decider, Whole, with_whole
from sstoken.stages.selecting.examples import ExampleChoice, choose_examples
from sstoken.stages.selecting.harm import harm_notes, harm_stats
from sstoken.stages.selecting.measured import check_measured
from sstoken.stages.selecting.shard import Shard
from sstoken.stages.selecting.text import check_protect
from sstoken.stages.sharded import ShardedStage, Work
from sstoken.stages.stage import Context, Task, Worker
from sstoken.version import __version__


class Select(ShardedStage):
    """Reads `tokens` and a scores folder for each role of its method; writes the masked dataset."""

    name: ClassVar[str] = "select"
    folder: ClassVar[str] = "masked"
    seeded: ClassVar[bool] = True

    method: str = "sstoken"
    """Selection method, or `recommended`; `sstoken-curate methods` lists them with their parameters."""
    params: dict[str, Any] = Field(default_factory=dict)
    """A parameter of the method; repeat it for several."""
    rho: float = 0.6
    """Short for `--param rho=X`: the share of response tokens to keep, in (0, 1]. Default: the method's own."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Short for `--param gamma=X`: the weight of REL against attention, in [0, 1]."""
    scope: Literal["turn", "sample", "global"] | None = None
    """Keep the best share of each example, of the whole dataset, or of each turn. Default: the method's own."""
    budget: Annotated[int, Field(ge=1)] | None = None
    """Keep this many tokens of the whole dataset, instead of a share."""
    pool: Literal["token", "word", "sentence"] = "token"
    """Score words or sentences as one, by the mean over their tokens, and keep or drop all of it."""
    protect: tuple[str, ...] = ()
    """Keep these tokens whatever their score: end_of_turn, tool_calls, code or regex:PATTERN."""
    examples: ExampleChoice | None = None
    """Choose examples first, by T-SHIRT: method=t-shirt, keep=0.05 (a share, or a number), ratio=0.5, draws=0."""
    lean: bool = False
    """Write only example_id, input_ids, labels, keep_mask and, for a weighting method, weight."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, given: Any) -> Any:
        """Replace a preset by the settings that it stands for, so that both have one fingerprint."""
        return expand(given) if isinstance(given, dict) else given

    def check(self) -> None:
        """Refuse an unknown method, a parameter that is unknown or out of range, and a scope it does not support."""
        if self.budget is not None:
            self._check_budget()
        self.resolved_scope, self.resolved  # noqa: B018
        check_protect(self.protect)

    def _check_budget(self) -> None:
        policy = self.of.policy
        if not isinstance(policy, Top) or policy.drop or policy.negative is not None:
            raise UsageError(
                f"budget is {self.budget}, but method {self.method!r} does not rank tokens; leave budget out"
            )
        if "rho" in {*self.params, *self.model_fields_set} or self.scope not in (None, "global"):
            raise UsageError("budget is a number of tokens of the whole dataset; leave rho and scope out")

    @cached_property
    def of(self) -> Method:
        """The registered method."""
        return get_method(self.method)

    @cached_property
    def resolved(self) -> Params:
        """The method's parameters, defaults filled in."""
        given = dict(self.params)
        for name in ("rho", "gamma"):
            value = getattr(self, name)
            if name not in self.model_fields_set:
                continue
            if str(given.setdefault(name, value)) != str(value):
                raise UsageError(f"{name} is {value}, but params.{name} is {given[name]}; give it once")
        return self.of.read_params(given)

    @property
    def resolved_scope(self) -> str:
        """The scope asked for, or the method's own."""
        return self.of.check_scope(self.scope if self.budget is None else "global")

    def fingerprinted(self) -> dict[str, Any]:
        """See `Settings.fingerprinted`: equal however the parameters are given, and unchanged for older selections."""
        params = {"rho": self.rho, "gamma": self.gamma}
        params |= self.resolved.model_dump(mode="json")
        scope = self.scope if self.scope is not None and "scope" in self.of.ignores else self.resolved_scope
        fields = {
            "method": self.of.name,
            "rho": params.pop("rho"),
            "gamma": params.pop("gamma"),
            "scope": "sample" if scope == "token" else scope,
            "lean": self.lean,
        }
        more = {
            "params": params,
            "budget": self.budget,
            "protect": list(self.protect),
            "examples": self.examples and self.examples.model_dump(mode="json"),
            "pool": None if self.pool == "token" else self.pool,
        }
        return fields | {name: value for name, value in more.items() if value}

    def outputs(self, context: Context) -> list[Path]:
        """See `ShardedStage.outputs`. Reads no scores."""
        return [context.out / path.name for path in tables.parts(context.inputs["tokens"])]

    def work(self, context: Context) -> Work:
        """See `ShardedStage.work`."""
        tokens = context.inputs["tokens"]
        token_parts = tables.parts(tokens)
        scores = _scores(context)
        for folder in scores.values():
            joins.check_scores(tokens, folder)
        of_examples = self.examples.inputs(scores) if self.examples else ()
        shown = shown_name({"method": self.method, "params": self.params, "protect": self.protect})
        check_measured(shown, self.of.inputs, scores, tokens)
        check_measured("t-shirt", of_examples, scores, tokens)
        shards = [
            Shard(index, path, scores, (*self.of.inputs, *of_examples), self.resolved_scope, context.seed)
            for index, path in enumerate(token_parts)
        ]
        if self.examples is not None:
            chosen = choose_examples(self.examples, shards, of_examples)
            shards = [replace(shard, chosen=mask) for shard, mask in zip(shards, chosen, strict=True)]
        decider = Decider(
            self.method, self.resolved, self.resolved_scope, self.budget, self.pool, self.protect
        )
        provenance = self._provenance(context, scores)
        select_shard = partial(_select_shard, decider, context.out, provenance, self.lean)
        tasks = (
            Task(context.out / shard.tokens.name, 1, (shard, whole))
            for shard, whole in with_whole(decider, shards)
        )
        return Work(select_shard, tasks, len(token_parts))

    def finish(self, context: Context) -> dict[str, Any]:
        """Add up the shards' counts; write the tokenizer and the card."""
        tokens = context.inputs["tokens"]
        folders.copy_folder(tokens / "tokenizer", context.out / "tokenizer")
        metadata = [tables.read_metadata(p) for p in tables.parts(context.out)]
        summary = merge_stats([m["stats"] for m in metadata])
        if not summary["examples"]:
            raise NothingLeftError(f"{tokens}: no example has a response token; nothing to select")
        provenance = self._provenance(context, _scores(context))
        named = {role: facts["name"] for role, facts in provenance["checkpoints"].items()}
        if "current.attention" not in self.of.inputs or named.get("attention") == named.get("current"):
            named.pop("attention", None)
        summary["compared"] = {role: named[role] for role in (*self.of.roles, "attention") if role in named}
        if all("rel_sum" in m["checks"] for m in metadata):
            summary["mean_rel"] = sum(m["checks"]["rel_sum"] for m in metadata) / summary["response_tokens"]
        checks = [{**m["stats"], **m["checks"]} for m in metadata]
        ignored = self._ignored(summary["response_tokens"])
        if notes := ignored + notes_on(checks, self.method) + harm_notes(checks):
            summary["notes"] = notes
        write_card(context.out, provenance, summary)
        return summary

    def _ignored(self, num_tokens: int) -> list[str]:
        """Return a note for each option given that the method does without, and for a budget that limits nothing."""
        given = {*self.params, *(name for name in self.model_fields_set if getattr(self, name) is not None)}
        notes = [
            f"method {self.method!r} has no {name}; it changes nothing here"
            for name in self.of.ignores
            if name in given
        ]
        if self.budget is not None and self.budget > num_tokens:
            notes.append(
                f"budget is {self.budget:,}, and there are {num_tokens:,} response tokens: all are kept"
            )
        return notes

    def _provenance(self, context: Context, scores: dict[str, Path]) -> dict[str, Any]:
        folder = context.inputs["tokens"]
        tokens = tables.read_metadata(tables.parts(folder)[0])
        for name in ("stats", "kind", "first_row"):
            tokens.pop(name, None)
        tokens[joins.TOKENS] = joins.folder_fingerprint(folder)
        used = {role: tables.read_metadata(tables.parts(folder)[0]) for role, folder in scores.items()}
        params = self.resolved.model_dump(mode="json")
        rho = params.get("rho", self.rho if "rho" in self.of.ignores else None)
        return {
            "kind": "masked",
            "method": self.method,
            "params": params,
            "rho": rho if self.budget is None else None,  # a budget replaces it
            "gamma": params.get("gamma", self.gamma if "gamma" in self.of.ignores else None),
            "scope": self.resolved_scope,
            **{k: getattr(self, k) for k in ("budget", "pool", "protect") if k in self.model_fields_set},
            **({"examples": self.examples.model_dump(mode="json")} if self.examples else {}),
            "seed": context.seed,
            "checkpoints": {
                role: {"name": scores[role].name, "checkpoint": facts["checkpoint"], "dtype": facts["dtype"]}
                for role, facts in used.items()
            },
            "layer": used["attention"].get("layer") if "attention" in used else None,
            **tokens,
            "version": __version__,
            "fingerprint": context.fingerprint,
        }


def _scores(context: Context) -> dict[str, Path]:
    """Return the folders of scores by role."""
    return {role: folder for role, folder in context.inputs.items() if role != "tokens"}


def _select_shard(
    decider: Decider,
    out: Path,
    provenance: dict[str, Any],
    lean: bool,
    task: tuple[Shard, Whole],
    worker: Worker,
) -> None:
    """Write one masked shard."""
    shard, whole = task
    tokens = shard.measured
    decided = decider.decide(shard, whole)
    table = _masked_table(shard, decided, tables.masked_schema(decider.of.weighted, lean))
    has_response = np.diff(tokens.offsets) > 0
    stats = shard_stats(tokens, decided.keep, provenance["rho"])
    if shard.chosen is not None:
        stats["passed_over"] = shard.num_passed_over
        stats["left_out"] -= shard.num_passed_over
    checks = signal_stats(tokens, decided.keep, decider.of.inputs, shard.turns)
    checks |= harm_stats(shard.text, decided.keep, tokens.offsets)
    if decider.protect:
        stats |= {PROTECTED + name: int(mask.sum()) for name, mask in decided.protected.items()}
        stats["protected_added"] = decided.added
    facts = {**provenance, "stats": stats, "checks": checks}
    tables.write_part(out / shard.tokens.name, table.filter(pa.array(has_response)), facts)


def _masked_table(shard: Shard, decided: Decided, schema: pa.Schema) -> pa.Table:
    offsets, response, tokens = shard.offsets, shard.response, shard.measured
    keep = np.zeros(response.size, dtype=bool)
    keep[response] = decided.keep
    ids = tables.flatten(shard.table["input_ids"])[0]
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "example_id": shard.table["example_id"],
        "input_ids": shard.table["input_ids"],
        "labels": tables.lists(labels_from_mask(ids, keep), offsets, tables.IDS),
        "keep_mask": tables.lists(keep, offsets, tables.MASK),
        "response_mask": shard.table["response_mask"],
    }
    compared = "history.loss" in tokens and "current.loss" in tokens
    values = {
        "rel": tokens.rel if compared else None,
        "attention": tokens.signals.get("current.attention"),
        "score": decided.scores,
        "weight": decided.weight,
    }
    for name, of_response in values.items():
        columns[name] = (
            pa.nulls(len(shard.table), tables.VALUES)
            if of_response is None
            else tables.scattered(of_response, response, offsets, tables.VALUES)
        )
    return pa.table([columns[name] for name in schema.names], schema=schema)
