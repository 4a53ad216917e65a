"""All methods by name: this package's, and those of other installed packages."""

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import Any

import numpy as np

from sstoken.errors import SstokenError, UsageError
from sstoken.methods.base import Method
from sstoken.methods.policies import Outcome
from sstoken.methods.presets import PRESETS
from sstoken.methods.tokens import Array, Tokens
from sstoken.selection import IntArray

GROUP = "sstoken.methods"
"""The entry point group: each names a `Method`, or a sequence of them."""
_ORDER = ("excess_loss", "baselines")
"""Families to list first."""


class _Methods(Mapping[str, Method]):
    """The methods by name, imported on first use; third-party ones come after ours."""

    def __getitem__(self, name: str) -> Method:
        return _found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_found())

    def __len__(self) -> int:
        return len(_found())


METHODS: Mapping[str, Method] = _Methods()


def get_method(name: str) -> Method:
    """Look up a method by name or alias.

    Raises:
        UsageError: unknown name; suggests the nearest and lists the legal ones.
        SstokenError: the package that declares it cannot be imported.
    """
    if name in METHODS:
        return METHODS[name]
    for method in METHODS.values():
        if name in method.aliases:
            return method
    if reason := _broken().get(name):
        raise SstokenError(reason)
    if name in PRESETS:
        raise UsageError(
            f"method {name!r} is a preset of `select`, short for {PRESETS[name].text}; name the method"
        )
    aliases = [alias for method in METHODS.values() for alias in method.aliases]
    near = difflib.get_close_matches(name, [*METHODS, *aliases], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"method {name!r} is not known; legal: {', '.join(METHODS)}{hint}")


def decide(
    method: str, offsets: IntArray, signals: Mapping[str, Array], scope: str | None = None, **params: Any
) -> Outcome:
    """Run a method on tokens in memory.

    Args:
        method: its name.
        offsets: [E + 1], where each example starts among the N tokens.
        signals: by `role.signal`, such as `history.loss`: [N] float64, numpy or torch.
        scope: `sample` or `global`; None: the method's default.
        params: the method's parameters.

    Raises:
        UsageError: an unknown method, scope or parameter, or a missing signal.
    """
    chosen = get_method(method)
    units = np.array([0, offsets[-1]]) if chosen.check_scope(scope) == "global" else None
    return chosen.decide(Tokens(offsets, signals, own_units=units), chosen.read_params(params))[1]


def broken_entry_points() -> list[str]:
    """One line for each method that an installed package declares but that cannot be used."""
    _found()
    return list(_broken().values())


@cache
def _found() -> dict[str, Method]:
    package = import_module(__package__)
    names = [module.name for module in iter_modules(package.__path__)]
    ordered = [*(n for n in _ORDER if n in names), *(n for n in sorted(names) if n not in _ORDER)]
    own: dict[str, Method] = {}
    for name in ordered:
        family = getattr(import_module(f"{package.__name__}.{name}"), "METHODS", None)
        if isinstance(family, tuple):
            own |= {method.name: method for method in family}
    loaded, broken = _third_party()
    for name in own.keys() & loaded.keys():
        broken[f"{name} of a package"] = (
            f"method {name!r} of an installed package has the name of one here; rename it"
        )
    return own | {name: method for name, method in loaded.items() if name not in own}


def own_methods() -> list[Method]:
    """The methods of this package."""
    return [m for m in METHODS.values() if m.name not in _third_party()[0]]


@cache
def _third_party() -> tuple[dict[str, Method], dict[str, str]]:
    loaded: dict[str, Method] = {}
    broken: dict[str, str] = {}
    for point in entry_points(group=GROUP):
        try:
            given = point.load()
        except Exception as error:  # a third party's import can raise anything
            broken[point.name] = _about(point, f"cannot be imported ({type(error).__name__}: {error})")
            continue
        methods = [given] if isinstance(given, Method) else given
        if not isinstance(methods, list | tuple) or not all(isinstance(m, Method) for m in methods):
            broken[point.name] = _about(point, "is no Method, nor a list of them")
            continue
        loaded |= {method.name: method for method in methods}
    return loaded, broken


def _broken() -> dict[str, str]:
    return _third_party()[1]


def _about(point: EntryPoint, what: str) -> str:
    line = " ".join(f"method {point.name!r} of entry point {point.value!r} {what}".split())
    return f"{line}; mend or uninstall the package that offers it"
