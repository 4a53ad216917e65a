"""What looks harmful about a mask, from what its tokens say."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sstoken.selection import num_kept
from sstoken.stages.selecting.harm import COUNTS, FEWEST, harm_notes, harm_stats
from sstoken.stages.selecting.text import ResponseText

NO_DEADLINE = settings(deadline=None, max_examples=60)
PIECES = ("a", "word", "7", "12", ".", ",", "!", " ")
WORD, SEVEN, TWELVE, DOT = 1, 2, 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose tokens are those of `PIECES`."""
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    core.decoder = decoders.Fuse()
    place = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(place)
    return place


def slow(ids: list[int], turns: list[int], kept: list[bool]) -> dict[str, int]:
    """As many examples as turns."""
    share = sum(kept) / len(kept) if kept else 0
    found = dict.fromkeys(
        ("content", "content_kept", "content_in_prefix", "result_digits", "result_digits_kept", "turns_with_number"), 0
    )  # fmt: skip
    for a, b in pairwise(turns):
        end = a + (num_kept(b - a, share) if share else 0)
        for i in range(a, b):
            if PIECES[ids[i]].isalnum():
                found["content"] += 1
                found["content_kept"] += kept[i]
                found["content_in_prefix"] += i < end
        last = [i for i in range(a, b) if PIECES[ids[i]].isdigit()][-1:]
        found["turns_with_number"] += len(last)
        while last and last[0] > a and PIECES[ids[last[0] - 1]].isdigit():
            last.insert(0, last[0] - 1)
        found["result_digits"] += len(last)
        found["result_digits_kept"] += sum(kept[i] for i in last)
    return found


@NO_DEADLINE
@given(st.lists(st.lists(st.tuples(st.integers(0, len(PIECES) - 1), st.booleans()), max_size=12), max_size=5))
def test_counts_equal_a_slow_reference(folder: Path, drawn: list[list[tuple[int, bool]]]) -> None:
    flat = [pair for turn in drawn for pair in turn]
    turns = np.cumsum([0, *(len(turn) for turn in drawn)]).astype(np.int64)
    ids = np.array([i for i, _ in flat], dtype=np.int32)
    kept = np.array([k for _, k in flat], dtype=bool)
    found = harm_stats(ResponseText(ids, turns, folder), kept, turns)
    assert found == slow(ids.tolist(), turns.tolist(), kept.tolist())


def notes(folder: Path, answer: list[int], kept: list[bool], number: int = FEWEST) -> list[str]:
    """On a number of equal answers, in two shards."""
    stats = []
    for _ in range(2):
        turns = np.arange(number + 1, dtype=np.int64) * len(answer)
        text = ResponseText(np.tile(np.array(answer, dtype=np.int32), number), turns, folder)
        stats.append({**harm_stats(text, np.tile(kept, number), turns), "turns": number})
    return harm_notes(stats)


def test_a_mask_that_keeps_punctuation_is_named(folder: Path) -> None:
    [line] = notes(folder, [WORD, WORD, DOT, DOT], [False, False, True, True])
    assert line.startswith("0.0% of the words and numbers are kept")
    assert "would keep 100.0%" in line
    assert notes(folder, [WORD, WORD, DOT, DOT], [True, False, True, False]) != []
    assert notes(folder, [WORD, WORD, DOT, DOT], [True, True, False, False]) == []


def test_dropped_results_are_named(folder: Path) -> None:
    answer = [WORD, SEVEN, WORD, TWELVE, SEVEN]
    line = notes(folder, answer, [True, True, True, False, False])[-1]
    assert line.startswith(
        f"{4 * FEWEST} of the {4 * FEWEST} tokens of the answers' last numbers are dropped"
    )
    assert not any("last numbers" in line for line in notes(folder, answer, [True, False, True, True, False]))


@pytest.mark.parametrize(("turns", "digits", "said"), [(1, 1, True), (3, 1, False), (1, 0.5, False)])
def test_few_numbers_are_no_results(turns: int, digits: float, said: bool) -> None:
    counts = dict.fromkeys(COUNTS, 0) | {"turns_with_number": FEWEST, "result_digits": int(digits * FEWEST)}
    assert bool(harm_notes([counts | {"turns": turns * FEWEST}])) == said


def test_without_a_quick_tokenizer_nothing_is_counted(tmp_path: Path) -> None:
    text = ResponseText(np.zeros(3, dtype=np.int32), np.array([0, 3]), tmp_path)
    assert harm_stats(text, np.ones(3, dtype=bool), np.array([0, 3])) == {}
    assert harm_notes([{"turns": 1}]) == []
