"""All methods by name: this package's, and those of other installed packages."""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import Any

import numpy as np

from sstoken.errors import SstokenError, UsageError, did_you_mean
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
    if reason := _installed()[1].get(name):
        raise SstokenError(reason)
    if name in PRESETS:
        raise UsageError(
            f"method {name!r} is a preset of `select`, short for {PRESETS[name].text}; name the method"
        )
    aliases = [alias for method in METHODS.values() for alias in method.aliases]
    hint = did_you_mean(name, [*METHODS, *aliases, *PRESETS])
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


def own_methods() -> list[Method]:
    """The methods of this package."""
    return list(_own().values())


def broken_entry_points() -> list[str]:
    """One line for each method that an installed package declares but that cannot be used."""
    return list(_installed()[1].values())


@cache
def _found() -> dict[str, Method]:
    return _own() | _installed()[0]


@cache
def _own() -> dict[str, Method]:
    package = import_module(__package__)
    names = {module.name for module in iter_modules(package.__path__)}
    own: dict[str, Method] = {}
    for name in [*_ORDER, *sorted(names.difference(_ORDER))]:
        family = getattr(import_module(f"{package.__name__}.{name}"), "METHODS", None)
        if isinstance(family, tuple):
            own |= {method.name: method for method in family}
    return own


@cache
def _installed() -> tuple[dict[str, Method], dict[str, str]]:
    """The methods of other packages by name, and what is wrong with those that cannot be used, by entry point."""
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
    for name in _own().keys() & loaded.keys():
        del loaded[name]
        broken[f"{name} of a package"] = (
            f"method {name!r} of an installed package has the name of one here; rename it"
        )
    return loaded, broken


def _about(point: EntryPoint, what: str) -> str:
    line = " ".join(f"method {point.name!r} of entry point {point.value!r} {what}".split())
    return f"{line}; mend or uninstall the package that offers it"
