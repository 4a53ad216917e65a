"""Noise of ten kinds, planted in answers at known places.

Phrases and kinds come in two halves: `tune`, on which a method may be chosen, and `held`, on which it is judged.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Half = Literal["tune", "held"]

KINDS: dict[str, Half] = {
    "opening": "tune",
    "filler": "held",
    "closing": "held",
    "markup": "tune",
    "repeated": "tune",
    "echo": "held",
    "foreign": "held",
    "shuffled": "tune",
    "typo": "held",
    "wrong": "tune",
}
"""Every kind of noise, and the half that it belongs to.

opening, filler, closing: stock phrases. markup: what a scraper leaves behind. repeated: an earlier sentence of the
answer again. echo: a sentence of the question. foreign: a sentence of another answer. shuffled: a sentence with its
words in another order. typo: one misspelt word. wrong: one number replaced by another of as many digits.
"""

PHRASES: dict[tuple[str, Half], tuple[str, ...]] = {
    ("opening", "tune"): (
        "Certainly! I'd be happy to help with that.",
        "Great question! Let me explain this for you.",
        "Absolutely! Thank you for asking me about this.",
        "Thanks for reaching out! Let's take a look together.",
        "What an interesting problem! Let's dive right in.",
        "Of course, here is a complete answer for you.",
    ),
    ("opening", "held"): (
        "Sure, I can definitely assist you with this.",
        "No problem at all, we can work through it.",
        "As a helpful assistant, I am glad to answer this.",
        "Okay, so you would like to know how this works out.",
        "Hello there! I hope you are having a wonderful day.",
        "Good to hear from you. This is a nice exercise.",
    ),
    ("filler", "tune"): (
        "It is always important to be careful with each step.",
        "Keep in mind that practice makes perfect.",
        "There are of course many different ways to look at this.",
        "This is something that many people find interesting.",
        "It is worth noting that details matter here.",
        "Let us continue and see where this takes us.",
    ),
    ("filler", "held"): (
        "As you can see, this is not very complicated.",
        "Taking a moment to think is never a bad idea.",
        "Needless to say, this kind of thing comes up often.",
        "Mathematics has fascinated people for thousands of years.",
        "I am doing my best to make this as clear as I can.",
        "One could also write this down in another order.",
    ),
    ("closing", "tune"): (
        "I hope this helps! Let me know if you have any questions.",
        "Feel free to ask me anything else.",
        "Please let me know if something is unclear.",
        "Thank you for using this service today!",
    ),
    ("closing", "held"): (
        "That's it! Have a great day and good luck with your studies.",
        "Is there anything else that I can do for you?",
        "Don't hesitate to reach out again whenever you like.",
        "Remember to subscribe and share this with your friends.",
    ),
    ("markup", "tune"): (
        "<br><br>",
        "[1][2]",
        "&nbsp;&nbsp;",
        '<div class="answer">',
        "Advertisement",
        "Click here to read more",
    ),
    ("markup", "held"): (
        "</span></p>",
        "\\u00a0\\u00a0",
        "[citation needed]",
        "Share on Facebook Tweet",
        "Report this post",
        "## ## ##",
    ),
}


@dataclass(frozen=True)
class Row:
    """A question and its clean answer."""

    id: str
    question: str
    sentences: tuple[str, ...]
    """The last one states the result and stays as it is."""
    result: str
    joiner: str = "\n"
    """What stands between two sentences."""

    @property
    def answer(self) -> str:
        """The clean answer."""
        return self.joiner.join(self.sentences)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of an answer, and the kind of noise they are."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Example:
    """A row whose answer may hold noise."""

    row: Row
    answer: str
    spans: tuple[Span, ...] = ()


_Piece = tuple[str, str | None]


def plant(
    rows: Sequence[Row],
    others: Sequence[Row],
    *,
    rate: float,
    seed: int,
    kinds: Sequence[str] = tuple(KINDS),
    half: Half | None = None,
) -> list[Example]:
    """Plant noise in answers.

    Args:
        rows: what to plant it in.
        others: where foreign sentences come from.
        rate: the probability of each kind in each answer, in [0, 1].
        seed: of the draws; each row's depend on its id alone, so that more rows leave those before as they are.
        kinds: those that are planted.
        half: of the phrases; None takes both.
    """
    return [_plant(row, others, rate, random.Random(f"{seed}-{row.id}"), kinds, half) for row in rows]


def _plant(
    row: Row, others: Sequence[Row], rate: float, rng: random.Random, kinds: Sequence[str], half: Half | None
) -> Example:
    drawn = {kind: rng.random() < rate for kind in KINDS}  # all, so that `kinds` changes no other draw
    on = {kind for kind, yes in drawn.items() if yes and kind in kinds}
    lines: list[list[_Piece]] = [[(sentence, None)] for sentence in row.sentences]
    _replace(lines, on, rng)
    choice: Half = half or rng.choice(("tune", "held"))
    last = row.sentences[-1]
    if "foreign" in on:
        foreign = rng.choice(
            [s for s in rng.choice(others).sentences[:-1] if s not in row.sentences] or [last]
        )
        _insert(lines, "foreign", foreign, row.joiner, rng)
    if "echo" in on:
        _insert(lines, "echo", rng.choice(re.split(r"(?<=[.?!])\s+", row.question.strip())), row.joiner, rng)
    if "repeated" in on:
        clean = [i for i, line in enumerate(lines[:-1]) if len(line) == 1 and line[0][1] is None]
        if clean:
            index = rng.choice(clean)
            lines.insert(rng.randint(index + 1, len(lines) - 1), [(lines[index][0][0], "repeated")])
    for kind in ("filler", "markup"):
        if kind in on:
            _insert(lines, kind, rng.choice(PHRASES[kind, choice]), row.joiner, rng)
    if "opening" in on:
        opening = rng.choice(PHRASES["opening", choice])
        if rng.random() < 0.5:
            lines.insert(0, [(opening, "opening")])
        else:
            lines[0] = [(opening + " ", "opening"), *lines[0]]
    if "closing" in on:
        lines.append([(rng.choice(PHRASES["closing", choice]), "closing")])
    return _assemble(row, lines)


def _replace(lines: list[list[_Piece]], on: set[str], rng: random.Random) -> None:
    """Plant the kinds that take the place of something; each in a line of its own."""
    free = list(range(max(1, len(lines) - 1)))
    for kind, pattern in (("wrong", r"\d+"), ("shuffled", r"\S+(?:\s+\S+){4,}"), ("typo", r"[A-Za-z]{4,}")):
        found = [(i, m) for i in free for m in re.finditer(pattern, lines[i][0][0])]
        if kind not in on or not found:
            continue
        index, match = rng.choice(found)
        free.remove(index)
        text = match.string
        lines[index] = [
            (text[: match.start()], None),
            (_corrupt(kind, match.group(), rng), kind),
            (text[match.end() :], None),
        ]


def _corrupt(kind: str, text: str, rng: random.Random) -> str:
    if kind == "wrong":
        low = 10 ** (len(text) - 1) if len(text) > 1 else 0
        other = rng.randrange(low, 10 ** len(text) - 1)
        return str(other + (other >= int(text)))
    if kind == "shuffled":
        words = text.split()
        while " ".join(words) == text:
            rng.shuffle(words)
        return " ".join(words)
    at = rng.randrange(1, len(text) - 1)
    swapped = text[at + 1] + text[at] if text[at] != text[at + 1] else ""
    return (
        text[:at] + rng.choice((swapped, text[at + 1], rng.choice("qxzjvk") + text[at + 1])) + text[at + 2 :]
    )


def _insert(lines: list[list[_Piece]], kind: str, text: str, joiner: str, rng: random.Random) -> None:
    """After one of the sentences but the last: as a line of its own, or at the end of that line."""
    at = rng.randint(1, max(1, len(lines) - 1))
    if rng.random() < 0.5 or joiner == " ":
        lines.insert(at, [(text, kind)])
    else:
        lines[at - 1] = [*lines[at - 1], (" " + text, kind)]


def _assemble(row: Row, lines: Sequence[Sequence[_Piece]]) -> Example:
    text, spans = "", []
    for number, line in enumerate(lines):
        text += row.joiner if number else ""
        for piece, kind in line:
            if kind:
                spans.append(Span(len(text), len(text) + len(piece), kind))
            text += piece
    return Example(row, text, tuple(spans))
