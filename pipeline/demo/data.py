"""The demo's instruction set: computed answers, with noise planted at known places.

Eight task families (word problems, sorting, reversing, counting letters, units, weekdays, comparing, capitals); some
rows have several turns. The answers contain three kinds of noise: an empty opening phrase, a filler sentence between
two sentences, and one value replaced by a wrong one.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from sstoken.pipeline.demo.tasks import FAMILIES, Task

Kind = Literal["boilerplate", "filler", "wrong"]
KINDS: tuple[Kind, ...] = ("boilerplate", "filler", "wrong")

BOILERPLATE_SHARE = 0.35
"""Share of assistant turns that open with boilerplate."""
FILLER_SHARE = 0.35
"""Share of assistant turns with a filler sentence."""
WRONG_SHARE = 0.25
"""Share of assistant turns with one wrong value."""
MULTI_TURN_SHARE = 0.2
SYSTEM_SHARE = 0.15

BOILERPLATE = (
    "Certainly! I'd be happy to help with that.",
    "Of course! Here is the answer you asked for.",
    "Great question! Let me explain this for you.",
    "Sure, I can definitely assist you with this.",
    "Absolutely! Thank you for asking me about this.",
    "Thanks for reaching out! Let's take a look together.",
    "As a helpful assistant, I am glad to answer this.",
    "What an interesting problem! Let's dive right in.",
)
FILLER = (
    "It is always important to be careful with each step.",
    "There are of course many different ways to look at this.",
    "This is something that many people find quite interesting.",
    "Keep in mind that practice makes perfect.",
    "As you can see, this is not very complicated.",
    "It is worth noting that details matter here.",
    "Let us continue and see where this takes us.",
    "I hope that everything has been clear so far.",
    "Taking a moment to think is never a bad idea.",
    "Needless to say, this kind of thing comes up often.",
)
FOLLOW_UPS = ("Thanks! ", "Good. Next one: ", "I see. And this: ", "")
SYSTEMS = (
    "You are a careful assistant. Show your work.",
    "Answer step by step.",
    "You help pupils with their homework.",
)


class Noise(NamedTuple):
    """A span of planted noise: characters [start, end) of the content of message number `message`."""

    message: int
    start: int
    end: int
    kind: Kind
    clean: str
    """The right text: the true value, or empty if text was inserted."""


@dataclass(frozen=True)
class DemoExample:
    """One row, with its noise and right answers, which the pipeline never sees."""

    example_id: str
    messages: tuple[dict[str, str], ...]
    noise: tuple[Noise, ...]
    answers: tuple[str, ...]
    """The right answer of each assistant turn, as in its last sentence."""


class _Piece(NamedTuple):
    text: str
    kind: Kind | None = None
    clean: str = ""


def generate(num_examples: int, seed: int) -> Iterator[DemoExample]:
    """Generate the first `num_examples` rows of the sequence that `seed` determines."""
    rng = random.Random(seed)
    for index in range(num_examples):
        yield _example(f"demo-{index:05d}", rng)


def write_jsonl(path: Path, examples: Iterable[DemoExample]) -> None:
    """Write the pipeline's input: one `{"example_id", "messages"}` per line, without any trace of the noise."""
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps({"example_id": example.example_id, "messages": example.messages}) + "\n")


def write_noise(path: Path, examples: Iterable[DemoExample]) -> None:
    """Write what was planted: one `{"example_id", "noise"}` per line."""
    with open(path, "w", encoding="utf-8") as file:
        for example in examples:
            spans = [span._asdict() for span in example.noise]
            file.write(json.dumps({"example_id": example.example_id, "noise": spans}) + "\n")


def _example(example_id: str, rng: random.Random) -> DemoExample:
    turns = rng.choice((2, 2, 3)) if rng.random() < MULTI_TURN_SHARE else 1
    messages: list[dict[str, str]] = []
    noise: list[Noise] = []
    answers: list[str] = []
    if rng.random() < SYSTEM_SHARE:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    for turn in range(turns):
        task = rng.choice(FAMILIES)(rng)
        lead = rng.choice(FOLLOW_UPS) if turn else ""
        messages.append({"role": "user", "content": lead + task.question})
        text = ""
        for piece in _answer(task, rng):
            if piece.kind:
                end = len(text) + len(piece.text)
                noise.append(Noise(len(messages), len(text), end, piece.kind, piece.clean))
            text += piece.text
        messages.append({"role": "assistant", "content": text})
        answers.append(task.answer)
    return DemoExample(example_id, tuple(messages), tuple(noise), tuple(answers))


def _answer(task: Task, rng: random.Random) -> list[_Piece]:
    """Return the response in pieces. Inserted text includes its separating space, so removing it leaves no trace."""
    sentences = [[_Piece(s if i == 0 else " " + s)] for i, s in enumerate(task.sentences)]
    if rng.random() < WRONG_SHARE:
        index, match = rng.choice(_values(task, [s[0].text for s in sentences]))
        before, right, after = match.string[: match.start()], match.group(), match.string[match.end() :]
        wrong = _other_number(right, rng) if right.isdigit() else rng.choice(task.wrong_answers)
        sentences[index] = [_Piece(before), _Piece(wrong, "wrong", right), _Piece(after)]
    if rng.random() < FILLER_SHARE:
        sentences.insert(rng.randrange(1, len(sentences)), [_Piece(" " + rng.choice(FILLER), "filler")])
    if rng.random() < BOILERPLATE_SHARE:
        sentences.insert(0, [_Piece(rng.choice(BOILERPLATE) + " ", "boilerplate")])
    return [piece for sentence in sentences for piece in sentence]


def _values(task: Task, sentences: list[str]) -> list[tuple[int, re.Match[str]]]:
    """Find the values that can be falsified: every number and every mention of the answer."""
    pattern = rf"\b(?:{re.escape(task.answer)}|\d+)\b" if task.wrong_answers else r"\b\d+\b"
    return [(i, match) for i, s in enumerate(sentences) for match in re.finditer(pattern, s)]


def _other_number(number: str, rng: random.Random) -> str:
    """Return another number with the same number of digits, so that its length does not give it away."""
    low = 10 ** (len(number) - 1)
    other = rng.randrange(low, 10 * low - 1)
    return str(other + (other >= int(number)))
