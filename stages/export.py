"""Stage `export`: write the masked dataset in a trainer's own format."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from sstoken.errors import NothingLeftError, UsageError
from sstoken.stages import folders, plain_json, storage, tables
from sstoken.stages.exporting import TARGETS, get_target
from sstoken.stages.exporting.base import DATA, FAST, SCORES, Facts
from sstoken.stages.exporting.card import card
from sstoken.stages.exporting.rows import merge_counts, prepare
from sstoken.stages.sharded import ShardedStage, Work
from sstoken.stages.stage import Context, Task, Worker
from sstoken.stages.storage import write_atomic

_COUNTS = ".counts"
"""Folder of unfinished work with the counts of each shard, written when the shard is done."""
_WEIGHTED = ", ".join(name for name, target in TARGETS.items() if target.weights)
"""Trainers that support weights."""


class Export(ShardedStage):
    """Reads `masked`; writes `data/` for the trainer, `scores/` beside it, and a README with the command to run."""

    name: ClassVar[str] = "export"
    folder: ClassVar[str] = "export"
    unit: ClassVar[str] = "examples"

    to: Annotated[str, Field(description=f"The trainer: {', '.join(TARGETS)}.")]
    weights: Annotated[
        bool,
        Field(
            description=f"Give each kept token a weight, if the trainer supports it ({_WEIGHTED}): the method's, or "
            "one in (0, 1] from its score. Datasets of weighting methods have weights unless --no-weights."
        ),
    ] = False
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Cut examples to this many tokens. Default: no limit."""
    scores: bool = True
    """Write `scores/`, row-aligned with the trainer's files: ids, masks, signals and scores."""

    def check(self) -> None:
        """Refuse an unknown trainer, and weights if it takes none."""
        target = get_target(self.to)
        if self.weights and not target.weights:
            raise UsageError(
                f"{self.to} supports no weights of tokens; remove --weights, or export to {_WEIGHTED}"
            )

    def fingerprinted(self) -> dict[str, Any]:
        """Tell `--no-weights` from the default, which depends on the dataset."""
        refused = "weights" in self.model_fields_set and not self.weights
        return super().fingerprinted() | ({"weights": "none"} if refused else {})

    def with_weights(self, masked: Path) -> bool:
        """Return whether to export weights: as asked for, else if the dataset has them.

        Raises:
            UsageError: the dataset has weights that the trainer cannot take, and they were not declined.
        """
        if "weights" in self.model_fields_set:
            return self.weights
        if not _has_weights(masked):
            return False
        if not get_target(self.to).weights:
            raise UsageError(
                f"{masked}: its method gives each token a weight, and {self.to} supports none; export to {_WEIGHTED}, "
                "or train on all kept tokens alike (--no-weights)"
            )
        return True

    def work(self, context: Context) -> Work:
        """See `ShardedStage.work`."""
        out, parts = context.out, tables.parts(context.inputs["masked"])
        weighted = self.with_weights(context.inputs["masked"])
        for folder in (DATA, SCORES, _COUNTS) if self.scores else (DATA, _COUNTS):
            storage.of(out).make_folder(out / folder)
        tasks = [
            Task(out / _COUNTS / f"{path.stem}.json", tables.num_rows(path), (i, len(parts), path))
            for i, path in enumerate(parts)
        ]
        return Work(partial(_export_shard, self, out, weighted), tasks)

    def is_done(self, output: Path) -> bool:
        """See `ShardedStage.is_done`."""
        out = output.parent.parent
        try:
            record = plain_json.parse_object(output.read_bytes())
            digest = record.pop("digest")
            files = {name: folders.hash_file(out / name) for name in record["files"]}
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return False
        return bool(digest == plain_json.digest(record) and files == record["files"])

    def finish(self, context: Context) -> dict[str, Any]:
        """Write the trainer's other files, the card and the tokenizer."""
        masked, out = context.inputs["masked"], context.out
        parts = tables.parts(masked)
        found = [
            plain_json.parse((out / _COUNTS / f"{path.stem}.json").read_bytes())["counts"] for path in parts
        ]
        counts = merge_counts(found)
        if not counts["examples"]:
            cut = f" within {self.max_length} tokens" if self.max_length else ""
            raise NothingLeftError(f"{masked}: no example has a token to learn{cut}; nothing to export")
        target = get_target(self.to)
        shards = [target.shard_name(i, len(parts)) for i, c in enumerate(found) if c["examples"]]
        weighted = self.with_weights(masked)
        facts = Facts(counts["longest"], context.fingerprint, weighted, shards)
        for name, content in target.files(facts).items():
            write_atomic(out / name, content)
        write_atomic(
            out / "README.md", card(target, facts, counts, self.model_dump(), of_method=_has_weights(masked))
        )
        folders.copy_folder(masked / "tokenizer", out / "tokenizer")
        storage.of(out).delete(out / _COUNTS)
        return {"to": self.to, **counts}


def _has_weights(masked: Path) -> bool:
    """Return whether the method that selected a masked dataset gave each token a weight."""
    parts = tables.parts(masked)
    return bool(parts) and "weight" in tables.columns(parts[0])


def _export_shard(
    stage: Export, out: Path, weighted: bool, task: tuple[int, int, Path], worker: Worker
) -> None:
    index, shards, path = task
    target = get_target(stage.to)
    needed = None if stage.scores else ["example_id", "input_ids", "keep_mask"]
    if needed and weighted:
        needed += [c for c in ("response_mask", "score", "weight") if c in tables.columns(path)]
    ready = prepare(tables.read_table(path, needed), stage.max_length, weighted)
    data = out / DATA / target.shard_name(index, shards)
    written = []
    if ready.counts["examples"]:  # some loaders fail on a file without rows
        if stage.scores:
            sidecar = out / SCORES / path.name
            tables.write_part(sidecar, ready.sidecar, None, compression_level=FAST)
            written.append(sidecar)
        target.write(data, ready.rows)
        written.append(data)
    files = {file.relative_to(out).as_posix(): folders.hash_file(file) for file in written}
    record = {"counts": ready.counts, "files": files}
    text = json.dumps({**record, "digest": plain_json.digest(record)})
    write_atomic(out / _COUNTS / f"{path.stem}.json", text)
