"""Tables, and the summaries that verbs print about a finished step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sstoken.pipeline.job import Result
from sstoken.pipeline.saying import is_quiet, printable, say
from sstoken.signals import get_signal, is_signal
from sstoken.stages.processes import is_main_process
from sstoken.stages.token_text import visible

_REMARKS = ("note:", "warning:")
"""Lines that begin with these are shown even with `--quiet`."""
SUPERSEDED = "unfinished work of other settings or inputs, or of a forced run; resume that run, or delete it"


def print_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a plain table; text is shown literally, never read as markup."""
    table = Table(show_header=any(names), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)


def print_comparison(facts: dict[str, Any]) -> None:
    """Print what `compare` found."""
    say(f"{facts['response_tokens']:,} response tokens of {facts['examples']:,} examples that all have")
    left = {name: number for name, number in facts["left_out"].items() if number}
    if left:
        say(
            "not compared: "
            + ", ".join(f"{number:,} examples of {name} alone" for name, number in left.items())
        )
    say("kept: " + ", ".join(f"{name} {share:.1%}" for name, share in facts["kept"].items()))
    for pair in facts["pairs"]:
        a, b = pair["first"], pair["second"]
        say(
            f"\n{a} and {b}: Jaccard {pair['jaccard']:.3f}, kappa {pair['kappa']:z.3f}; "
            f"{pair['only_first']:,} tokens in {a} alone, {pair['only_second']:,} in {b} alone"
        )
        tenths = " ".join(f"{row['differ']:4.0%}" for row in pair["by_tenth"])
        say(f"  differ by position in the response, first tenth to last: {tenths}")
        classes = ", ".join(
            f"{row['class']} {row['differ']:.1%} of {row['tokens']:,}" for row in pair["by_class"]
        )
        say(f"  differ by class: {classes}")
        low, middle, high = pair["by_example"]["jaccard_quartiles"]
        say(f"  Jaccard by example: quartiles {low:.3f}, {middle:.3f}, {high:.3f}")
        for row in pair["by_example"]["most_different"]:
            say(
                f"    {visible(row['example_id'], newline=' ')}: {row['differ']:.1%} of {row['tokens']:,} tokens differ"
            )


def print_result(name: str, result: Result, kind: str | None = None) -> None:
    """Print a step's summary, or that it was finished already; of several processes, only the main one prints."""
    if not is_main_process():
        return
    stage = kind or name.partition("/")[0]
    is_done = not result.skipped and "world_size" not in result.metrics
    summary = _SUMMARIES.get(stage, _plain)(result.metrics) if is_done else []
    if is_quiet():
        for line in summary:
            if line.startswith(_REMARKS):
                say(f"{name}: {line}", err=True)
        return
    if result.skipped:
        say(f"{name}: finished already, in {result.folder}")
        if result.superseded is not None:
            say(f"note: {result.superseded}: {SUPERSEDED}", err=True)
        return
    if "world_size" in result.metrics:
        rank, world_size = result.metrics["rank"], result.metrics["world_size"]
        say(f"{name}: rank {rank} of {world_size} done, in {result.folder}; run `commit` once all ranks are")
        return
    say(f"{name}: done, in {result.folder}")
    if result.replaced:
        say(f"  replaced what was there: {'; '.join(result.replaced)}")
    for line in summary:
        say(f"  {line}")
    if stage == "encode":
        from sstoken.pipeline.first_example import print_first_example

        print_first_example(result.folder)


def _plain(metrics: dict[str, Any]) -> list[str]:
    return [f"{key}: {value}" for key, value in metrics.items()]


def _encode(m: dict[str, Any]) -> list[str]:
    lengths = m["length"]
    lines = [
        f"{m['examples']:,} examples, {m['tokens']:,} tokens, {m['response_share']:.1%} of them in responses",
        f"length: median {lengths['p50']}, 90 % within {lengths['p90']}, 99 % within {lengths['p99']}, "
        f"longest {lengths['max']}",
        f"truncated {m['truncated']:,}, dropped for having no response left {m['dropped_no_response']:,}",
    ]
    if m.get("read_as"):
        lines = [*_read_as(m["read_as"]), *lines]
    for what, key in (("passed over as asked", "passed_over"), ("note", "notes")):
        lines += [f"{what}: {reason}, {count:,}" for reason, count in m[key].items()]
    if m["unused"]:
        columns = ", ".join(f"{name} {count:,}" for name, count in m["unused"].items())
        lines.append(f"not part of the conversations, with how many rows have it: {columns}")
    bad = m["bad_rows"]
    if bad:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(bad.items()))
        lines.append(f"bad rows {sum(bad.values()):,}: {reasons}; listed in bad_rows/")
    return lines


def _read_as(facts: dict[str, Any]) -> list[str]:
    """How rows were read, and what the chat template adds to them."""
    columns = ", ".join(name if name == role else f"{name} as {role}" for role, name in facts["columns"])
    lines = [f"layout: {facts['layout']} ({visible(columns, newline=' ')})"]
    if facts["template"] == "plain":
        lines.append("the tokenizer has no chat template: a plain one is used (User: ... Assistant: ...)")
    if facts["template_adds"]:
        added = visible(facts["template_adds"], newline="⏎")
        lines.append(f"the chat template adds before the row's own text: {added}")
    return lines


def _part(m: dict[str, Any]) -> list[str]:
    return [
        f"{m['examples']:,} examples, {m['tokens']:,} tokens, {m['response_share']:.1%} of them in responses"
    ]


def _anchor(m: dict[str, Any]) -> list[str]:
    loss = "" if m["loss"] is None else f", loss {m['loss']:z.4f} nats at the end"
    return [
        f"{m['steps']:,} steps, {m['tokens_seen']:,} tokens seen{loss}",
        f"checkpoints: {', '.join(m['snapshots'])}; the loss is drawn in learning_curve.png",
        *(f"note: {note}" for note in m.get("notes", ())),
    ]


def _score(m: dict[str, Any]) -> list[str]:
    line = f"{m['response_tokens']:,} response tokens of {m['examples']:,} examples"
    for name, mean in ((key.removeprefix("mean_"), m[key]) for key in m if key.startswith("mean_")):
        unit = " nats" if is_signal(name) and get_signal(name).unit == "nats" else ""
        line += f", mean {'attention on the prompt' if name == 'attention' else name} {mean:z.4f}{unit}"
    lines = [line, m["computed_with"]] if "computed_with" in m else [line]
    if m.get("trained_on_other_tokens"):
        lines.append("note: the anchor run that left this checkpoint was trained on other tokens than these")
    return lines


def _critical(m: dict[str, Any]) -> list[str]:
    answers = ", ".join(f"{name} {count:,}" for name, count in m["outcomes"].items()) or "none"
    lines = [
        f"greedy answers to {m['examples']:,} examples: {answers}",
        f"{m['critical']:,} of {m['tried']:,} response tokens that were tried are critical; not tried (null): "
        + (", ".join(f"{name} {count:,}" for name, count in m["not_tried"].items()) or "none"),
        "the method critical-tokens drops what was not tried, or keeps it with --param untried=keep",
    ]
    if m["answers_cut"] or m["continuations_cut"]:
        lines.append(
            f"cut at max_new_tokens and judged as they stood: {m['answers_cut']:,} answers, "
            f"{m['continuations_cut']:,} continuations"
        )
    if m["first_wrong"] is not None:
        lines.append(f"first example answered wrongly: {m['first_wrong']}")
    if m["first_error"] is not None:
        lines.append(f"warning: {m['first_error']}; where a checker raises, nothing is tried")
    return lines


def _select(m: dict[str, Any]) -> list[str]:
    lines = [
        *_compared(m),
        f"kept {m['kept']:,} of {m['response_tokens']:,} response tokens ({m['kept_share']:.1%}), dropped "
        f"{m['dropped']:,}, in {m['examples']:,} examples",
    ]
    if m["left_out"]:
        lines.append(f"left out {m['left_out']:,} examples without a response token")
    if "passed_over" in m:
        lines.append(f"passed over {m['passed_over']:,} examples that were not chosen")
    if "protected" in m:
        found = ", ".join(f"{name} {count:,}" for name, count in m["protected"].items())
        lines.append(f"protected: {found}; {m['protected_added']:,} of them kept against their score")
    lines += [f"note: {note}" for note in m.get("notes", ())]
    if "signal_overlap" in m:
        lines.append(
            f"of the tokens that REL alone would keep, attention alone keeps {m['signal_overlap']:.1%}"
        )
    deciles = " ".join("  -" if s is None else f"{s:4.0%}" for s in m["kept_share_by_decile"])
    lines.append(f"kept by position in the response, first tenth to last: {deciles}")
    return lines


def _compared(m: dict[str, Any]) -> list[str]:
    """Which checkpoint had which role, and how far the losses fell between them."""
    if not m.get("compared"):  # a method without checkpoints, or a pulled folder
        return []
    line = ", ".join(f"{role} is {name}" for role, name in m["compared"].items())
    return [line + (f"; mean REL {m['mean_rel']:z.4f} nats" if "mean_rel" in m else "")]


def _export(m: dict[str, Any]) -> list[str]:
    lines = [
        f"{m['examples']:,} examples for {m['to']}, {m['kept']:,} of {m['tokens']:,} tokens to be learned; the longest "
        f"has {m['longest']:,}"
    ]
    if m["dropped"] or m["truncated"]:
        lines.append(f"truncated {m['truncated']:,}, dropped {m['dropped']:,} with nothing left to learn")
    if m["kept_lost"]:
        lines.append(
            f"{m['kept_lost']:,} kept tokens are not trained: cut off, or the first of their example"
        )
    lines.append("how to train on it is said in README.md")
    return lines


_SUMMARIES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "encode": _encode,
    "part": _part,
    "anchor": _anchor,
    "score": _score,
    "critical": _critical,
    "select": _select,
    "pull": _select,
    "export": _export,
}
