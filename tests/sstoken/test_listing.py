"""What `methods` prints: facts of a small method of the test's own, and the rows of all."""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import pytest
from pydantic import Field

from sstoken.errors import UsageError
from sstoken.methods import METHODS, Method, Params, Top
from sstoken.methods.base import legal, parameter_type
from sstoken.methods.listing import describe, facts, parameters, print_rows, stands_for
from sstoken.methods.presets import PRESETS
from sstoken.methods.registry import decide


class SampleParams(Params):
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """How much
    is kept."""
    keep: Literal["high", "low"] = "high"
    """Which end."""
    span: Annotated[int, Field(ge=2, lt=9)] = 3
    note: str


METHOD = Method(
    name="sample",
    family="examples",
    inputs=("current.loss", "current.kl@history"),
    formula="loss + kl",
    source="a test",
    score=lambda tokens, params: tokens["current.loss"],
    policy=Top("keeps some", lambda n, params: 1),
    params=SampleParams,
    scopes=("sample", "global"),
    evidence="S",
    aliases=("specimen",),
)


def test_parameters_have_type_range_default_and_meaning():
    share, keep, span, note = parameters(SampleParams)
    assert share == {
        "name": "share",
        "type": "float",
        "range": "0 < share <= 1",
        "default": 0.5,
        "about": "How much is kept.",
    }
    assert keep == {
        "name": "keep",
        "type": "high|low",
        "range": "high, low",
        "default": "high",
        "about": "Which end.",
    }
    assert (span["range"], span["about"]) == ("2 <= span < 9", "")
    assert (note["type"], note["range"], note["default"]) == ("str", "any str", None)
    assert legal(SampleParams, "share") == share["range"]
    assert parameter_type(SampleParams, "keep") == "high|low"


def test_all_facts_of_a_method():
    assert describe(METHOD) == {
        "name": "sample",
        "family": "examples",
        "roles": ["current", "history"],
        "signals": ["current.loss", "current.kl@history"],
        "parameters": parameters(SampleParams),
        "policy": "keeps some",
        "scope": "sample",
        "scopes": ["sample", "global"],
        "weighted": False,
        "in_loop": True,
        "evidence": "S",
        "second_hand": True,
        "formula": "loss + kl",
        "cost": "one forward pass of the current checkpoint, one forward pass of the history checkpoint",
        "source": "a test",
        "aliases": ["specimen"],
    }
    every = {entry["method"]: entry for entry in facts()}
    assert list(every) == [*METHODS, *PRESETS]
    assert every["sstoken"] == {"method": "sstoken", **describe(METHODS["sstoken"]), "stands_for": None}
    recommended = PRESETS["recommended"]
    assert every["recommended"] == {
        "method": "recommended",
        **describe(METHODS["pmi-band"]),
        "name": "recommended",
        "source": recommended.about,
        "stands_for": {
            "method": "pmi-band",
            "params": {"rho": 0.6, "window": 4, "clip": 2.0, "level": 1.0, "weight": 0.5},
            "protect": ["end_of_turn"],
        },
    }
    for name, preset in PRESETS.items():
        assert every[name]["stands_for"] == stands_for(preset)
        assert every[name]["signals"] == list(METHODS[preset.method].inputs)
    assert every["sstoken"]["cost"] == "one forward pass of the history and one of the current checkpoint"
    assert every["prefix"]["cost"] == "none"
    assert not every["sstoken"]["second_hand"]


def test_rows_to_print():
    names, rows = print_rows()
    assert names == ("method", "signals", "formula", "policy", "parameters", "evidence", "source")
    by_name = {row[0]: dict(zip(names, row, strict=True)) for row in rows}
    assert list(by_name) == list(METHODS)
    assert by_name["prefix"]["signals"] == "none"
    assert by_name["prefix"]["parameters"] == "share=0.5, of=sequence"
    assert by_name["prefix"]["evidence"] == "the authors' published code was run"
    assert by_name["rho-1"]["evidence"] == "second-hand"
    assert by_name["rho-1"]["signals"] == ", ".join(METHODS["rho-1"].inputs)
    assert by_name["full"]["evidence"] == "this project's own, or a baseline"
    assert by_name["trimming"]["policy"] == METHODS["trimming"].policy.text
    assert by_name["trimming"]["formula"] == "current_loss, or minus it"
    assert by_name["trimming"]["source"] == "loss trimming, a common baseline"
    assert by_name["dft"]["parameters"] == "none"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inputs": ("current.loss", ".loss")}, "input '.loss' is not role.signal, such as current.loss"),
        ({"inputs": ("loss", "current.loss")}, "input 'loss' is not role.signal, such as current.loss"),
        *(
            (wrong, "evidence is one of A, T, F, S, -; scopes of token, turn, sample, global")
            for wrong in ({"evidence": "B"}, {"scopes": ()}, {"scopes": ("sample", "row")})
        ),
    ],
)  # fmt: skip
def test_a_method_that_is_declared_wrongly_is_refused(wrong, message):
    with pytest.raises(UsageError) as raised:
        replace(METHOD, **wrong)
    assert str(raised.value) == f"method 'sample': {message}"


def test_a_method_checks_its_scope():
    assert METHOD.check_scope(None) == "sample"
    assert METHOD.check_scope("global") == "global"
    assert METHODS["full"].check_scope("sample") == "token"  # it ignores the scope
    with pytest.raises(
        UsageError, match=r"^scope is 'turn', and method 'sample' takes scope sample, global$"
    ):
        METHOD.check_scope("turn")
    with pytest.raises(
        UsageError,
        match=r"^scope is 'global', and method 'dft' judges each token alone; leave scope out$",
    ):
        METHODS["dft"].check_scope("global")


OFFSETS = np.array([0, 2, 5])
LOSS = {"current.loss": np.array([9.0, 8.0, 1.0, 7.0, 2.0])}


def test_decide_takes_examples_apart_or_all_together():
    apart = decide("trimming", OFFSETS, LOSS, rho=0.4)
    np.testing.assert_array_equal(apart.keep, [True, False, False, True, True])
    together = decide("trimming", OFFSETS, LOSS, scope="global", rho=0.4)
    np.testing.assert_array_equal(together.keep, [True, True, False, False, False])
    low = decide("trimming", OFFSETS, LOSS, scope="global", rho=0.4, keep="low")
    np.testing.assert_array_equal(low.keep, [False, False, True, False, True])


def test_prefix_of_the_response():
    kept = decide("prefix", OFFSETS, {}, of="response", share=0.5).keep
    np.testing.assert_array_equal(kept, [True, False, True, True, False])
    with pytest.raises(
        UsageError,
        match=r"^method 'prefix' needs the tokens' positions, .*; set of=response$",
    ):
        decide("prefix", OFFSETS, {})


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"tau": 0.5}, [1, 1, 0, 0]),
        ({"tau": 0.5, "direction": "lower"}, [0, 1, 1, 1]),
        ({"tau": 0.25, "upper": 0.5, "direction": "middle"}, [0, 1, 1, 0]),
    ],
)
def test_profit_keeps_what_equals_its_threshold(params, kept):
    loss = {"current.loss": -np.log([0.8, 0.5, 0.25, 0.1])}
    np.testing.assert_array_equal(decide("profit", np.array([0, 4]), loss, **params).keep, np.array(kept) > 0)


def test_powers_of_the_probability():
    loss = {"current.loss": -np.log([0.64, 0.04])}
    at = np.array([0, 2])
    np.testing.assert_allclose(decide("p-q", at, loss).weight, [0.64, 0.04])
    np.testing.assert_allclose(decide("p-q", at, loss, q=0.5).weight, [0.8, 0.2])
    top = decide("p-q", at, loss, form="top", tau=0.1)
    np.testing.assert_array_equal(top.keep, [True, False])
    bottom = decide("p-q", at, loss, form="bottom", tau=0.1)
    np.testing.assert_array_equal(bottom.keep, [False, True])


def test_pmi_band_by_hand():
    signals = {
        "history.loss": np.array([1.0, 3.0, 2.0]),
        "history.loss_unconditional": np.array([np.nan, 9.0, 2.5]),
    }
    at = np.array([0, 3])
    plain = {"window": 0, "clip": 2.0, "level": 1.0, "weight": 0.5}
    # gains 0 (no value), 2 (clipped), 0.5; less half the distance of the loss from 1: 0, 1, 0; ties to the earlier
    expected = {1 / 3: [False, True, False], 2 / 3: [True, True, False]}
    for rho, kept in expected.items():
        outcome = decide("pmi-band", at, signals, scope="global", rho=rho, **plain)
        np.testing.assert_array_equal(outcome.keep, kept)
