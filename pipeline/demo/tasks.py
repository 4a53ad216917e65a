"""The demo's task families: a question, a short explanation and its known answer."""

import random
from collections.abc import Callable
from typing import NamedTuple

NAMES = ("Ada", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Lena", "Omar")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "stamps", "stickers", "shells")
_WORDS = (
    "anchor basket bridge button candle carpet castle cheese circle coffee dinner dragon engine finger "
    "flower forest garden guitar hammer harbor island jacket kitchen ladder lemon letter market meadow "
    "mirror monkey morning mountain needle number orange painter parrot pebble pencil pepper pillow planet "
    "pocket rabbit river rocket saddle school season silver spider spring summer table teacher ticket "
    "tomato tunnel turtle valley velvet village violin window winter yellow"
)
WORDS = tuple(_WORDS.split())
UNITS = (
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
    ("feet", "inches", 12), ("yards", "feet", 3), ("meters", "centimeters", 100),
    ("kilometers", "meters", 1000), ("kilograms", "grams", 1000), ("years", "months", 12),
)  # fmt: skip
SINGULAR = {"feet": "foot"} | {u: u[:-1] for u, _, _ in UNITS if u != "feet"}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CAPITALS = (
    ("Argentina", "Buenos Aires", "South America"), ("Austria", "Vienna", "Europe"),
    ("Canada", "Ottawa", "North America"), ("Chile", "Santiago", "South America"),
    ("China", "Beijing", "Asia"), ("Colombia", "Bogota", "South America"),
    ("Cuba", "Havana", "North America"), ("Denmark", "Copenhagen", "Europe"),
    ("Egypt", "Cairo", "Africa"), ("Finland", "Helsinki", "Europe"), ("France", "Paris", "Europe"),
    ("Ghana", "Accra", "Africa"), ("Greece", "Athens", "Europe"), ("Hungary", "Budapest", "Europe"),
    ("India", "New Delhi", "Asia"), ("Ireland", "Dublin", "Europe"), ("Italy", "Rome", "Europe"),
    ("Japan", "Tokyo", "Asia"), ("Kenya", "Nairobi", "Africa"), ("Morocco", "Rabat", "Africa"),
    ("Nepal", "Kathmandu", "Asia"), ("Norway", "Oslo", "Europe"), ("Peru", "Lima", "South America"),
    ("Poland", "Warsaw", "Europe"), ("Portugal", "Lisbon", "Europe"), ("Senegal", "Dakar", "Africa"),
    ("Spain", "Madrid", "Europe"), ("Sweden", "Stockholm", "Europe"), ("Thailand", "Bangkok", "Asia"),
    ("Vietnam", "Hanoi", "Asia"),
)  # fmt: skip


class Task(NamedTuple):
    """A question with a worked answer."""

    question: str
    sentences: list[str]
    """The explanation, at least two sentences; the last one states the answer."""
    answer: str
    wrong_answers: tuple[str, ...] = ()
    """Plausible wrong words to replace it; numbers need none."""


def _bags(rng: random.Random) -> Task:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    start, bags, each = rng.randint(3, 60), rng.randint(2, 9), rng.randint(2, 9)
    bought, total = bags * each, start + bags * each
    return Task(
        f"{name} has {start} {item} and buys {bags} bags with {each} {item} in each. "
        f"How many {item} does {name} have now?",
        [
            f"{name} starts with {start} {item}.",
            f"The bags hold {bags} x {each} = {bought} {item}.",
            f"Adding them gives {start} + {bought} = {total}.",
            f"{rng.choice(('So', 'Therefore'))} {name} now has {total} {item}.",
        ],
        str(total),
    )


def _sort(rng: random.Random) -> Task:
    numbers = rng.sample(range(10, 100), rng.randint(4, 6))
    down = rng.random() < 0.5
    ordered = sorted(numbers, reverse=down)
    listed = ", ".join(map(str, ordered))
    first, last = ("largest", "smallest") if down else ("smallest", "largest")
    return Task(
        f"Sort these numbers from {first} to {last}: {', '.join(map(str, numbers))}.",
        [
            f"There are {len(numbers)} numbers to put in order.",
            f"The {first} one is {ordered[0]} and the {last} one is {ordered[-1]}.",
            f"The sorted list is {listed}.",
        ],
        listed,
    )


def _reverse(rng: random.Random) -> Task:
    word = rng.choice(WORDS)
    answer = word[::-1]
    swaps = {answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :] for i in range(len(word) - 1)}
    return Task(
        f"Write the word {word} backwards.",
        [
            f"The word {word} has {len(word)} letters, which are {'-'.join(word)}.",
            f"Read from the end to the start, they are {'-'.join(answer)}.",
            f"{rng.choice(('So', 'Put together,'))} the word {word} backwards is {answer}.",
        ],
        answer,
        tuple(sorted(swaps - {answer})),
    )


def _count_letters(rng: random.Random) -> Task:
    word = rng.choice(WORDS)
    letter = rng.choice(word)
    at = [str(i) for i, c in enumerate(word, 1) if c == letter]
    places = f"place {at[0]}" if len(at) == 1 else f"places {', '.join(at[:-1])} and {at[-1]}"
    times = f"{len(at)} time{'s' if len(at) > 1 else ''}"
    return Task(
        f"How many times does the letter {letter} appear in the word {word}?",
        [
            f"Spelled out, the word {word} is {'-'.join(word)}.",
            f"The letter {letter} stands at {places}.",
            f"{rng.choice(('So', 'Therefore'))} the letter {letter} appears {times}.",
        ],
        times,
    )


def _convert(rng: random.Random) -> Task:
    unit, smaller, factor = rng.choice(UNITS)
    amount = rng.randint(2, 40)
    return Task(
        f"Convert {amount} {unit} to {smaller}.",
        [
            f"One {SINGULAR[unit]} is the same as {factor} {smaller}.",
            f"To convert, multiply: {amount} x {factor} = {amount * factor}.",
            f"{rng.choice(('So', 'This means that'))} {amount} {unit} are {amount * factor} {smaller}.",
        ],
        str(amount * factor),
    )


def _weekday(rng: random.Random) -> Task:
    start, ahead = rng.randrange(7), rng.randint(8, 60)
    weeks, rest = divmod(ahead, 7)
    answer = DAYS[(start + ahead) % 7]
    return Task(
        f"Today is {DAYS[start]}. What day of the week will it be in {ahead} days?",
        [
            f"A week has 7 days, and {ahead} = {weeks} x 7 + {rest}.",
            f"Full weeks change nothing, so count {rest} ahead from {DAYS[start]}.",
            f"{rng.choice(('In', 'After'))} {ahead} days it will be {answer}.",
        ],
        answer,
        tuple(d for d in DAYS if d != answer),
    )


def _compare(rng: random.Random) -> Task:
    a, b, c, d = (rng.randint(2, 19) for _ in range(4))
    if a * b == c * d:
        b += 1
    most, least = sorted((a * b, c * d), reverse=True)
    answer, other = f"{a} x {b}", f"{c} x {d}"
    if c * d == most:
        answer, other = other, answer
    return Task(
        f"Which is larger, {a} x {b} or {c} x {d}?",
        [
            f"The first product is {a} x {b} = {a * b}.",
            f"The second one is {c} x {d} = {c * d}.",
            f"Since {most} is more than {least}, the larger one is {answer}.",
        ],
        answer,
        (other,),
    )


def _capital(rng: random.Random) -> Task:
    country, capital, continent = rng.choice(CAPITALS)
    return Task(
        rng.choice(("What is the capital of {}?", "Tell me the capital of {}.")).format(country),
        [
            f"{country} is a country in {continent}.",
            f"Its government has its seat in {capital}.",
            f"{rng.choice(('So', 'Therefore'))} the capital of {country} is {capital}.",
        ],
        capital,
        tuple(c for _, c, _ in CAPITALS if c != capital),
    )


FAMILIES: tuple[Callable[[random.Random], Task], ...] = (
    _bags, _sort, _reverse, _count_letters, _convert, _weekday, _compare, _capital,
)  # fmt: skip
