"""Figures as Markdown and as a drawing."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.quality.intervals import LEVEL, Interval
from benchmarks.quality.settings import Study


def markdown(study: Study, figures: dict[str, Any]) -> str:
    """The page of one study."""
    seeds = ", ".join(str(tuple(s)) for s in figures["seeds"])
    versions = ", ".join(f"{k} {v}" for k, v in figures["versions"].items())
    lines = [
        f"# {study.name}",
        "",
        study.about,
        "",
        f"`{figures['command']}`{_seconds(figures)}",
        "",
        f"{versions}.",
        "",
        f"{study.num_train} training answers a seed; seeds (data, noise, order) {seeds}. Intervals are 95 %.",
    ]
    if len(figures["seeds"]) < 5:
        lines += ["", "A smoke test: fewer than five seeds, so nothing here is a claim."]
    if figures["methods"]:
        lines += _methods(study, figures["methods"])
    if figures["found"]:
        lines += _found(figures["found"])
    if figures["causes"]:
        lines += ["", "Means over answers, with intervals over answers:", ""]
        lines += [f"- {what}: {_plain(value)}" for what, value in figures["causes"].items()]
    for title, table in figures["sweeps"].items():
        lines += ["", f"{title}:", "", *_grid("", table["columns"], table["rows"].items(), _signed)]
    if figures["variance"]:
        lines += _variance(figures["variance"])
    return "\n".join(lines) + "\n"


WEIGHT_ON_NOISE = "weight on noise"
"""Of what a method's kept tokens or weights add up to, the share that is on noise."""
RUNS = "runs.jsonl"
"""What was run to make a folder's results: a line a run (`report.note_run`)."""


def write_summary(out: Path) -> None:
    """Write `small-table.md`, where there is what to write: one row a study and method of a folder of results."""
    lines = [
        "# Small table",
        "",
        "`python benchmarks/quality`. What training on each mask does, from the studies beside this file; those with "
        "fewer than five seeds are left out. 95 % intervals over seeds and answers (paired). Losses in nats a token, "
        "negative is better; shares of greedy answers, 0.01 is one point.",
        "",
    ]
    columns = ("less full", "less random", "less prefix", "right, less full", "ended, less full", "roleplay, less full",
               "plain text, less full")  # fmt: skip
    rows, seeds = [], set()
    for path in sorted(out.glob("*.json")):
        figures = json.loads(path.read_text(encoding="utf-8"))
        if len(figures["seeds"]) >= 5:
            seeds |= {tuple(seed) for seed in figures["seeds"]}
        references: dict[str, str] = {}
        for name in figures["methods"]:
            references.setdefault(name.split()[0], name)
        for method, f in figures["methods"].items() if len(figures["seeds"]) >= 5 else ():
            less = {kind: f.get("loss_less", {}).get(name) for kind, name in references.items()}
            shares = [f[what]["less"]["full"] if what in f else None for what in ("right", "ended")]
            values = [f["loss"]["all"], less.get("random"), less.get("prefix"), *shares]
            values += [f.get("forgetting"), f.get("plain")]
            if method != "full":
                rows.append((f"{path.stem} | {method}", values))
    lines += [f"Seeds (data, noise, order): {', '.join(map(str, sorted(seeds)))}.", ""]
    lines += [*_grid("study | method", columns, rows, _signed), *_runs(out / RUNS)]
    if rows:
        (out / "small-table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _runs(path: Path) -> list[str]:
    """How long each run took."""
    if not path.exists():
        return []
    lines = [
        "",
        "Runs: minutes of wall clock, whatever else the machine did, and of CPU time; cells that were run, not found.",
        "",
        "| command | ended | cells | minutes | CPU minutes | threads, cores | versions |",
        "|---|---|---|---|---|---|---|",
    ]
    for text in path.read_text(encoding="utf-8").splitlines():
        run = json.loads(text)
        versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
        lines.append(
            f"| `{run['command']}` | {run['ended'][:10]} | {run['cells']} | {run['seconds'] / 60:.0f} | "
            f"{run['cpu_seconds'] / 60:.0f} | {run['threads']}, {run['cores']} | {versions} |"
        )
    return lines


def _methods(study: Study, methods: dict[str, Any]) -> list[str]:
    def kept(f: dict[str, Any]) -> str:
        noise = f["kept"].get("noise")
        shares = f["kept"]["content"], noise, f["kept"].get("end")
        text = ", ".join("none" if share is None else f"{share:.0%}" for share in shares)
        return f"{text} | {f['kept'].get(WEIGHT_ON_NOISE, 0):.0%}" if weighted else text

    def steps(f: dict[str, Any]) -> str:
        empty = f.get("empty_steps")
        return f"{f['steps']}, of which {empty:g} with no token kept" if empty else str(f["steps"])

    weighted = any(WEIGHT_ON_NOISE in f["kept"] for f in methods.values())
    heading = "method | seeds | steps | kept: content, noise, end" + " | weight on noise" * weighted
    columns = ("all tokens", "result", "numbers", "words", "end", "other answers", "plain text")
    rows = [
        (
            f"{method} | {f['num_seeds']} | {steps(f)} | {kept(f)}",
            [f["loss"][name] for name in ("all", "result", "number", "word", "end")]
            + [f.get("forgetting"), f.get("plain")],
        )
        for method, f in methods.items()
    ]
    lines = [
        "",
        f"{study.num_held_out} clean held-out answers. Their loss less that of `full`, nats a token (paired; both "
        "seeds and answers drawn); below 0 is better than `full`. Other answers: roleplay; plain text: without the "
        "chat template.",
        "",
        *_grid(heading, columns, rows, _signed),
        "",
        f"`full` has a held-out loss of {_plain(methods['full']['own_loss'])}.",
    ]
    references = sorted({r for f in methods.values() for r in f.get("loss_less", {})})
    if references:
        less = [
            (m, [f["loss_less"].get(r) for r in references]) for m, f in methods.items() if "loss_less" in f
        ]
        lines += ["", "Held-out loss (all tokens) less that of another method:", ""]
        lines += _grid("method", references, less, _signed)
    for reference in ("full", *references):
        lines += _told_apart(reference, methods)
    if "right" in methods["full"]:
        lines += _greedy(study.num_greedy, references, methods)
    return lines


BESIDE = ("better, all at once", "better", "not told apart", "worse", "worse, all at once")
"""How a method may stand beside another: by its own interval, or by one that holds for all methods at once."""


def told_apart(methods: dict[str, Any], reference: str) -> dict[str, list[str]]:
    """The methods by how their held-out loss stands beside that of `reference`: every one of `BESIDE`."""
    found: dict[str, list[str]] = {name: [] for name in BESIDE}
    for method, f in methods.items():
        if reference not in f["at_once"]:
            continue
        own = f["loss"]["all"] if reference == "full" else f["loss_less"][reference]
        signs = [(low > 0) - (high < 0) for _, low, high in (own, f["at_once"][reference])]
        found[BESIDE[2 + sum(signs)]].append(method)
    return found


def _told_apart(reference: str, methods: dict[str, Any]) -> list[str]:
    groups = told_apart(methods, reference)
    number = sum(map(len, groups.values()))
    return [
        "",
        f"Beside `{reference}`, by each method's own interval (of {number}, chance alone would make "
        f"{number * (1 - LEVEL) / 2:.1f} look better and as many worse), or by wider ones that hold for all of them at "
        "once (Bonferroni):",
        "",
        "| | number | methods |",
        "|---|---|---|",
        *(f"| {name} | {len(group)} | {', '.join(group)} |" for name, group in groups.items()),
    ]


def _greedy(number: int, references: list[str], methods: dict[str, Any]) -> list[str]:
    """How many answers are right, how many end, and how long they are."""
    others = ["full", *references]
    lines = [
        "",
        f"Greedy answers to {number} held-out questions: share that is right, less that of another method (0.01 is one "
        "point); share that ends within the limit; length in tokens.",
        "",
        "| method | right | " + " | ".join(f"less {o}" for o in others) + " | end | less full | tokens |",
        "|---" * (len(others) + 5) + "|",
    ]
    for method, f in methods.items():
        less = " | ".join(_signed(f["right"]["less"].get(o)) for o in others)
        length = Interval(*f["length"]["mean"])
        lines.append(
            f"| {method} | {_percent(f['right']['mean'])} | {less} | {_percent(f['ended']['mean'])} | "
            f"{_signed(f['ended']['less']['full'])} | {length.value:.1f} ({length.low:.1f} to {length.high:.1f}) |"
        )
    return lines


def _found(found: dict[str, Any]) -> list[str]:
    kinds = [k for k in next(iter(found.values()))["auroc"] if k not in ("all", "mean of kinds")]
    ordered = sorted(found.items(), key=lambda item: -item[1]["auroc"]["all"][0])
    lines = [
        "",
        "AUROC with which each score ranks noise below content (0.5 is chance), intervals over answers:",
        "",
        "| score | all | mean of kinds | AUPRC | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 4) + "|",
    ]
    for score, f in ordered:
        of_kinds = " | ".join(_short(f["auroc"][k]) if k in f["auroc"] else "" for k in kinds)
        lines.append(
            f"| {score} | {_plain(f['auroc']['all'])} | {f['auroc']['mean of kinds'][0]:.3f} | "
            f"{_plain(f['average_precision'])} | {of_kinds} |"
        )
    columns = ("end of turn", "digits of the result", "content", "noise")
    rows = [(s, [f["kept"][w] for w in ("end", "result", "content", "noise")]) for s, f in found.items()]
    lines += ["", "Kept by a mask of 60 % of each answer, without protection, intervals over answers:", ""]
    return [*lines, *_grid("score", columns, rows, _percent)]


def _variance(methods: dict[str, Any]) -> list[str]:
    """Standard deviations by source."""
    sources = list(dict.fromkeys(source for of in methods.values() for source in of))
    lines = [
        "",
        "Standard deviation between runs that differ in one source alone, nats a token (normal values assumed): of "
        "the held-out loss, and of its difference from `full` with the same seed. `drawn`: LoRA's first weights and "
        "the mask of `random`; `all`: the study's seeds, in which all sources differ.",
        "",
    ]
    rows = []
    for method, of in methods.items():
        rows.append((f"{method}", [of[s]["sd"] if s in of else None for s in sources]))
        if method != "full":
            rows.append(
                (f"{method} less full", [of[s]["sd_less_full"] if s in of else None for s in sources])
            )
    runs = {s: next(of[s]["runs"] for of in methods.values() if s in of) for s in sources}
    return lines + _grid("", [f"{s} ({runs[s]} runs)" for s in sources], rows, lambda v: _plain(v, 4))


def _grid(
    head: str,
    columns: Iterable[str],
    rows: Iterable[tuple[str, list[Any]]],
    text: Callable[[Any], str],
) -> list[str]:
    """A table's lines; `head`, like a row's name, may be several columns, with `|` between."""
    columns = list(columns)
    number = len(columns) + head.count("|") + 1
    lines = [f"| {head} | {' | '.join(columns)} |", "|---" * number + "|"]
    return [*lines, *(f"| {name} | {' | '.join(map(text, values))} |" for name, values in rows)]


def _signed(interval: Any) -> str:
    return "" if interval is None else str(Interval(*interval))


def _plain(interval: Any, digits: int = 3) -> str:
    if interval is None:
        return ""
    value, low, high = (f"{x:.{digits}f}" for x in interval)
    return f"{value} ({low} to {high})"


def _short(interval: Any) -> str:
    return _plain(interval, 2)


def _percent(interval: Any) -> str:
    value, low, high = (f"{x:.0%}" for x in interval)
    return f"{value} ({low} to {high})"


def _seconds(figures: dict[str, Any]) -> str:
    if not figures["seconds_of_cells"]:
        return ""
    cpu = figures.get("cpu_seconds_of_cells")
    of_cpu = "" if cpu is None else f", {cpu} s of CPU"
    return f" (its cells took {figures['seconds_of_cells']} s{of_cpu})"


def draw(figures: dict[str, Any], path: Path, title: str) -> None:
    """The methods' held-out losses less that of `full`, with intervals."""
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
