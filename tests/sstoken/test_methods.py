"""Methods: their formulas on small numbers, and what they refuse."""

import numpy as np
import pytest

from sstoken.errors import UsageError
from sstoken.methods import METHODS, Signals, get_method

SIGNALS = Signals(
    offsets=np.array([0, 3, 5]),
    history_loss=np.array([3.0, 2.0, 1.0, 4.0, 4.0]),
    current_loss=np.array([1.0, 1.5, 2.0, 1.0, 1.0]),
    attention=np.array([0.1, 0.4, 0.3, 0.2, 0.6]),
)


def test_rel_is_history_minus_current():
    np.testing.assert_allclose(SIGNALS.rel, [2.0, 0.5, -1.0, 3.0, 3.0])


def test_sstoken_by_hand():
    # min-max of REL: example 0 spans -1 to 2, example 1 is constant.
    expected = [0.3 * 1 + 0.7 * 0.1, 0.3 * 0.5 + 0.7 * 0.4, 0.7 * 0.3, 0.7 * 0.2, 0.7 * 0.6]
    np.testing.assert_allclose(METHODS["sstoken"].score(SIGNALS, 0.3), expected, atol=1e-8)


@pytest.mark.parametrize(("gamma", "alone"), [(1.0, "rel"), (0.0, "attention")])
def test_the_ends_of_gamma_rank_like_one_signal(gamma, alone):
    both = METHODS["sstoken"].score(SIGNALS, gamma)
    single = METHODS[alone].score(SIGNALS, gamma)
    for a, b in ((0, 3), (3, 5)):
        np.testing.assert_array_equal(
            np.argsort(-both[a:b], kind="stable"), np.argsort(-single[a:b], kind="stable")
        )


def test_random_is_seeded():
    offsets = np.array([0, 100])
    draw = METHODS["random"].score
    first = draw(Signals(offsets, seed=(1, 0)), 0.5)
    np.testing.assert_array_equal(first, draw(Signals(offsets, seed=(1, 0)), 0.5))
    assert (first != draw(Signals(offsets, seed=(1, 1)), 0.5)).any()
    assert (first != draw(Signals(offsets, seed=(2, 0)), 0.5)).any()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_needs_exactly_the_signals_it_names(name):
    method = METHODS[name]
    given = {signal: getattr(SIGNALS, signal) for signal in method.signals}
    assert method.score(Signals(SIGNALS.offsets, **given), 0.5).shape == (5,)
    for signal in method.signals:
        fewer = {k: v for k, v in given.items() if k != signal}
        with pytest.raises(UsageError, match="missing"):
            method.score(Signals(SIGNALS.offsets, **fewer), 0.5)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'ssotken' is not known; legal: sstoken, rel"):
        get_method("ssotken")
