"""Prepare a masked dataset for publication: shards without private columns, a card, pictures, the provenance.

The same masked folder and settings give the same bytes, so what a killed upload transferred is not uploaded again.
"""

import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import folders, storage, tables
from sstoken.stages import manifest as manifests
from sstoken.stages.hub.card import Shards, card
from sstoken.stages.hub.pictures import draw_scores
from sstoken.stages.hub.provenance import (
    CARD,
    PROVENANCE,
    REPORT,
    SHARDS,
    SIGNALS,
    TOKENIZER,
    Provenance,
    as_json,
    hub_names,
    public,
)
from sstoken.stages.hub.remote import check_repo
from sstoken.stages.masked_stats import merge_stats
from sstoken.stages.stage import Context, EngineOptions, Stage, Task, Worker
from sstoken.stages.storage import write_atomic
from sstoken.stages.weight_files import read_json

_LOCAL_SETTINGS = ("name_or_path", "_name_or_path", "tokenizer_file", "special_tokens_map_file", "cache_dir")
"""Keys under which some versions of transformers write local paths into tokenizer_config.json."""
_ID_BYTES = 16
"""Estimated bytes of an example's id; the Hub shows the size in memory as an estimate."""
_BEST_LENGTH = 120
"""Preferred length of the example that is drawn, in tokens: informative, and still one picture."""


class Publication(Stage, EngineOptions):
    """Reads `masked`; writes the folder that is uploaded."""

    name: ClassVar[str] = "publish"
    folder: ClassVar[str] = "publish"

    repo: str
    """The dataset's name on the Hub: user/name."""
    include_scores: bool = False
    """Also publish the columns rel, attention and score (several times the size)."""
    with_report: bool = False
    """Also publish the page of `report`, which shows some examples with every recorded signal."""
    license: str | None = None
    """The Hub's name of a licence, such as cc-by-4.0. Default: that of the source dataset, if it is on the Hub."""
    shard_tokens: Annotated[int, Field(ge=1)] = 8_000_000
    """Join shards until a published file holds this many tokens (about 16 MB without scores)."""
    origin: dict[str, Any] = Field(default_factory=dict)
    """Set by `publish`: see `find_origin`."""

    def check(self) -> None:
        """Refuse an invalid dataset name."""
        check_repo(self.repo)

    def run(self, context: Context) -> dict[str, Any]:
        """Write shard by shard; keep shards that already exist."""
        from sstoken.stages.report.page import write_page
        from sstoken.stages.report.show import save_svg

        masked, out = context.inputs["masked"], context.out
        sources = tables.parts(masked)
        names = pq.read_schema(sources[0]).names
        if self.include_scores and "score" not in names:
            raise UsageError(f"{masked}: a lean dataset, it holds no scores; leave --include-scores out")
        hub = hub_names(self.origin)
        columns = [name for name in names if self.include_scores or name not in SIGNALS]
        storage.of(out).make_folder(out / SHARDS)
        groups = _groups(sources, self.shard_tokens)
        places = [out / SHARDS / tables.part_name(index) for index in range(len(groups))]
        tasks = [Task(path, 1, (path, group)) for path, group in zip(places, groups, strict=True)]
        with context.progress("files", len(groups)) as progress:
            for _ in context.engine.map(partial(_publish_shard, columns, hub), tasks, progress):
                pass
        metadata = [tables.read_metadata(path) for path in tables.parts(out / SHARDS)]
        metrics = merge_stats([m["stats"] for m in metadata])
        facts = {key: value for key, value in metadata[0].items() if key not in ("stats", "checks")}
        _copy_tokenizer(masked / TOKENIZER, out / TOKENIZER)
        draw_scores(masked, metrics, out / "scores.svg")
        save_svg(masked, out / "example.svg", row=_typical_row(sources))
        report = REPORT if self.with_report else None
        if report:
            write_page({self.repo.partition("/")[2]: masked}, out / report)
        license = self.license or self.origin.get("license")
        shards = _measured(tables.parts(out / SHARDS))
        write_atomic(out / CARD, card(self.repo, facts, metrics, self.origin, license, shards, report=report))
        storage.of(out).delete(out / PROVENANCE)
        files = [f for f in manifests.list_files(out) if not f.path.startswith(".")]
        provenance = Provenance(masked=facts, metrics=metrics, origin=self.origin, files=files)
        write_atomic(out / PROVENANCE, as_json(provenance))
        return metrics

    def fingerprinted(self) -> dict[str, Any]:
        """See `Settings.fingerprinted`. Leaves `with_report` out if it is off: older publications lack it."""
        return {key: value for key, value in super().fingerprinted().items() if key != "with_report" or value}


def _groups(sources: Iterable[Path], shard_tokens: int) -> list[list[Path]]:
    """Group neighbouring shards into published files; no file is empty if any shard has rows."""
    groups: list[list[Path]] = []
    size = shard_tokens
    for path in sources:
        if size >= shard_tokens:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += _num_tokens(path)
    if len(groups) > 1 and not size:
        groups[-2] += groups.pop()
    return groups


def _num_tokens(path: Path) -> int:
    checked = pa.BufferReader(folders.read_file(path))  # a damaged footer's column statistics end the process
    return _num_values(pq.read_metadata(checked))["input_ids"]


def _num_values(footer: pq.FileMetaData) -> dict[str, int]:
    """Return how many values each column holds, counting list elements."""
    names = [footer.schema.column(i).path.partition(".")[0] for i in range(footer.num_columns)]
    groups = range(footer.num_row_groups)
    return {
        name: sum(footer.row_group(group).column(i).num_values for group in groups)
        for i, name in enumerate(names)
    }


def _publish_shard(columns: list[str], hub: set[str], task: tuple[Path, list[Path]], worker: Worker) -> None:
    path, sources = task
    if path.exists() and tables.is_sound(path):  # it lay in unfinished work
        return
    metadata = [tables.read_metadata(source) for source in sources]
    stats = {
        key: np.sum([m["stats"][key] for m in metadata], axis=0).tolist() for key in metadata[0]["stats"]
    }
    metadata[0].pop("checks", None)  # they describe one shard of the source
    schema = pa.schema([field for field in pq.read_schema(sources[0]) if field.name in columns])
    groups = (tables.read_table(source, columns) for source in sources)
    tables.write_row_groups(path, groups, schema, public(metadata[0], hub) | {"stats": stats})


def _measured(parts: list[Path]) -> Shards:
    schema = pq.read_schema(parts[0]).remove_metadata()
    examples, values = 0, Counter[str]()
    for footer in map(pq.read_metadata, parts):
        examples += footer.num_rows
        values.update(_num_values(footer))
    lists = [field for field in schema if pa.types.is_list(field.type)]
    bits = sum(values[field.name] * field.type.value_type.bit_width for field in lists)
    return Shards(
        schema=schema,
        examples=examples,
        tokens=values["input_ids"],
        arrow_bytes=bits // 8 + 4 * examples * len(schema) + _ID_BYTES * examples,
        file_bytes=sum(path.stat().st_size for path in parts),
    )


def _typical_row(parts: Iterable[Path]) -> int:
    """Return the row whose length is nearest to `_BEST_LENGTH`, from the first shard that has rows."""
    for path in parts:
        lengths = [len(ids) for ids in tables.rows(tables.read_table(path, ["input_ids"])["input_ids"])]
        if lengths:
            return min(range(len(lengths)), key=lambda row: (abs(lengths[row] - _BEST_LENGTH), row))
    raise SstokenError("a masked dataset without a row cannot be published; select again")


def _copy_tokenizer(source: Path, out: Path) -> None:
    folders.copy_folder(source, out)
    path = out / "tokenizer_config.json"
    if path.is_file():
        settings = read_json(path)
        if any(key in settings for key in _LOCAL_SETTINGS):
            kept = {key: value for key, value in settings.items() if key not in _LOCAL_SETTINGS}
            write_atomic(path, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
