"""The table of all methods, as facts and as rows to print."""

from collections.abc import Sequence
from typing import Any

from pydantic_core import PydanticUndefined

from sstoken.methods.base import EVIDENCE, Method, Params, legal, parameter_type
from sstoken.methods.registry import METHODS


def parameters(params: type[Params]) -> list[dict[str, Any]]:
    """Name, type, range, default and meaning of each parameter."""
    return [
        {
            "name": name,
            "type": parameter_type(params, name),
            "range": legal(params, name),
            "default": None if field.default is PydanticUndefined else field.default,
            "about": " ".join((field.description or "").split()),
        }
        for name, field in params.model_fields.items()
    ]


def describe(method: Method) -> dict[str, Any]:
    """All facts of a method, ready for JSON."""
    return {
        "name": method.name,
        "family": method.family,
        "roles": list(method.roles),
        "signals": list(method.inputs),
        "parameters": parameters(method.params),
        "policy": method.policy.text,
        "scope": method.scope,
        "scopes": list(method.scopes),
        "weighted": method.weighted,
        "in_loop": method.in_loop,
        "evidence": method.evidence,
        "second_hand": method.evidence == "S",
        "formula": method.formula,
        "cost": method.cost,
        "source": method.source,
        "aliases": list(method.aliases),
    }


def facts() -> list[dict[str, Any]]:
    """Of every method."""
    return [{"method": method.name, **describe(method)} for method in METHODS.values()]


def print_rows() -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Names of the columns, and a row for each method."""
    names = ("method", "signals", "formula", "policy", "parameters", "evidence", "source")
    rows = [
        (
            m.name,
            ", ".join(m.inputs) or "none",
            m.formula,
            m.policy.text,
            ", ".join(f"{p['name']}={p['default']}" for p in parameters(m.params)) or "none",
            "second-hand" if m.evidence == "S" else EVIDENCE[m.evidence].split(" (")[0],
            m.source,
        )
        for m in METHODS.values()
    ]
    return names, rows
