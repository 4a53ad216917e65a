"""The benchmark's questions: GSM8K, and the demo's task families, whose answers are computed."""

import json
import random
import re
from functools import cache
from pathlib import Path

from benchmarks.quality.planting import Row
from sstoken.pipeline.demo.tasks import FAMILIES

SHARED = Path(__file__).parents[3] / "shared"
"""Data and small models; not part of the repository."""
NUM_TRAIN = {"gsm8k": 7473, "families": 1_000_000}


@cache
def gsm8k(split: str) -> tuple[Row, ...]:
    """All of a split (`train` or `test`), without the calculator's notes."""
    rows = []
    with open(SHARED / "data" / "gsm8k" / f"{split}.jsonl", encoding="utf-8") as file:
        for number, line in enumerate(file):
            row = json.loads(line)
            sentences = tuple(re.sub(r"<<.*?>>", "", row["answer"]).split("\n"))
            result = sentences[-1].removeprefix("#### ")
            rows.append(Row(f"gsm8k-{split}-{number}", row["question"], sentences, result))
    return tuple(rows)


@cache
def families(split: str, number: int, seed: int) -> tuple[Row, ...]:
    """Generated tasks. Questions of `test` never occur in `train`: they are told apart by their text's hash."""
    rng = random.Random(f"{split}-{seed}")
    rows: list[Row] = []
    while len(rows) < number:
        task = rng.choice(FAMILIES)(rng)
        held_out = sum(task.question.encode()) % 8 == 0
        if held_out == (split == "test"):
            row_id = f"families-{split}-{seed}-{len(rows)}"
            rows.append(Row(row_id, task.question, tuple(task.sentences), task.answer, joiner=" "))
    return tuple(rows)


def draw(name: str, split: str, number: int, seed: int) -> list[Row]:
    """`number` rows of a data set; another seed draws others (of `test`: always the same)."""
    if name == "families":
        return list(families(split, number, seed if split == "train" else 0))
    rows = list(gsm8k(split))
    random.Random(seed if split == "train" else 0).shuffle(rows)
    return rows[:number]


@cache
def roleplay(number: int) -> tuple[Row, ...]:
    """Another kind of data, to see what is forgotten."""
    rows = json.loads((SHARED / "data" / "roleplay.json").read_text(encoding="utf-8"))
    random.Random(0).shuffle(rows)
    found = []
    for index, row in enumerate(rows[:number]):
        question = "\n\n".join(text for text in (row["instruction"], row["input"]) if text)
        found.append(Row(f"roleplay-{index}", question, (row["response"],), ""))
    return tuple(found)


def plain_texts(number: int) -> list[str]:
    """English that no chat template surrounds: GSM8K's held-out questions."""
    return [row.question for row in gsm8k("test")[:number]]
