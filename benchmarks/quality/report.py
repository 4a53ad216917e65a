"""From cells to a Parquet table, a Markdown page and a figure."""

import json
import platform
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.quality.detection import causes, found_noise
from benchmarks.quality.intervals import Interval, paired_difference
from benchmarks.quality.settings import MethodRun, Seed
from benchmarks.quality.study import Cells
from benchmarks.quality.sweeps import sweeps
from benchmarks.quality.tokens import CLASSES

LOSSES = ("all", *CLASSES)
GREEDY = ("right", "ended", "length")


def write_report(cells: Cells, out: Path, command: str) -> dict[str, Any]:
    """Write `NAME.parquet`, `NAME.md`, `NAME.json` and `NAME.svg` from the cells there are; return the figures."""
    out.mkdir(parents=True, exist_ok=True)
    name = cells.study.name
    rows = _read(cells, [*cells.study.seeds])
    if rows:
        pq.write_table(_table(rows), out / f"{name}.parquet", compression="zstd")
    figures: dict[str, Any] = {
        "about": cells.study.about,
        "command": command,
        "versions": _versions(),
        "seconds_of_cells": round(sum(row["seconds"] for row in rows)),
        "seeds": sorted(
            {tuple(row["seed"].values()) for row in rows}
            or {tuple(s.model_dump().values()) for s in cells.study.seeds}
        ),
        "methods": _compare(rows),
        "variance": _variance(cells),
        "found": found_noise(cells) if cells.study.noise_rate else {},
        "causes": causes(cells),
        "sweeps": sweeps(cells) if cells.study.noise_rate else {},
    }
    (out / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(_markdown(cells, figures), encoding="utf-8")
    if rows:
        _figure(figures, out / f"{name}.svg", name)
    return {k: figures[k] for k in ("methods", "found", "variance", "causes", "sweeps")}


def _read(cells: Cells, seeds: list[Seed]) -> list[dict[str, Any]]:
    paths = [cells.path(method, seed) for method in cells.study.methods for seed in seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """One row a cell and item: the held-out answers, the greedy ones, those of other data."""
    flat = []
    for row in rows:
        head = {"method": row["method"], **row["seed"]}
        for what in ("held_out", "greedy", "forgetting", "plain"):
            flat += [{**head, "what": what, "item": i, **item} for i, item in enumerate(row.get(what, []))]
    names = list(dict.fromkeys(key for row in flat for key in row))
    return pa.table({name: [row.get(name) for row in flat] for name in names})


def _compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each method against `full`, on the seeds that both have."""
    by_method: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_method[row["method"]][json.dumps(row["seed"])] = row
    found: dict[str, Any] = {}
    for method, own in by_method.items():
        shared = [seed for seed in own if seed in by_method["full"]]
        if not shared:
            continue
        a, b = [own[s] for s in shared], [by_method["full"][s] for s in shared]
        kept = {k: float(np.mean([r["kept"][k] for r in a if k in r["kept"]])) for k in a[0]["kept"]}
        found[method] = {"num_seeds": len(shared), "steps": a[0]["steps"], "kept": kept}
        found[method]["loss"] = {
            name: _difference(a, b, "held_out", f"loss_{name}", f"tokens_{name}") for name in LOSSES
        }
        found[method]["full_loss"] = _mean(b, "held_out", "loss_all", "tokens_all")
        for other in ("forgetting", "plain"):
            if other in a[0]:
                found[method][other] = _difference(a, b, other, "loss_all", "tokens_all")
        if "greedy" in a[0]:
            for what in GREEDY:
                found[method][what] = {
                    "mean": _mean(a, "greedy", what, None),
                    "less": {"full": _difference(a, b, "greedy", what, None)},
                }
    for reference in [m for m in found if m.split()[0] in ("random", "prefix")]:
        for method in found:
            shared = [s for s in by_method[method] if s in by_method[reference]]
            a, b = ([by_method[m][s] for s in shared] for m in (method, reference))
            if method != reference and shared:
                found[method].setdefault("loss_less", {})[reference] = _difference(
                    a, b, "held_out", "loss_all", "tokens_all"
                )
                for what in GREEDY if "greedy" in a[0] else ():
                    found[method][what]["less"][reference] = _difference(a, b, "greedy", what, None)
    return found


def _values(rows: list[dict[str, Any]], what: str, key: str | None) -> np.ndarray:
    """[S, I]."""
    return np.array([[float(item[key]) if key else 1.0 for item in row[what]] for row in rows])


def _difference(
    a: list[dict[str, Any]], b: list[dict[str, Any]], what: str, key: str, number: str | None
) -> Interval:
    return paired_difference(
        _values(a, what, key), _values(a, what, number), _values(b, what, key), _values(b, what, number)
    )


def _mean(rows: list[dict[str, Any]], what: str, key: str, number: str | None) -> float:
    return float(_values(rows, what, key).sum() / _values(rows, what, number).sum())


def _variance(cells: Cells) -> dict[str, Any]:
    """The standard deviation of `full`'s held-out loss over each source of variance alone."""
    full = MethodRun(method="full")
    base = cells.study.seeds[0]
    losses: dict[str, list[float]] = {}
    for source in ("data", "noise", "order"):
        seeds = [base, *(s for s in cells.study.variance if getattr(s, source) != getattr(base, source))]
        paths = [cells.path(full, seed) for seed in seeds]
        rows = [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]
        losses[source] = [_mean([row], "held_out", "loss_all", "tokens_all") for row in rows]
    return {s: {"runs": len(x), "sd": float(np.std(x, ddof=1))} for s, x in losses.items() if len(x) > 2}


def _markdown(cells: Cells, figures: dict[str, Any]) -> str:
    study = cells.study
    lines = [
        f"# {study.name}",
        "",
        study.about,
        "",
        f"`{figures['command']}`{_seconds(figures)}",
        "",
    ]
    lines += [", ".join(f"{k} {v}" for k, v in figures["versions"].items()) + ".", ""]
    seeds = ", ".join(str(tuple(s)) for s in figures["seeds"])
    lines += [f"{study.num_train} training answers a seed; seeds (data, noise, order) {seeds}.", ""]
    if figures["methods"]:
        lines += [
            f"{study.num_held_out} clean held-out answers. Their loss less that of `full`, nats a token, with a 95 % "
            "interval (paired bootstrap over seeds and answers); below 0 is better than `full`.",
            "",
            "| method | seeds | kept: content, noise, end | all tokens | result | numbers | words | end | "
            "other answers | plain text |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    for method, f in figures["methods"].items():
        kept = (
            f"{f['kept']['content']:.0%}, {f['kept'].get('noise', float('nan')):.0%}, {f['kept']['end']:.0%}"
        )
        losses = " | ".join(_cell(f["loss"][name]) for name in ("all", "result", "number", "word", "end"))
        lines.append(
            f"| {method} | {f['num_seeds']} | {kept} | {losses} | {_cell(f.get('forgetting'))} | "
            f"{_cell(f.get('plain'))} |"
        )
    one = next(iter(figures["methods"].values()), None)
    if one:
        lines += ["", f"`full` has a held-out loss of {one['full_loss']:.3f}."]
    references = sorted({r for f in figures["methods"].values() for r in f.get("loss_less", {})})
    if references:
        lines += ["", "Held-out loss (all tokens) less that of another method:", ""]
        lines += ["| method | " + " | ".join(references) + " |", "|---" * (len(references) + 1) + "|"]
        lines += [
            f"| {m} | " + " | ".join(_cell(f["loss_less"].get(r)) for r in references) + " |"
            for m, f in figures["methods"].items()
            if "loss_less" in f
        ]
    if one and "right" in one:
        lines += _greedy(study.num_greedy, references, figures["methods"])
    if figures["found"]:
        lines += [
            "",
            "AUROC with which each score ranks noise below content (0.5 is chance), 95 % interval over answers:",
            "",
        ]
        kinds = [
            k for k in next(iter(figures["found"].values()))["auroc"] if k not in ("all", "mean of kinds")
        ]
        lines += [
            "| score | all | mean of kinds | AUPRC | " + " | ".join(kinds) + " |",
            "|---" * (len(kinds) + 4) + "|",
        ]
        for score, f in sorted(figures["found"].items(), key=lambda item: -item[1]["auroc"]["all"][0]):
            value, low, high = f["auroc"]["all"]
            cells_ = " | ".join(f"{f['auroc'][k][0]:.2f}" if k in f["auroc"] else "" for k in kinds)
            lines.append(
                f"| {score} | {value:.3f} ({low:.3f} to {high:.3f}) | {f['auroc']['mean of kinds'][0]:.3f} | "
                f"{f['average_precision'][0]:.3f} | {cells_} |"
            )
        lines += [
            "",
            "Kept by a mask of 60 % of each answer, without protection, 95 % interval over answers:",
            "",
            "| score | end of turn | digits of the result | content | noise |",
            "|---|---|---|---|---|",
        ]
        for score, f in figures["found"].items():
            shares = (f["kept"][what] for what in ("end", "result", "content", "noise"))
            lines.append(
                f"| {score} | " + " | ".join(f"{v:.0%} ({a:.0%} to {b:.0%})" for v, a, b in shares) + " |"
            )
    if figures["causes"]:
        lines += ["", "Causes:", ""] + [f"- {what}: {value:.3f}" for what, value in figures["causes"].items()]
    for title, table in figures["sweeps"].items():
        lines += ["", f"{title}:", "", f"| | {' | '.join(table['columns'])} |"]
        lines.append("|---" * (len(table["columns"]) + 1) + "|")
        lines += [f"| {name} | {' | '.join(map(_cell, row))} |" for name, row in table["rows"].items()]
    if figures["variance"]:
        lines += ["", "Standard deviation of `full`'s held-out loss over one source of variance alone: "]
        lines += [
            f"- {source}: {v['sd']:.4f} ({v['runs']} runs)" for source, v in figures["variance"].items()
        ]
    return "\n".join(lines) + "\n"


def _greedy(number: int, references: list[str], methods: dict[str, Any]) -> list[str]:
    """How many answers are right, how many end, and how long they are."""
    others = ["full", *references]
    lines = [
        "",
        f"Greedy answers to {number} held-out questions: share that is right, less that of another method "
        "(0.01 is one point); share that ends within the limit; length in tokens.",
        "",
        "| method | right | " + " | ".join(f"less {o}" for o in others) + " | end | less full | tokens |",
        "|---" * (len(others) + 5) + "|",
    ]
    for method, f in methods.items():
        less = " | ".join(_cell(f["right"]["less"].get(o)) for o in others)
        lines.append(
            f"| {method} | {f['right']['mean']:.1%} | {less} | {f['ended']['mean']:.1%} | "
            f"{_cell(f['ended']['less']['full'])} | {f['length']['mean']:.1f} |"
        )
    return lines


def _cell(interval: Any) -> str:
    return "" if interval is None else str(Interval(*interval))


def _seconds(figures: dict[str, Any]) -> str:
    return f" ({figures['seconds_of_cells']} s in all)" if figures["seconds_of_cells"] else ""


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


def _figure(figures: dict[str, Any], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = title
    from matplotlib import pyplot as plt

    methods = [m for m in figures["methods"] if m != "full"][::-1]
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.32 * len(methods)))
    for y, method in enumerate(methods):
        value, low, high = figures["methods"][method]["loss"]["all"]
        colour = "tab:green" if high < 0 else "tab:red" if low > 0 else "tab:gray"
        axes.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=3)
    axes.set_yticks(range(len(methods)), methods)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("held-out loss less that of full, nats a token (95 %)")
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
