"""pmi-band: by hand, against a slow reference, the same bits on numpy and torch, whatever stands beside."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sstoken.methods.instruction import pmi_band, window_mean

NO_DEADLINE = settings(deadline=None, max_examples=50)


@st.composite
def examples(draw):
    """Losses, unconditional losses (NaN at each example's first token) and offsets of some examples."""
    counts = draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    loss, alone = rng.exponential(2.0, offsets[-1]), rng.exponential(3.0, offsets[-1])
    alone[offsets[:-1][np.array(counts) > 0]] = np.nan
    return loss, alone, offsets


def slow(loss, alone, offsets, window=4, clip=2.0, level=1.0, weight=0.5):
    scores = []
    for a, b in zip(offsets[:-1], offsets[1:], strict=True):
        for i in range(a, b):
            near = range(max(a, i - window), min(b, i + window + 1))
            gains = [0.0 if np.isnan(alone[j]) else min(max(alone[j] - loss[j], -clip), clip) for j in near]
            mean_loss = sum(min(loss[j], 8.0) for j in near) / len(near)
            scores.append(sum(gains) / len(near) - weight * abs(mean_loss - level))
    return np.array(scores)


@NO_DEADLINE
@given(examples())
def test_matches_a_slow_reference(drawn):
    np.testing.assert_allclose(pmi_band(*drawn), slow(*drawn), atol=1e-12)


@NO_DEADLINE
@given(examples())
def test_numpy_and_torch_agree_to_the_last_bit(drawn):
    loss, alone, offsets = drawn
    tensors = pmi_band(torch.from_numpy(loss), torch.from_numpy(alone), offsets)
    np.testing.assert_array_equal(tensors.numpy(), pmi_band(loss, alone, offsets))


@NO_DEADLINE
@given(examples())
def test_an_example_scores_the_same_alone(drawn):
    loss, alone, offsets = drawn
    together = pmi_band(loss, alone, offsets)
    for a, b in zip(offsets[:-1], offsets[1:], strict=True):
        own = pmi_band(loss[a:b], alone[a:b], np.array([0, b - a]))
        np.testing.assert_array_equal(own, together[a:b])


def test_the_inputs_stay_as_they_are():
    loss, alone = np.array([1.0, 9.0]), np.array([np.nan, 3.0])
    pmi_band(loss, alone, np.array([0, 2]))
    np.testing.assert_array_equal(loss, [1.0, 9.0])
    np.testing.assert_array_equal(alone, [np.nan, 3.0])


@pytest.mark.parametrize(
    ("kind", "loss", "alone"),
    [
        ("a stock phrase: the prompt gains nothing", 1.0, 1.0),
        ("broken text: nothing makes it likely", 6.0, 8.0),
        ("a copy: certain with and without the prompt", 0.0, 0.0),
    ],
)
def test_noise_ranks_below_what_the_prompt_explains(kind, loss, alone):
    losses = np.r_[np.full(20, 1.0), np.full(20, loss)]
    unconditional = np.r_[np.full(20, 2.5), np.full(20, alone)]
    scores = pmi_band(losses, unconditional, np.array([0, 40]))
    assert scores[4:16].min() > scores[24:].max(), kind


def test_window_mean_stays_within_the_example():
    means = window_mean(np.array([1.0, 3.0, 100.0]), np.array([0, 2, 3]), 4)
    np.testing.assert_allclose(means, [2.0, 2.0, 100.0])
