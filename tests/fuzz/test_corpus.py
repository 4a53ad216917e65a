"""Valid files of every kind, their mutations, and what fuzzing has once found: read, or refused in one line."""

import random
from pathlib import Path

import pytest

from tests.fuzz.targets import CORPUS, TARGETS, seeds

MUTATIONS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    seeds(folder)
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_but_a_line(target: str, folder: Path) -> None:
    files = [*(folder / target).iterdir(), *(CORPUS / target).glob("*")]
    assert files
    chance = random.Random(target)
    for file in sorted(files):
        content = file.read_bytes()
        TARGETS[target](content)
        for _ in range(MUTATIONS if content else 0):
            changed = bytearray(content)
            for _ in range(chance.choice([1, 1, 3])):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            TARGETS[target](
                bytes(changed[: chance.choice([len(changed), chance.randrange(len(changed)) + 1])])
            )
