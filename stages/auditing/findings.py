"""Kinds of findings, an audit under way that collects them, and its result.

A family of checks declares its kinds at the top of its file, such as `FAMILY.error(...)`; docs/audit.md is generated
from them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sstoken.stages.auditing.examples import Example
from sstoken.stages.auditing.shape import Shape
from sstoken.stages.auditing.vocabulary import Vocabulary
from sstoken.stages.token_text import token_texts, visible

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Most severe first. An error trains something unintended, a warning probably does, a note only counts."""
Needs = Literal["ids", "tokenizer", "template", "raw"]
"""What a check needs: only token ids, a tokenizer, a chat template whose turns are found in the rows, or raw rows."""


@dataclass(frozen=True)
class Kind:
    """One kind of finding."""

    name: str
    """Stable, in kebab case."""
    severity: Severity
    what: str
    """What is wrong; follows a number of rows: "rows in which ..."."""
    remedy: str
    """What to do."""
    needs: Needs


KINDS: dict[str, Kind] = {}
"""By name; of findings equally severe and frequent, the kind declared first leads."""


@dataclass(frozen=True)
class Family:
    """Checks that a file has together."""

    name: str
    needs: Needs = "ids"
    """What its checks need, unless a kind says otherwise."""
    kinds: list[Kind] = field(default_factory=list)

    def error(self, name: str, what: str, remedy: str, needs: Needs | None = None) -> Kind:
        """Declare a kind of error."""
        return self._declare(Kind(name, "error", what, remedy, needs or self.needs))

    def warning(self, name: str, what: str, remedy: str, needs: Needs | None = None) -> Kind:
        """Declare a kind of warning."""
        return self._declare(Kind(name, "warning", what, remedy, needs or self.needs))

    def note(self, name: str, what: str, remedy: str, needs: Needs | None = None) -> Kind:
        """Declare a kind of note."""
        return self._declare(Kind(name, "note", what, remedy, needs or self.needs))

    def _declare(self, kind: Kind) -> Kind:
        assert kind.name not in KINDS, kind.name
        KINDS[kind.name] = kind
        self.kinds.append(kind)
        return kind


_AROUND = 12
"""Tokens to show on either side of a finding."""
TRAINED = ("«", "»")
"""Marks around trained tokens in displayed text."""


@dataclass(frozen=True)
class Shown:
    """An example of a finding, with the tokens around it."""

    where: str
    """`data.jsonl line 12`."""
    row: int
    """Number of the row, from 0."""
    name: str | None = None
    """Its `example_id`."""
    first: int = 0
    """Position in the row of the first token shown."""
    focus: tuple[int, int] = (0, 0)
    """Start and stop, in the row, of the tokens that the finding is about."""
    ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()
    """The text that each token adds; its id in `<>` without a tokenizer."""
    trained: tuple[bool, ...] = ()

    def text(self) -> str:
        """Return the tokens as one line, the trained ones within « »."""
        line, before = "", False
        for token, trained in zip(self.tokens, self.trained, strict=True):
            if trained != before:
                line += TRAINED[0] if trained else TRAINED[1]
            line, before = line + visible(token, newline="⏎"), trained
        return line + (TRAINED[1] if before else "")


@dataclass(frozen=True)
class Finding:
    """One kind of finding, counted over the whole dataset."""

    kind: str
    """A name in `KINDS`; stable."""
    severity: Severity
    rows: int
    """How many rows have it."""
    what: str
    """Text that follows the number of rows: "rows in which ..."."""
    detail: str
    """About the example."""
    example: Shown | None
    remedy: str


@dataclass
class AuditResult:
    """The result of `audit`."""

    source: str
    form: str
    """`conversations` (raw), `tokenised`, or the stage that wrote the folder: `encode`, `select`, `export`, ..."""
    facts: dict[str, Any]
    """Counts over the dataset, ready for JSON."""
    findings: list[Finding] = field(default_factory=list)
    """Most severe first."""

    def failed(self, on: Severity = "error") -> bool:
        """Return whether any finding is at least as severe as `on`."""
        return any(SEVERITIES.index(f.severity) <= SEVERITIES.index(on) for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        findings = [
            asdict(f)
            | {"example": None if f.example is None else asdict(f.example) | {"text": f.example.text()}}
            for f in self.findings
        ]
        counts = {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}
        return {
            "source": self.source,
            "form": self.form,
            "counts": counts,
            "facts": self.facts,
            "findings": findings,
        }


@dataclass
class Audit:
    """An audit under way: what is known of the dataset, and the rows and first example of each kind of finding."""

    vocabulary: Vocabulary | None = None
    """None: no tokenizer is known, and texts are not checked."""
    shape: Shape = field(default_factory=Shape)
    """The marks of the chat template."""
    num_rows: int = 0
    """Rows read so far."""
    _rows: dict[str, int] = field(default_factory=dict)
    _last: dict[str, int] = field(default_factory=dict)
    """By kind, the last row that has it."""
    _first: dict[str, tuple[Shown | None, str, str]] = field(default_factory=dict)

    def __contains__(self, kind: Kind) -> bool:
        return kind.name in self._rows

    def has(self, kind: Kind, row: int) -> bool:
        """Return whether the current row has a finding of this kind; False for all rows before it."""
        return self._last.get(kind.name) == row

    def report(
        self, kind: Kind, example: Example, focus: int | tuple[int, int] = (0, 0), detail: str = ""
    ) -> None:
        """Count a row; `focus` is the token or the span of tokens concerned, relative to the example."""
        if self.has(kind, example.row):
            return
        self._last[kind.name] = example.row
        self._rows[kind.name] = self._rows.get(kind.name, 0) + 1
        if kind.name not in self._first:
            self._first[kind.name] = self.show(example, focus), detail, ""

    def report_count(self, kind: Kind, rows: int, shown: Shown | None = None, detail: str = "") -> None:
        """Set the number of rows of a kind."""
        if rows:
            self._rows[kind.name] = rows
            self._first.setdefault(kind.name, (shown, detail, ""))

    def withdraw(self, kind: Kind) -> None:
        """Take back all that was reported of a kind."""
        self._rows.pop(kind.name, None)

    def explain(self, kind: Kind, detail: str) -> None:
        """Set the detail of a kind's example, if it has one."""
        if kind in self:
            shown, _, remedy = self._first[kind.name]
            self._first[kind.name] = shown, detail, remedy

    def report_row(
        self, kind: Kind, where: str, row: int, detail: str, remedy: str = "", text: str = ""
    ) -> None:
        """Count a row that has no token ids; `text` is an excerpt to show as tokens."""
        self._rows[kind.name] = self._rows.get(kind.name, 0) + 1
        if kind.name not in self._first:
            ids: list[int] = []
            if text and self.vocabulary is not None:
                ids = self.vocabulary.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            shown = self.excerpt(where, row, ids[: 3 * _AROUND], trained=False)
            self._first[kind.name] = shown, detail, remedy

    def show(self, example: Example, focus: int | tuple[int, int]) -> Shown:
        """Return an example's tokens around `focus`, for display."""
        length = len(example.ids)
        span = focus if isinstance(focus, tuple) else (focus, focus + 1)
        start, stop = (min(max(0, i), length) for i in span)
        first, last = max(0, start - _AROUND), min(length, max(stop, start + 1) + _AROUND)
        if stop - start > 2 * _AROUND:
            last = min(last, start + 2 * _AROUND)
        ids = [int(i) for i in example.ids[first:last]]
        return Shown(
            example.where,
            example.row,
            example.name,
            first + example.offset,
            (start + example.offset, stop + example.offset),
            tuple(ids),
            tuple(self.texts(ids)),
            tuple(bool(t) for t in example.trained[first:last]),
        )

    def excerpt(self, where: str, row: int, ids: Sequence[int], *, trained: bool) -> Shown:
        """Return tokens for display that are all trained, or none of them."""
        return Shown(where, row, ids=tuple(ids), tokens=tuple(self.texts(ids)), trained=(trained,) * len(ids))

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token, or `<id>` for an unknown one."""
        if self.vocabulary is None:
            return [f"<{i}>" for i in ids]
        known = range(self.vocabulary.size)
        texts = iter(token_texts(self.vocabulary.tokenizer, [i for i in ids if i in known]))
        return [next(texts) if i in known else f"<{i}>" for i in ids]

    def findings(self) -> list[Finding]:
        """Return the findings, most severe first."""
        found = []
        for name, rows in self._rows.items():
            kind = KINDS[name]
            shown, detail, remedy = self._first[name]
            found.append(Finding(name, kind.severity, rows, kind.what, detail, shown, remedy or kind.remedy))
        order = list(KINDS)
        return sorted(found, key=lambda f: (SEVERITIES.index(f.severity), -f.rows, order.index(f.kind)))
