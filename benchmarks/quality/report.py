"""From cells, or from the Parquet table that they left, to figures, a Markdown page and a drawing."""

import json
import os
import platform
import sys
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.quality.detection import causes, found_noise
from benchmarks.quality.intervals import LEVEL, Interval, paired_difference
from benchmarks.quality.page import RUNS, draw, markdown
from benchmarks.quality.study import Cells
from benchmarks.quality.sweeps import sweeps
from benchmarks.quality.tokens import CLASSES
from benchmarks.quality.variance import variance

LOSSES = ("all", *CLASSES)
SHARES = ("right", "ended")
GREEDY = (*SHARES, "length")
ITEMS = ("held_out", "greedy", "forgetting", "plain")
Row = dict[str, Any]
"""A cell's result."""


def write_report(cells: Cells, out: Path, command: str) -> dict[str, Any]:
    """Write `NAME.parquet`, `NAME.md`, `NAME.json` and `NAME.svg`; return the figures.

    Without cells, methods are compared by the `NAME.parquet` that is in `out`; without signals, what needs them stays
    as `NAME.json` has it.
    """
    out.mkdir(parents=True, exist_ok=True)
    study, place = cells.study, out / cells.study.name
    earlier: dict[str, Any] = {}
    if place.with_suffix(".json").exists():
        earlier = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
    rows = _read(cells)
    if rows:
        pq.write_table(_table(rows), place.with_suffix(".parquet"), compression="zstd")
        run = {
            "versions": _versions(),
            "seconds_of_cells": round(sum(row["seconds"] for row in rows)),
            "cpu_seconds_of_cells": _cpu_seconds(rows),
            "variance": variance(cells),
        }
    else:
        rows = _rows_of_table(place.with_suffix(".parquet"), earlier)
        run = {"versions": _versions(), "seconds_of_cells": 0, "cpu_seconds_of_cells": None, "variance": {}}
        run |= {name: earlier[name] for name in run if name in earlier}
    measured = {
        "found": earlier.get("found", {}),
        "causes": earlier.get("causes", {}),
        "sweeps": earlier.get("sweeps", {}),
    }
    if any((cells.folder / "signals").glob("history-*")):
        is_noisy = study.noise_rate > 0
        measured = {
            "found": found_noise(cells) if is_noisy else {},
            "causes": causes(cells),
            "sweeps": sweeps(cells) if is_noisy else {},
        }
    seeds = [row["seed"] for row in rows] or [s.model_dump(exclude_none=True) for s in study.seeds]
    figures: dict[str, Any] = {
        "about": study.about,
        "command": command,
        **run,
        "seeds": sorted({tuple(seed.values()) for seed in seeds}),
        "methods": _compare(rows),
        **measured,
    }
    place.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    place.with_suffix(".md").write_text(markdown(study, figures), encoding="utf-8")
    if rows:
        draw(figures, place.with_suffix(".svg"), study.name)
    return {k: figures[k] for k in ("methods", "found", "variance", "causes", "sweeps")}


def note_run(out: Path, command: str, num_cells: int, seconds: tuple[int, int], threads: int) -> None:
    """Add a line to `runs.jsonl`: how long a run of one or more studies took.

    Args:
        out: where the results are.
        command: as it was given.
        num_cells: run, not found.
        seconds: of wall clock, and of CPU time of all threads.
        threads: that torch used.
    """
    wall, cpu = seconds
    line = {
        "command": command,
        "ended": datetime.now(UTC).isoformat(timespec="minutes"),
        "cells": num_cells,
        "seconds": wall,
        "cpu_seconds": cpu,
        "threads": threads,
        "cores": os.cpu_count(),
        "versions": _versions(),
    }
    with (out / RUNS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _read(cells: Cells) -> list[Row]:
    study = cells.study
    paths = [cells.path(method, seed) for method in study.methods for seed in study.seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def _cpu_seconds(rows: list[Row]) -> int | None:
    """Of all threads; None where a cell was run before this was recorded."""
    if not rows or any("cpu_seconds" not in row for row in rows):
        return None
    return round(sum(row["cpu_seconds"] for row in rows))


def _table(rows: list[Row]) -> pa.Table:
    """One row a cell and item: the held-out answers, the greedy ones, those of other data."""
    flat = []
    for row in rows:
        head = {"method": row["method"], **row["seed"]}
        for what in ITEMS:
            flat += [{**head, "what": what, "item": i, **item} for i, item in enumerate(row.get(what, []))]
    names = list(dict.fromkeys(key for row in flat for key in row))
    return pa.table({name: [row.get(name) for row in flat] for name in names})


def _rows_of_table(path: Path, earlier: dict[str, Any]) -> list[Row]:
    """The inverse of `_table`; the shares kept and the steps, means over seeds, from the earlier figures."""
    found: dict[tuple[Any, ...], Row] = {}
    for item in pq.read_table(path).to_pylist() if path.exists() else ():
        seed = {
            name: item.pop(name) for name in ("data", "noise", "order", "draw") if item.get(name) is not None
        }
        method, what = item.pop("method"), item.pop("what")
        own = earlier["methods"][method]
        head = {"method": method, "seed": seed, "steps": own["steps"], "kept": own["kept"]}
        head["empty_steps"] = own.get("empty_steps", 0)
        row = found.setdefault((method, *seed.values()), head)
        row.setdefault(what, []).append(item)
    return list(found.values())


def _compare(rows: list[Row]) -> dict[str, Any]:
    """Each method against `full`, `random`, `prefix` and `pmi-band`, on the seeds that both have.

    `at_once`: the same differences with wider intervals, which hold for all methods at once (Bonferroni).
    """
    by_method: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_method[row["method"]][json.dumps(row["seed"])] = row
    references = [m for m in by_method if m.split()[0] in ("random", "prefix", "pmi-band")]
    all_at_once = 1 - (1 - LEVEL) / max(1, len(by_method) - 1)
    found: dict[str, Any] = {}
    for method, own in by_method.items():
        shared = [seed for seed in own if seed in by_method["full"]]
        if not shared:
            continue
        a, b = [own[s] for s in shared], [by_method["full"][s] for s in shared]
        kept = {k: float(np.mean([r["kept"][k] for r in a if k in r["kept"]])) for k in a[0]["kept"]}
        figures: dict[str, Any] = {"num_seeds": len(shared), "steps": a[0]["steps"], "kept": kept}
        if empty := float(np.mean([r.get("empty_steps", 0) for r in a])):
            figures["empty_steps"] = empty
        figures["loss"] = {
            name: _difference(a, b, "held_out", f"loss_{name}", f"tokens_{name}") for name in LOSSES
        }
        at_once = _difference(a, b, "held_out", "loss_all", "tokens_all", all_at_once)
        figures["at_once"] = {"full": at_once} if method != "full" else {}
        figures["own_loss"] = _mean(a, "held_out", "loss_all", "tokens_all")
        for other in ("forgetting", "plain"):
            if other in a[0]:
                figures[other] = _difference(a, b, other, "loss_all", "tokens_all")
        if "greedy" in a[0]:
            for what in GREEDY:
                less = {"full": _difference(a, b, "greedy", what, None)}
                figures[what] = {"mean": _mean(a, "greedy", what, None), "less": less}
        for reference in references:
            both = [s for s in own if s in by_method[reference]]
            if method == reference or not both:
                continue
            a, b = [own[s] for s in both], [by_method[reference][s] for s in both]
            less = figures.setdefault("loss_less", {})
            less[reference] = _difference(a, b, "held_out", "loss_all", "tokens_all")
            at_once = _difference(a, b, "held_out", "loss_all", "tokens_all", all_at_once)
            figures["at_once"][reference] = at_once
            for what in GREEDY if "greedy" in a[0] else ():
                figures[what]["less"][reference] = _difference(a, b, "greedy", what, None)
        found[method] = figures
    return found


def _values(rows: list[Row], what: str, key: str | None) -> np.ndarray:
    """[S, I]."""
    return np.array([[float(item[key]) if key else 1.0 for item in row[what]] for row in rows])


def _difference(
    a: list[Row], b: list[Row], what: str, key: str, number: str | None, level: float = LEVEL
) -> Interval:
    return paired_difference(
        _values(a, what, key),
        _values(a, what, number),
        _values(b, what, key),
        _values(b, what, number),
        level,
    )


def _mean(rows: list[Row], what: str, key: str, number: str | None) -> Interval:
    total, count = _values(rows, what, key), _values(rows, what, number)
    found = paired_difference(total, count, np.zeros_like(total), np.ones_like(total))
    if key in SHARES:
        return Interval(found.value, max(0.0, found.low), min(1.0, found.high))
    return found


def _versions() -> dict[str, str]:
    import peft
    import torch
    import transformers

    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "platform": f"{sys.platform} {platform.machine()}",
    }
