"""The registry of signals: names are parsed, ordered and refused in one line."""

import pytest

from sstoken.errors import UsageError
from sstoken.signals import SIGNALS, get_signal, get_signals, is_signal


@pytest.mark.parametrize(
    ("name", "layer", "argument"),
    [
        ("loss", None, None),
        ("attention", None, None),
        ("attention@-1", -1, "-1"),
        ("attention@12", 12, "12"),
        ("attention_predicting@3", 3, "3"),
        ("kl@Qwen3-0.6B", None, "Qwen3-0.6B"),
        ("pmi_noisy@30", None, "30"),
    ],
)
def test_a_name_with_its_argument(name, layer, argument):
    signal = get_signal(name)
    assert (signal.name, signal.layer, signal.argument) == (name, layer, argument)
    assert "ARG" not in signal.meaning
    assert is_signal(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("los", "signal 'los' is not known; legal: loss, entropy,"),
        ("entrpy", "critical; did you mean 'entropy'?"),
        ("loss@3", "loss takes nothing after '@'; write loss"),
        ("attention@last", "'last' is not a layer; write it as in attention@-1"),
        ("attention@", "'' is not a layer"),
        ("attention@01", "'01' is not a layer"),
        ("kl", "signal 'kl' needs a checkpoint: kl@CHECKPOINT"),
        ("kl@a/b", "'a/b' is not a checkpoint"),
        ("pmi_noisy@0", "'0' is not a draw"),
    ],
)
def test_what_is_not_a_signal_is_refused_in_one_line(name, words):
    assert not is_signal(name)
    with pytest.raises(UsageError) as caught:
        get_signal(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_once_in_the_order_of_the_registry():
    names = ["attention@2", "rank", "attention@-1", "loss", "rank"]
    assert [s.name for s in get_signals(names)] == ["loss", "rank", "attention@-1", "attention@2"]


@pytest.mark.parametrize("signal", SIGNALS.values(), ids=lambda s: s.name)
def test_every_signal_says_what_it_is(signal):
    assert signal.unit
    assert signal.meaning
    assert signal.low < signal.high
    assert signal.bare or signal.takes
