"""What training records of each example is read back as it was written, or refused."""

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from sstoken.errors import SstokenError
from sstoken.in_loop.observation import Observation
from sstoken.stages.training.observed_losses import ObservedLosses, SeenExamples

PLACES = 300


def observation(number: int, step: int = 1) -> Observation:
    ids = np.arange(number, number + 40)
    values = np.linspace(0, 1, 40, dtype=np.float32) * (number + step)
    mask = ids % 2 == 0
    return Observation(step, ids, mask, mask, values, values / 100)


EXAMPLES = [observation(number) for number in range(30)]


def read(folder: Path) -> list[tuple[int, bytes, bytes] | None]:
    """Step, losses and attention of each example."""
    found: list[tuple[int, bytes, bytes] | None] = []
    with SeenExamples(folder) as examples:
        for each in EXAMPLES:
            seen = examples.last(each.key)
            if seen is not None:
                assert seen.attention is not None
            found.append(None if seen is None else (seen.step, seen.loss.tobytes(), seen.attention.tobytes()))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    record = ObservedLosses(tmp_path / "seen")
    for each in EXAMPLES:
        record(each)
    return tmp_path / "seen"


def test_a_bit_changed_in_a_recording_is_never_silent(folder: Path) -> None:
    (file,) = folder.glob("*.sqlite")
    content, expected = file.read_bytes(), read(folder)
    assert None not in expected
    chance, errors = random.Random(0), []
    for _ in range(PLACES):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        try:
            found = read(folder)
        except SstokenError as error:
            errors.append(str(error))
        else:
            assert found == expected
    assert len(errors) > PLACES // 4
    assert all(error.startswith(f"{file}: damaged (") and "\n" not in error for error in errors)


def test_a_recording_of_an_older_version_is_read_and_continued(tmp_path: Path) -> None:
    first, *others = EXAMPLES
    with closing(sqlite3.connect(tmp_path / "observed-0.sqlite", isolation_level=None)) as database:
        database.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, step INT, loss BLOB, attention BLOB)")
        row = (first.key, first.step, first.loss.tobytes(), first.loss.tobytes())
        database.execute("INSERT INTO seen VALUES (?, ?, ?, ?)", row)
    assert read(tmp_path) == [row[1:], *([None] * len(others))]
    record = ObservedLosses(tmp_path, resume=True)
    for each in others:
        record(each)
    assert None not in read(tmp_path)
