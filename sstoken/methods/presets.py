"""Presets: names for `select --method` that stand for a method with settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A method with settings; what the user sets takes precedence."""

    name: str
    method: str
    about: str
    """Why, in one line that names the page with the evidence."""
    params: Mapping[str, Any] = field(default_factory=dict)
    protect: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The options of `select` that it stands for."""
        options = [f"--param {name}={value}" for name, value in self.params.items()]
        options += [f"--protect {name}" for name in self.protect]
        return " ".join([f"--method {self.method}", *options])

    @property
    def line(self) -> str:
        """What it stands for and why, in one line."""
        return f"{self.name} is short for {self.text}: {self.about}"


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "recommended",
            "pmi-band",
            "it finds noise best where the base knows such answers; when not to use it: docs/choosing.md",
            protect=("end_of_turn",),
        ),
    )
}


def method_name(name: str) -> str:
    """Return the method that a name in `select` stands for: a preset's, or the name itself."""
    return PRESETS[name].method if name in PRESETS else name


def shown_name(made: Mapping[str, Any]) -> str:
    """Return the method of a mask for the user, from what was recorded of it: `recommended (pmi-band)`.

    A preset is recorded as what it stands for, so a mask with all of its settings has its name, too.
    """
    name, params, protect = str(made.get("method") or ""), made.get("params") or {}, made.get("protect") or ()
    for preset in PRESETS.values():
        if (
            name == preset.method
            and params.items() >= preset.params.items()
            and {*protect} >= {*preset.protect}
        ):
            return f"{preset.name} ({name})"
    return name


def expand(given: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a preset's name in the settings of a selection by the settings that it stands for.

    What the user gave takes precedence over the preset's; `protect` adds to it.
    """
    found = dict(given)
    preset = PRESETS.get(name) if isinstance(name := given.get("method"), str) else None
    if preset is None:
        return found
    found["method"] = preset.method
    own, params = given.get("protect") or (), given.get("params") or {}
    if isinstance(own, list | tuple):
        found["protect"] = tuple(dict.fromkeys([*own, *preset.protect]))
    defaults = {key: value for key, value in preset.params.items() if key not in given}
    if defaults and isinstance(params, Mapping):
        found["params"] = {**defaults, **params}
    return found
