"""Prints the result of `audit`."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from sstoken.pipeline.saying import printable
from sstoken.stages.auditing.findings import SEVERITIES, AuditResult, Finding
from sstoken.stages.token_text import visible

_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_LONGEST = 200
"""Characters of an example to show."""


def print_audit(result: AuditResult) -> None:
    """Print the facts, then each finding with its example and remedy."""
    console = Console(soft_wrap=True, highlight=False)
    for name, line in _facts(result):
        console.print(Text(printable(f"{name:<11}{line}")))
    for finding in result.findings:
        console.print()
        _print_finding(console, finding, result.facts["rows"])
    counts = [(s, sum(f.severity == s for f in result.findings)) for s in SEVERITIES]
    said = ", ".join(f"{n} {s}{'s' if n > 1 else ''}" for s, n in counts if n)
    console.print(f"\n{said or 'nothing found'}" + ("; docs/audit.md explains each kind" if said else ""))


def _print_finding(console: Console, finding: Finding, rows: int) -> None:
    head = Text(finding.severity, style=_COLOURS[finding.severity])
    head.append(f" {finding.kind}", style="bold")
    head.append(f" ({finding.rows:,} of {rows:,} rows): {printable(finding.what)}", style="not bold")
    console.print(head)
    shown = finding.example
    if shown is not None:
        where = visible(f"{shown.where}{'' if shown.name is None else f' ({shown.name})'}", newline=" ")
        about = f": {visible(finding.detail, newline=' ')}" if finding.detail else ""
        if shown.focus[1] > shown.focus[0]:
            about += f" [token {shown.focus[0]}]" if shown.tokens else ""
        console.print(Text(f"  e.g. {where}{about}"))
        if text := shown.text():
            console.print(
                Text(f"       {text if len(text) <= _LONGEST else text[:_LONGEST] + '...'}", style="dim")
            )
    elif finding.detail:
        console.print(Text(printable(f"  {finding.detail}")))
    console.print(Text(printable(f"  do:  {finding.remedy}")))


def _facts(result: AuditResult) -> Iterator[tuple[str, str]]:
    facts = result.facts
    form = result.form if result.form in ("conversations", "tokenised") else f"folder of {result.form}"
    yield "dataset", f"{result.source} ({form})"
    rows = f"{facts['rows']:,}"
    if facts["examples"] != facts["rows"]:
        rows += f", {facts['examples']:,} examples"
    refused = sum(facts.get("refused", {}).values())
    yield "rows", rows + (f", {refused:,} refused" if refused else "")
    share = f"{facts['trained']:,} of {facts['tokens']:,} tokens are trained ({facts['trained_share']:.1%})"
    yield "trained", share
    yield from _roles(facts)
    length = facts["length"]
    within = ", ".join(f"{q} % within {length[f'p{q}']:,}" for q in (90, 99))
    yield "tokens", f"median {length['p50']:,}, {within}, longest {length['max']:,}"
    if length["max"] > facts["within"][0]["length"]:
        yield "cut at", ", ".join(f"{w['length']:,} keeps {w['trained_share']:.1%}" for w in facts["within"])
    if any(facts["ends"].values()):
        ends = facts["ends"]
        yield (
            "turn ends",
            (
                f"{ends['end_trained']:,} of {ends['turns']:,} trained, {ends['end_not_trained']:,} not trained, "
                f"{ends['end_missing']:,} missing"
            ),
        )
    parts = {name.replace("_", " "): p for name, p in facts["parts"].items() if p["tokens"]}
    if parts:
        said = (f"{name} {p['trained']:,} of {p['tokens']:,} tokens trained" for name, p in parts.items())
        yield "parts", ", ".join(said)
    yield from _encoding(facts)
    if facts["tokenizer"] is None:
        yield (
            "not checked",
            "texts, turns and their ends: no tokenizer is known; name it with --model or --tokenizer",
        )
    elif not facts["turns_known"]:
        yield "not checked", "whose turn a token is in: the tokenizer has no chat template that tells"


def _roles(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if facts["roles"]:
        yield (
            "by role",
            ", ".join(f"{n} {r['trained']:,} of {r['tokens']:,}" for n, r in facts["roles"].items()),
        )
    if len(facts["turns"]) > 1:
        turns = (f"{t['turn']}: {t['trained']:,} of {t['tokens']:,}" for t in facts["turns"])
        yield "by answer", ", ".join(turns)


def _encoding(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if facts.get("proof"):
        yield "mask proof", ", ".join(f"{name} {count:,}" for name, count in facts["proof"].items())
    if facts.get("unused_columns"):
        yield "not used", ", ".join(f"{name} {n:,}" for name, n in facts["unused_columns"].items())
    for note, count in facts.get("notes", {}).items():
        yield "note", f"{count:,} {note}"
