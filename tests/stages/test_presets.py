"""Presets of `select`: what they stand for, and that what the user gives wins."""

from pathlib import Path

import pytest

from sstoken.errors import UsageError
from sstoken.in_loop.settings import SelfModulation
from sstoken.methods import METHODS, get_method
from sstoken.methods.listing import facts, stands_for
from sstoken.methods.presets import PRESETS, Preset, expand, method_name, shown_name
from sstoken.stages.select import Select

METHODS_PAGE = Path(__file__).parents[2] / "docs/methods.md"


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_a_preset_stands_for_what_select_takes(preset: Preset) -> None:
    assert preset.name not in METHODS
    assert stands_for(preset)["method"] == method_name(preset.name) == get_method(preset.method).name
    long = Select(method=preset.method, params=dict(preset.params), protect=preset.protect)
    short = Select(method=preset.name)
    short.check()
    assert short.fingerprinted() == long.fingerprinted()
    assert short.method == preset.method


def test_what_is_given_wins_and_protect_adds() -> None:
    preset = Preset("mine", "pmi-band", "a test", params={"window": 2, "rho": 0.8}, protect=("end_of_turn",))
    PRESETS["mine"] = preset
    try:
        given = {"method": "mine", "rho": 0.5, "params": {"window": 3, "clip": 1.0}, "protect": ["code"]}
        found = Select(**expand(given))
        assert found.resolved.model_dump() == get_method("pmi-band").read_params(
            {"rho": 0.5, "window": 3, "clip": 1.0}
        ).model_dump()  # fmt: skip
        assert found.protect == ("code", "end_of_turn")
        assert Select(method="mine").resolved.model_dump()["rho"] == 0.8
    finally:
        del PRESETS["mine"]


def test_a_budget_goes_with_the_recommended_preset() -> None:
    Select(method="recommended", budget=10).check()


def test_only_what_a_preset_sets_is_set() -> None:
    assert expand({"method": "recommended"}) == {"method": "pmi-band", "protect": ("end_of_turn",)}
    assert method_name("sstoken") == "sstoken"


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        ({"method": "pmi-band", "protect": ["code", "end_of_turn"], "rho": 0.4}, "recommended (pmi-band)"),
        ({"method": "pmi-band", "protect": ["code"]}, "pmi-band"),
        ({"method": "pmi-band", "params": None}, "pmi-band"),
        ({"method": "rel", "protect": ["end_of_turn"]}, "rel"),
        ({}, ""),
    ],
)
def test_a_mask_is_shown_by_the_preset_that_its_settings_have(made: dict[str, object], shown: str) -> None:
    assert shown_name(made) == shown


@pytest.mark.parametrize("given", [{"method": ["mine"]}, {"method": "mine", "params": 3}])
def test_settings_of_a_wrong_type_are_left_to_their_check(given: dict[str, object]) -> None:
    PRESETS["mine"] = Preset("mine", "pmi-band", "a test", params={"window": 2})
    try:
        assert expand(given).get("params") == given.get("params")
    finally:
        del PRESETS["mine"]


def test_other_settings_are_left_as_they_are() -> None:
    given = {"method": "sstoken", "rho": 0.5}
    assert expand(given) == given
    assert expand({"rho": 0.5}) == {"rho": 0.5}
    assert Select().method == "sstoken"
    assert Select().protect == ()


def test_the_list_says_what_a_preset_stands_for() -> None:
    listed = {row["method"]: row["stands_for"] for row in facts()}
    assert listed["sstoken"] is None
    assert listed["recommended"] == stands_for(PRESETS["recommended"])
    assert f"`--method recommended` is short for `{PRESETS['recommended'].text}`" in METHODS_PAGE.read_text()


def test_a_preset_is_refused_in_the_loop_by_what_it_stands_for() -> None:
    with pytest.raises(
        UsageError, match=r"'recommended' is a preset of `select`, short for --method pmi-band"
    ):
        SelfModulation(method="recommended")
