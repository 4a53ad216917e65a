"""The table of all methods: as JSON facts, as rows to print, and in docs/methods.md.

Run in the repository, `python -m sstoken.methods.listing` brings the page's tables up to date.
"""

from collections.abc import Sequence
from typing import Any

from pydantic_core import PydanticUndefined

from sstoken.methods.base import EVIDENCE, Method, Params, legal, parameter_type
from sstoken.methods.presets import PRESETS, Preset
from sstoken.methods.registry import METHODS, get_method, own_methods
from sstoken.signals import SIGNALS


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
    """Describe a method, ready for JSON."""
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
        "in_loop": method.runs_in_loop,
        "evidence": method.evidence,
        "second_hand": method.evidence == "S",
        "formula": method.formula,
        "cost": method.cost,
        "source": method.source,
        "aliases": list(method.aliases),
    }


def facts() -> list[dict[str, Any]]:
    """Describe every method and preset; `stands_for` is what a preset stands for, None for a method."""
    found = [{"method": m.name, **describe(m), "stands_for": None} for m in METHODS.values()]
    for preset in PRESETS.values():
        described = describe(get_method(preset.method)) | {"name": preset.name, "source": preset.about}
        found.append({"method": preset.name, **described, "stands_for": stands_for(preset)})
    return found


def stands_for(preset: Preset) -> dict[str, Any]:
    """What a manifest records instead of the preset's name."""
    params = get_method(preset.method).read_params(preset.params).model_dump(mode="json")
    return {"method": preset.method, "params": params, "protect": list(preset.protect)}


def print_rows() -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Column names, and one row per method."""
    names = ("method", "signals", "formula", "policy", "parameters", "evidence", "source")
    rows = [
        (
            m.name,
            ", ".join(m.inputs) or "none",
            m.formula,
            m.policy.text,
            ", ".join(f"{p['name']}={p['default']}" for p in parameters(m.params)) or "none",
            EVIDENCE[m.evidence],
            m.source,
        )
        for m in METHODS.values()
    ]
    return names, rows


def page(text: str) -> str:
    """Bring a copy of docs/methods.md up to date: what stands between its lines `<!-- NAME -->` and `<!-- end -->`."""
    methods = own_methods()
    families = list(dict.fromkeys(m.family for m in methods))
    methods.sort(key=lambda m: families.index(m.family))
    parts = {
        "methods": [
            "| method | family | signals | policy | scope | in the loop | evidence |",
            "|---" * 7 + "|",
        ],
        "presets": [
            f"`--method {p.name}` is short for `{p.text}` (see [choosing.md](choosing.md))."
            for p in PRESETS.values()
        ],
        "signals": ["| signal | unit | range | meaning |", "|---" * 4 + "|"],
        "each method": [_entry(m) for m in methods],
    }
    parts["methods"] += [
        f"| [`{m.name}`](#{m.name}) | {m.family} | {', '.join(f'`{i}`' for i in m.inputs) or 'none'} | "
        f"{m.policy.text} | {m.scope} | {'yes' if m.runs_in_loop else 'no'} | {_evidence(m)} |"
        for m in methods
    ]
    bar = "\\|"
    parts["signals"] += [
        f"| `{s.form}` | {s.unit} | {s.low:.4g} to {s.high:.4g} | {s.meaning.replace('|', bar)} |"
        for s in SIGNALS.values()
    ]
    for name, lines in parts.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        end = rest.index("<!-- end -->")
        text = "".join([before, f"<!-- {name} -->\n\n", "\n".join(lines).rstrip(), "\n\n", rest[end:]])
    return text


def _evidence(method: Method) -> str:
    return "second-hand" if method.evidence == "S" else method.evidence


def _entry(method: Method) -> str:
    lines = [f"### {method.name}", "", f"{method.formula}. {method.source}."]
    if len(method.scopes) > 1:
        lines[-1] += f" Scopes: {', '.join(method.scopes)}."
    if method.aliases:
        lines[-1] += f" Also called {', '.join(method.aliases)}."
    described = parameters(method.params)
    if described:
        lines += ["", "| parameter | range | default | |", "|---|---|---|---|"]
        lines += [f"| `{p['name']}` | {p['range']} | {p['default']} | {p['about']} |" for p in described]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    with open("docs/methods.md", "r+", encoding="utf-8") as file:
        text = page(file.read())
        file.seek(0)
        file.write(text)
        file.truncate()
