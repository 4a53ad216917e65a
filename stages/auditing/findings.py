"""What an audit found: counts by kind, an example of each, and facts about the whole dataset."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sstoken.stages.auditing.examples import Example
from sstoken.stages.auditing.kinds import KINDS, SEVERITIES, Kind, Severity
from sstoken.stages.token_text import token_texts, visible

if TYPE_CHECKING:
    from sstoken.stages.auditing.vocabulary import Vocabulary

_AROUND = 12
"""Tokens shown on either side of what a finding is about."""
TRAINED = ("«", "»")
"""What stands around trained tokens where they are shown."""


@dataclass(frozen=True)
class Shown:
    """An example of a finding, with the tokens around what it is about."""

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
    """The text that each adds; its id in `<>` where there is no tokenizer."""
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
    """One kind of fault or count, over the whole dataset."""

    kind: str
    """A name in `KINDS`; stable."""
    severity: Severity
    rows: int
    """How many rows have it."""
    what: str
    """What it means, to be read after the number of rows."""
    detail: str
    """What is said about the example."""
    example: Shown | None
    remedy: str


@dataclass
class AuditResult:
    """What `audit` found."""

    source: str
    form: str
    """`conversations` (raw), `tokenised`, or the stage that wrote the folder: `encode`, `select`, `export`, ..."""
    facts: dict[str, Any]
    """Counts over the dataset, ready for JSON."""
    findings: list[Finding] = field(default_factory=list)
    """The gravest first."""

    def failed(self, on: Severity = "error") -> bool:
        """Whether something was found that is as grave as `on`, or graver."""
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


class Collector:
    """Counts the rows of each kind of finding, and keeps the first example."""

    def __init__(self, vocabulary: "Vocabulary | None") -> None:
        self.vocabulary = vocabulary
        self._rows: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._first: dict[str, tuple[Shown | None, str, str]] = {}

    def __contains__(self, kind: Kind) -> bool:
        return kind.name in self._rows

    def has(self, kind: Kind, row: int) -> bool:
        """Whether a row has a finding of this kind; true only for the row that is being looked at."""
        return self._last.get(kind.name) == row

    def add(self, kind: Kind, example: Example, focus: tuple[int, int] = (0, 0), detail: str = "") -> None:
        """Count a row; `focus` is the tokens concerned, from the start of the example."""
        if self.has(kind, example.row):
            return
        self._last[kind.name] = example.row
        self._rows[kind.name] = self._rows.get(kind.name, 0) + 1
        if kind.name not in self._first:
            self._first[kind.name] = self.show(example, focus), detail, ""

    def count(
        self,
        kind: Kind,
        rows: int,
        shown: Shown | None = None,
        detail: str = "",
        remedy: str = "",
    ) -> None:
        """Set the number of rows of a kind."""
        if rows:
            self._rows[kind.name] = rows
            self._first.setdefault(kind.name, (shown, detail, remedy))

    def place(self, kind: Kind, where: str, row: int, detail: str, remedy: str = "", text: str = "") -> None:
        """Count a row that has no token ids; `text` is what is shown of it, as tokens."""
        self._rows[kind.name] = self._rows.get(kind.name, 0) + 1
        if kind.name not in self._first:
            ids: list[int] = []
            if text and self.vocabulary is not None:
                ids = self.vocabulary.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                ids = list(ids[: 3 * _AROUND])
            texts = self.texts(ids) if ids else []
            shown = Shown(where, row, None, 0, (0, 0), tuple(ids), tuple(texts), (False,) * len(ids))
            self._first[kind.name] = shown, detail, remedy

    def show(self, example: Example, focus: tuple[int, int]) -> Shown:
        """Return what is shown of an example: the tokens around `focus`."""
        length = len(example.ids)
        start, stop = (min(max(0, i), length) for i in focus)
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

    def texts(self, ids: list[int]) -> list[str]:
        """Return the text of each token, or its id where it has none."""
        if self.vocabulary is None:
            return [f"<{i}>" for i in ids]
        size = self.vocabulary.size
        known = [0 <= i < size for i in ids]
        if not all(known):
            texts = iter(
                token_texts(self.vocabulary.tokenizer, [i for i, k in zip(ids, known, strict=True) if k])
            )
            return [next(texts) if k else f"<{i}>" for i, k in zip(ids, known, strict=True)]
        return token_texts(self.vocabulary.tokenizer, ids)

    def findings(self) -> list[Finding]:
        """Return what was found, the gravest first."""
        found = []
        for name, rows in self._rows.items():
            kind = KINDS[name]
            shown, detail, remedy = self._first[name]
            found.append(Finding(name, kind.severity, rows, kind.what, detail, shown, remedy or kind.remedy))
        order = list(KINDS)
        return sorted(found, key=lambda f: (SEVERITIES.index(f.severity), -f.rows, order.index(f.kind)))
