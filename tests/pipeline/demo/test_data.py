"""The demo's data says what it says: every span is where it is said to be, every answer is right without them."""

import itertools
import json
import re
from collections import Counter

import pytest

from sstoken.pipeline.demo.data import (
    BOILERPLATE,
    FILLER,
    KINDS,
    DemoExample,
    generate,
    write_jsonl,
    write_noise,
)

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
PER_UNIT = {
    ("hours", "minutes"): 60, ("minutes", "seconds"): 60, ("days", "hours"): 24, ("weeks", "days"): 7,
    ("feet", "inches"): 12, ("yards", "feet"): 3, ("meters", "centimeters"): 100,
    ("kilometers", "meters"): 1000, ("kilograms", "grams"): 1000, ("years", "months"): 12,
}  # fmt: skip
SOME_CAPITALS = {
    "France": "Paris",
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "Nepal": "Kathmandu",
    "Canada": "Ottawa",
}


@pytest.fixture(scope="module")
def examples() -> list[DemoExample]:
    return list(generate(3000, seed=1))


def solve(question: str) -> str | None:
    """The answer, worked out from the question's text alone; None for a capital that is not known here."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if "bags with" in question:
        return str(numbers[0] + numbers[1] * numbers[2])
    if "Sort these" in question:
        return ", ".join(map(str, sorted(numbers, reverse="from largest" in question)))
    if found := re.search(r"the word (\w+) backwards", question):
        return "".join(reversed(found[1]))
    if found := re.search(r"the letter (\w) appear in the word (\w+)", question):
        count = Counter(found[2])[found[1]]
        return "1 time" if count == 1 else f"{count} times"
    if found := re.search(r"Convert \d+ (\w+) to (\w+)", question):
        return str(numbers[0] * PER_UNIT[found[1], found[2]])
    if found := re.search(r"Today is (\w+)", question):
        return DAYS[(DAYS.index(found[1]) + numbers[0]) % 7]
    if "larger" in question:
        a, b, c, d = numbers
        assert a * b != c * d
        return f"{a} x {b}" if a * b > c * d else f"{c} x {d}"
    found = re.search(r"the capital of ([A-Z]\w+)", question)
    assert found, question
    return SOME_CAPITALS.get(found[1])


def clean_messages(example):
    """The messages with the noise removed and the right values restored."""
    contents = [m["content"] for m in example.messages]
    for span in sorted(example.noise, key=lambda s: s.start, reverse=True):
        text = contents[span.message]
        contents[span.message] = text[: span.start] + span.clean + text[span.end :]
    return [{**m, "content": c} for m, c in zip(example.messages, contents, strict=True)]


def test_without_noise_every_answer_is_right(examples: list[DemoExample]) -> None:
    for example in examples:
        messages = [m for m in clean_messages(example) if m["role"] != "system"]
        for question, response, answer in zip(messages[::2], messages[1::2], example.answers, strict=True):
            assert (question["role"], response["role"]) == ("user", "assistant")
            assert solve(question["content"]) in (answer, None)
            last_sentence = re.split(r"(?<=\.) ", response["content"])[-1]
            assert re.search(rf"\b{re.escape(answer)}\b", last_sentence), (question, response)


def test_without_noise_every_equation_holds(examples: list[DemoExample]) -> None:
    equations = 0
    for example in examples:
        for message in clean_messages(example):
            for left, right in re.findall(
                r"(\d+(?: [x+] \d+)+) = (\d+(?: x \d+ \+ \d+)?)", message["content"]
            ):
                assert eval(left.replace("x", "*")) == eval(right.replace("x", "*"))
                equations += 1
            for left, right in re.findall(r"(\d+) = (\d+ x 7 \+ \d)\.", message["content"]):
                assert int(left) == eval(right.replace("x", "*"))
                equations += 1
    assert equations > 1000


def test_spans_hold_what_was_planted(examples: list[DemoExample]) -> None:
    for example in examples:
        for span in example.noise:
            message = example.messages[span.message]
            text = message["content"][span.start : span.end]
            assert message["role"] == "assistant"
            if span.kind == "wrong":
                assert text
                assert text == text.strip()
                assert text != span.clean
                assert len(text) == len(span.clean) or not text.isdigit()
            else:
                assert span.clean == ""
                assert text.strip() in (BOILERPLATE if span.kind == "boilerplate" else FILLER)
                assert (span.start == 0) == (span.kind == "boilerplate")


def test_spans_do_not_overlap_and_no_noise_hides_outside_them(examples: list[DemoExample]) -> None:
    for example in examples:
        spans = sorted(example.noise)
        for one, other in itertools.pairwise(spans):
            assert one.message < other.message or one.end <= other.start
        text = " ".join(m["content"] for m in clean_messages(example))
        assert not any(sentence in text for sentence in (*BOILERPLATE, *FILLER))
        assert "  " not in text


def test_mixture(examples: list[DemoExample]) -> None:
    turns = sum(len(e.answers) for e in examples)
    planted = Counter(span.kind for e in examples for span in e.noise)
    assert planted["boilerplate"] / turns == pytest.approx(0.35, abs=0.03)
    assert planted["filler"] / turns == pytest.approx(0.35, abs=0.03)
    assert planted["wrong"] / turns == pytest.approx(0.25, abs=0.03)
    assert sum(len(e.answers) > 1 for e in examples) / len(examples) == pytest.approx(0.2, abs=0.03)
    assert any(not e.noise for e in examples)
    assert set(planted) == set(KINDS)


def test_seed_determines_everything() -> None:
    assert list(generate(50, 3)) == list(generate(80, 3))[:50]
    assert list(generate(50, 3)) != list(generate(50, 4))


def test_the_pipeline_sees_no_noise(tmp_path) -> None:
    examples = list(generate(20, 0))
    write_jsonl(tmp_path / "data.jsonl", examples)
    write_noise(tmp_path / "noise.jsonl", examples)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    noise = [json.loads(line) for line in (tmp_path / "noise.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"example_id", "messages"}] * 20
    assert [row["messages"] for row in rows] == [list(e.messages) for e in examples]
    assert [row["noise"] for row in noise] == [[s._asdict() for s in e.noise] for e in examples]
