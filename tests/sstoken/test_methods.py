"""Methods: their formulas on small numbers, and what they refuse."""

import numpy as np
import pytest

from sstoken.errors import UsageError
from sstoken.methods import METHODS, Input, Tokens, get_method

OFFSETS = np.array([0, 3, 5])
SIGNALS = {
    "history.loss": np.array([3.0, 2.0, 1.0, 4.0, 4.0]),
    "current.loss": np.array([1.0, 1.5, 2.0, 1.0, 1.0]),
    "current.attention": np.array([0.1, 0.4, 0.3, 0.2, 0.6]),
}
TOKENS = Tokens(OFFSETS, SIGNALS)


def score(name, tokens=TOKENS, **params):
    method = get_method(name)
    return method.score(tokens, method.read_params(params))


def test_rel_is_history_minus_current():
    np.testing.assert_allclose(TOKENS.rel, [2.0, 0.5, -1.0, 3.0, 3.0])


def test_a_signal_is_there_or_named():
    assert "history.loss" in TOKENS
    assert "history.entropy" not in TOKENS
    with pytest.raises(UsageError, match=r"^the signal 'history.entropy' is missing; score the checkpoint"):
        TOKENS["history.entropy"]


def test_sstoken_by_hand():
    # min-max of REL: example 0 spans -1 to 2, example 1 is constant.
    expected = [0.3 * 1 + 0.7 * 0.1, 0.3 * 0.5 + 0.7 * 0.4, 0.7 * 0.3, 0.7 * 0.2, 0.7 * 0.6]
    np.testing.assert_allclose(score("sstoken", gamma=0.3), expected, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "params", "history", "current", "kept"),
    [
        ("stm", {"tau": 1}, 0.0, 0.0, True),
        ("stm", {"tau": 1}, 0.1, 0.1, False),
        ("stm", {"tau": 1, "drop": "lowest"}, 0.0, 0.0, True),
        ("p-q", {"tau": 1, "form": "top"}, 0.0, 0.0, True),
        ("p-q", {"tau": 1, "form": "bottom"}, 0.0, 0.0, True),
        ("stm-dpf", {}, 0.5, 0.5, True),  # neither more nor less likely than before
        ("stm-dpf", {}, 0.5, 0.75, False),
        ("dpf", {"tau": 1e-9}, 0.5, 0.5, True),
    ],
)
def test_a_threshold_itself_is_kept(name, params, history, current, kept):
    signals = {"history.loss": np.array([history]), "current.loss": np.array([current])}
    _, outcome = METHODS[name].decide(Tokens(np.array([0, 1]), signals), METHODS[name].read_params(params))
    assert outcome.keep.tolist() == [kept]


@pytest.mark.parametrize("name", ["rel", "toss", "forgetting"])
def test_nothing_is_decided_about_no_tokens(name):
    none = Tokens(np.array([0]), {signal: np.zeros(0) for signal in SIGNALS})
    scores, outcome = METHODS[name].decide(none, METHODS[name].read_params({}))
    assert (scores.size, outcome.keep.size, outcome.keep.dtype) == (0, 0, bool)
    assert (outcome.weight is not None) == METHODS[name].weighted


def test_a_prefix_of_the_sequence_needs_its_length():
    with pytest.raises(UsageError, match=r"'prefix' needs the tokens' positions"):
        score("prefix", TOKENS.with_(positions=np.arange(5)))


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [np.exp(-2) * 2 + 0.1 * 3, np.exp(-0.5) * 0.5]),
        ({"loss": "sft", "kl": 2}, [2 + 2 * 3, 0.5]),
        ({"loss": "dft", "kl": 0}, [np.exp(-2) * 2, np.exp(-0.5) * 0.5]),
    ],
)
def test_asft_adds_the_penalty_to_its_loss(params, expected):
    signals = {"current.loss": np.array([2.0, 0.5]), "current.reverse_kl@history": np.array([3.0, 0.0])}
    np.testing.assert_allclose(score("asft", Tokens(np.array([0, 2]), signals), **params), expected)


def test_cayley_of_improbable_tokens_stops_at_its_lowest_exponent():
    signals = {"current.loss": np.full(3, 12.0)}
    one = Tokens(np.array([0, 3]), signals, own_units=np.array([0, 3]))
    _, outcome = METHODS["cayley"].decide(one, METHODS["cayley"].read_params({}))
    np.testing.assert_allclose(outcome.weight, np.exp(-12 * 0.001), rtol=1e-4)


def test_ranktuner_at_two_bits_of_entropy():
    signals = {
        "current.loss": np.array([1.0]),
        "current.entropy": np.array([2 * np.log(2)]),
        "current.max_prob": np.array([0.9]),
        "current.rank": np.array([0.0]),
        "current.ties": np.array([0.0]),
    }
    p = np.exp(-1)
    expected = p * (p * 2) ** (-1 / np.log2(3) ** 2)  # a bound of 2, not 1.1
    np.testing.assert_allclose(score("ranktuner", Tokens(np.array([0, 1]), signals)), [expected])


@pytest.mark.parametrize(("gamma", "needed"), [(1, "loss"), (0, "attention")])
def test_the_ends_of_gamma_need_one_signal(gamma, needed):
    signals = {name: values for name, values in SIGNALS.items() if name.endswith(needed)}
    np.testing.assert_array_equal(
        score("sstoken", Tokens(OFFSETS, signals), gamma=gamma), score("sstoken", gamma=gamma)
    )


@pytest.mark.parametrize(("gamma", "alone"), [(1.0, "rel"), (0.0, "attention")])
def test_the_ends_of_gamma_rank_like_one_signal(gamma, alone):
    both, single = score("sstoken", gamma=gamma), score(alone)
    for a, b in ((0, 3), (3, 5)):
        np.testing.assert_array_equal(
            np.argsort(-both[a:b], kind="stable"), np.argsort(-single[a:b], kind="stable")
        )


def test_every_checkpoint_that_an_input_names_has_a_role():
    for method in METHODS.values():
        named = {Input(i).signal.partition("@")[2] for i in method.inputs} - {""}
        assert named <= set(method.roles), method.name
    assert get_method("eksft").roles == ("current", "history")


def test_random_is_seeded():
    def draw(*seed):
        return score("random", Tokens(np.array([0, 100]), {}, seed=seed))

    np.testing.assert_array_equal(draw(1, 0), draw(1, 0))
    assert (draw(1, 0) != draw(1, 1)).any()
    assert (draw(1, 0) != draw(2, 0)).any()


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'ssotken' is not known; legal: sstoken, rel.*'sstoken'"):
        get_method("ssotken")
    with pytest.raises(UsageError, match="did you mean 'recommended'"):
        get_method("recomended")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sstoken", {"rho": 0}, r"rho is 0; legal is 0 < rho <= 1 \(the share of response tokens to keep\)"),
        ("sstoken", {"gamma": "much"}, r"gamma is much; legal is 0 <= gamma <= 1"),
        ("sstoken", {"tau": 1}, r"'sstoken' has no parameter 'tau'; it has rho, gamma"),
        ("full", {"tau": 1}, r"'full' has no parameter 'tau'; it has none"),
        (
            "profit",
            {"direction": "middle", "tau": 0.5, "upper": 0.2},
            r"^method 'profit': upper is 0.2, below tau, 0.5; legal is 0.5 <= upper <= 1$",
        ),
    ],
)
def test_wrong_parameters_are_one_line(name, given, message):
    with pytest.raises(UsageError, match=message) as raised:
        get_method(name).read_params(given)
    assert "\n" not in str(raised.value)


def test_an_unlike_name_gets_no_hint():
    with pytest.raises(UsageError) as raised:
        get_method("xyzzy")
    assert str(raised.value) == f"method 'xyzzy' is not known; legal: {', '.join(METHODS)}"


def test_the_old_methods_take_the_options_of_a_sweep():
    assert METHODS["rel"].read_params({"rho": 0.3, "gamma": 0.9}).model_dump() == {"rho": 0.3}
    assert METHODS["full"].read_params({"rho": 0.3, "gamma": 0.9}).model_dump() == {}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name):
    method = METHODS[name]
    assert method.name == name.lower() == name.replace("_", "-")
    assert method.formula
    assert method.source
    assert all(Input(i).role and Input(i).signal for i in method.inputs)
    for field, about in method.params.model_fields.items():
        assert about.description, field
        assert about.default is not None, field
