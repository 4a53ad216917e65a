"""Write the self-contained page of a report: statistics, charts and examples in the template in `page/`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sstoken.errors import SstokenError
from sstoken.methods import METHODS
from sstoken.methods.presets import shown_name
from sstoken.stages.masked_card import decisive_settings
from sstoken.stages.report import examples as shown_examples
from sstoken.stages.report import quality
from sstoken.stages.report.drawing import inline_svg, write_file
from sstoken.stages.report.figures import capitalized, charts
from sstoken.stages.report.folders import SCORE, Folders, open_folders
from sstoken.stages.report.statistics import TOKENS_SAMPLED, Breakdown, Statistics, measure
from sstoken.stages.report.token_classes import ALL_CLASSES
from sstoken.stages.token_text import visible
from sstoken.version import __version__

TEMPLATES = Path(__file__).parent / "page"
MOST_BYTES = 5_000_000
NGRAM_ROWS = 12
_WHY = {
    "random": "random",
    "surprising": "surprising",
    "disagreeing": "disagreeing",
    "flag": "flagged",
    "n-gram": "example of a token",
}


def write_page(
    named: Mapping[str, Path], file: Path, scores: Sequence[Path] = (), seed: int = 0
) -> dict[str, Any]:
    """Write the report of one folder, or of several selections of the same tokens, as one HTML file.

    `named` and `scores` are as in `open_folders`; `seed` is that of the samples.

    Returns:
        `examples`, `response_tokens`, `kept_share` (None for a tokens folder), `shown` (examples on the page), `bytes`,
        `signals` and `notes`.

    Raises:
        UsageError: a folder cannot be shown, or several are of different kinds.
        SstokenError: folders are unfinished, damaged or unrelated, or the file cannot be written.
    """
    folders = open_folders(named, scores)
    stats = measure(folders, seed)
    if not stats.response_tokens:
        raise SstokenError(f"{folders.first.path}: no response token, so there is nothing to show")
    text, facts = render(stats)
    size = len(text.encode())
    if size > MOST_BYTES:
        raise SstokenError(f"{file}: the page would take {size:,} bytes; show fewer folders side by side")
    write_file(file, text)
    return {**facts, "bytes": size}


def render(stats: Statistics) -> tuple[str, dict[str, Any]]:
    """Return the page's text, and facts about it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folders = stats.folders
    ngrams = _ngrams(stats)
    flags = quality.flags(stats)
    wanted = _wanted(stats, ngrams, flags)
    shown = shown_examples.gather(stats, wanted)
    rows = {example["row"] for example in shown}
    data = {"folders": shown_examples.titles(folders), "keys": _keys(stats), "examples": shown, "why": _WHY}
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"count": "{:,}".format, "percent": _percent, "shown": _shown}
    drawn = charts(stats)
    histograms = [name for name in drawn if name.startswith("histogram:")]
    others = [name for name in drawn if name not in (*histograms, "agreement")]
    text = environment.get_template("page.html").render(
        title=_title(folders),
        masked=folders.first.kind == "masked",
        names=[each.name for each in folders.all],
        numbers=_numbers(stats),
        made=list(_made(folders)),
        notes=_notes(stats),
        breakdowns=list(_breakdowns(stats)),
        histograms=[_figure(drawn[name]) for name in histograms],
        figures=[_figure(drawn[name]) for name in others],
        sampled=min(TOKENS_SAMPLED, stats.response_tokens),
        all_tokens=stats.response_tokens,
        ngrams=ngrams,
        rows=rows,
        flags=flags,
        agreement=_agreement(stats) if len(folders.all) > 1 else None,
        shown=len(shown),
        examples=stats.examples,
        audited=min(quality.AUDITED_ROWS, stats.examples),
        clipped=sum(example["tokens"] > len(example["ids"]) for example in shown),
        most_tokens=shown_examples.MOST_TOKENS,
        data=shown_examples.as_json(data),
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        version=__version__,
    )
    return text, {
        "examples": stats.examples,
        "response_tokens": stats.response_tokens,
        "kept_share": stats.kept_share() if folders.first.kind == "masked" else None,
        "shown": len(shown),
        "signals": [signal.key for signal in stats.present() if signal is not SCORE],
        "notes": folders.notes,
    }


def _title(folders: Folders) -> str:
    *others, last = [visible(each.name, newline=" ") for each in folders.all]
    return f"{', '.join(others)} and {last}" if others else last


def _figure(chart: Any) -> dict[str, str]:
    return {"title": chart.title, "caption": chart.caption, "svg": inline_svg(chart)}


def _keys(stats: Statistics) -> list[dict[str, Any]]:
    """Return the values that tokens can be coloured by, with the steps of each scale."""
    columns = stats.sample.columns()
    return [
        asdict(signal)
        | {
            "label": capitalized(signal.label),
            "short": signal.label.partition(",")[0],
            "meaning": f"{capitalized(signal.meaning)}.",
            "steps": shown_examples.scale(columns[signal.key].astype(np.float64), signal.signed),
        }
        for signal in stats.present()
    ]


def _wanted(
    stats: Statistics, ngrams: Iterable[dict[str, Any]], flags: Iterable[dict[str, Any]]
) -> dict[str, list[int]]:
    """Return rows by the reason for showing them; rows that the page links to come first."""
    flagged = [row for flag in flags for row in flag["rows"]]
    linked = [entry["row"] for table in ngrams for side in ("most", "least") for entry in table[side]]
    return {"flag": flagged, **stats.rows_to_show(), "n-gram": linked}


def _numbers(stats: Statistics) -> list[tuple[str, str]]:
    found = [
        ("examples", f"{stats.examples:,}"),
        ("tokens", f"{stats.tokens:,}"),
        ("in responses", _percent(stats.response_tokens / max(1, stats.tokens))),
    ]
    if stats.folders.first.kind == "masked":
        for i, each in enumerate(stats.folders.all):
            name = "of the response kept" if len(stats.folders.all) == 1 else f"kept by {each.name}"
            found.append((name, _percent(stats.kept_share(i))))
    else:
        found.append(("response tokens", f"{stats.response_tokens:,}"))
    return found


def _made(folders: Folders) -> Iterable[tuple[str, list[str]]]:
    """Yield a setting's name and its value for each folder; one value if all share it."""
    rows: dict[str, list[str]] = {}
    for place, each in enumerate(folders.all):
        for name, value in _settings(each.facts, each.kind):
            rows.setdefault(name, [""] * len(folders.all))[place] = visible(value, newline=" ")
    for name, values in rows.items():
        yield name, values[:1] if len(set(values)) == 1 else values
    if folders.scores:
        yield "scores found", [", ".join(folders.scores)]


def _settings(facts: Mapping[str, Any], kind: str) -> Iterable[tuple[str, str]]:
    if kind == "masked":
        method = METHODS.get(facts.get("method", ""))
        yield "method", shown_name(facts) or "unknown"
        if method is not None:
            yield "score", method.formula
            yield "policy", method.policy.text
        for key, value in decisive_settings(facts).items():
            yield key, str(value)
        for key in ("scope", "layer"):
            if facts.get(key) is not None:
                yield key, str(facts[key])
        for role, checkpoint in sorted(facts.get("checkpoints", {}).items()):
            yield f"{role} checkpoint", f"{checkpoint['name']} ({checkpoint['dtype']})"
    tokenizer = facts.get("tokenizer") or {}
    if "name" in tokenizer:
        yield "tokenizer", Path(str(tokenizer["name"])).name
    if facts.get("max_length"):
        yield "longest example allowed", f"{facts['max_length']:,} tokens"
    for key in ("version", "fingerprint"):
        if key in facts:
            yield {"version": "made by sstoken", "fingerprint": "run fingerprint"}[key], str(facts[key])


def _notes(stats: Statistics) -> list[str]:
    notes = [
        f"{each.name}: {note}" if len(stats.folders.all) > 1 else note
        for each in stats.folders.all
        for note in each.manifest.metrics.get("notes", ())
        if isinstance(note, str)
    ]
    forgotten = {n: most for n, most in stats.ngrams.forgotten.items() if most}
    if forgotten:
        notes.append(
            "To bound memory, the rarest sequences of tokens were not counted: "
            + ", ".join(f"of {n} tokens, those seen {most} times or fewer" for n, most in forgotten.items())
            + "."
        )
    return [*stats.folders.notes, *notes]


def _breakdowns(stats: Statistics) -> Iterable[dict[str, Any]]:
    yield _table(stats.by["class"], "By kind of token", list(ALL_CLASSES))
    tenths = [f"{n} % to {n + 10} %" for n in range(0, 100, 10)]
    yield _table(stats.by["decile"], "By place in the response", tenths)
    turns = [f"turn {n + 1}" for n in range(stats.by["turn"].tokens.size)]
    turns[-1] += " and later"
    if (stats.by["turn"].tokens > 0).sum() > 1:
        yield _table(stats.by["turn"], "By turn of the assistant", turns)
    lengths = [f"{2**n:,} to {2 ** (n + 1) - 1:,}" for n in range(stats.by["length"].tokens.size)]
    lengths[-1] = f"{2 ** (len(lengths) - 1):,} or more"
    yield _table(stats.by["length"], "By length of the response, in tokens", lengths)


def _table(counted: Breakdown, title: str, names: Sequence[str]) -> dict[str, Any]:
    total = max(1, int(counted.tokens.sum()))
    rows = [
        {
            "name": names[i],
            "tokens": int(number),
            "share": int(number) / total,
            "kept": [int(kept[i]) / int(number) for kept in counted.kept],
        }
        for i, number in enumerate(counted.tokens)
        if number
    ]
    return {"title": title, "rows": rows}


def _ngrams(stats: Statistics) -> list[dict[str, Any]]:
    if not stats.selective:
        return []
    share = stats.kept_share()
    found = []
    for n, title in ((1, "Tokens"), (2, "Two tokens in a row"), (3, "Three tokens in a row")):
        table: dict[str, Any] = {"title": title}
        for side in ("most", "least"):
            entries = stats.ngrams.extremes(n, share, NGRAM_ROWS, least=side == "least")
            for entry in entries:
                entry["text"] = stats.token_classes.decoder.text(entry["ids"])
            table[side] = entries
        if table["most"] or table["least"]:
            found.append(table)
    return found


def _agreement(stats: Statistics) -> dict[str, Any]:
    """Return Jaccard and kappa of each two folders, as two symmetric tables."""
    facts, names = stats.agreement, [each.name for each in stats.folders.all]
    return {
        "tables": [
            {"title": title, "about": about, "rows": list(zip(names, facts[key], strict=True))}
            for key, title, about in (
                ("jaccard", "Jaccard", "Tokens kept by both over tokens kept by either."),
                ("kappa", "Cohen's kappa", "Agreement beyond chance: 0 is chance, 1 is the same mask."),
            )
        ],
        "examples": facts["examples"],
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _shown(text: str) -> str:
    """Return a token's text with visible spaces."""
    return visible(text, newline="⏎").replace(" ", "␣") or "(part of a character)"
