"""The table of all methods: as JSON facts, as rows to print, and as docs/methods.md."""

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
            "second-hand" if m.evidence == "S" else EVIDENCE[m.evidence].split(" (")[0],
            m.source,
        )
        for m in METHODS.values()
    ]
    return names, rows


def page() -> str:
    """The text of docs/methods.md."""
    methods = own_methods()
    families = list(dict.fromkeys(m.family for m in methods))
    table = "\n".join(
        f"| [`{m.name}`](#{m.name}) | {m.family} | {', '.join(f'`{i}`' for i in m.inputs) or 'none'} | "
        f"{m.policy.text} | {m.scope} | {'yes' if m.runs_in_loop else 'no'} | {_evidence(m)} |"
        for family in families
        for m in methods
        if m.family == family
    )
    entries = "\n".join(_entry(m) for family in families for m in methods if m.family == family)
    presets = "\n".join(
        f"`--method {p.name}` is short for `{p.text}` (see [choosing.md](choosing.md))."
        for p in PRESETS.values()
    )
    bar = "\\|"
    signals = "\n".join(
        f"| `{s.form}` | {s.unit} | {s.low:.4g} to {s.high:.4g} | {s.meaning.replace('|', bar)} |"
        for s in SIGNALS.values()
    )
    filled = _PAGE.replace("PRESETS", presets).replace("TABLE", table).replace("SIGNALS", signals)
    return filled.replace("ENTRIES", entries)


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


_PAGE = """\
# Methods

`sstoken-curate methods` prints this table, `methods --json` all of it for programs. This page is written by
`python -m sstoken.methods.listing`.

```bash
sstoken-curate select --tokens T --scores S --out M --method eaft --param alpha=2 --role current=sft
```

A method reads signals, each as `role.signal`: `history.loss` is the loss under the checkpoint in the role `history`.
`history` is the frozen checkpoint (base, reference, pretrained), `current` the one trained or compared. `--role` (or
`--history`, `--current`) says which scored checkpoint plays it. `kl@history` compares with the checkpoint in that role.
If a signal is missing, the error names the `score` command that measures it.

Offline, a method's values are frozen at the checkpoint instead of recomputed at each step, and what a method computes
over a batch is computed over the whole dataset (scope `global`).

Evidence: A, checked against the authors' published code; T, against someone else's; F, against the published formula;
second-hand, the formula is known from summaries only; -, this project's own.

| method | family | signals | policy | scope | in the loop | evidence |
|---|---|---|---|---|---|---|
TABLE

PRESETS
Other options take precedence, and `--protect` adds to it; manifests and cards record what it stands for. `--method`
defaults to `sstoken` as published.

## What is written

`keep_mask` and `labels` say which tokens are trained on; `score` is what the method decided by. A method with soft or
signed weights adds the column `weight`: what the token's loss is multiplied by. Tokens of weight 0 or below are not
kept. `export` passes weights on to the trainers that support them (see `export --help`); the others refuse, unless
`--no-weights`.

With any method:

| option | |
|---|---|
| `--scope sample`, `global`, `turn` | the unit within which the method ranks tokens |
| `--budget N` | keep N tokens of the whole dataset instead of a share |
| `--pool word`, `sentence` | rank whole words or sentences, by the mean of their tokens |
| `--protect NAME` | keep these whatever their score: `end_of_turn`, `tool_calls`, `code`, `regex:PATTERN` |

`--example keep=0.05` chooses examples by T-SHIRT first (`ratio=0.5`; `draws=30` where `pmi_noisy@1` to `@30` were
measured; the role `scorer`, else `current`), then the method chooses their tokens; `--method full` keeps them all. Its
candidates have an IFD below 1, measured without noise; the authors take the mean over the draws.

With pooling, each unit may exceed its share by less than one word or sentence. Protected tokens come on top of the
share, with weight 1.

## Add a method

In this repository, write it into the file of its family in `sstoken/methods/`. From a package of your own, declare it
as an entry point:

```toml
[project]
name = "surprise"
version = "0.1"
dependencies = ["sstoken"]

[project.entry-points."sstoken.methods"]
surprise = "surprise:METHOD"
```

```python
from typing import Annotated

from pydantic import Field

from sstoken.methods import Method, Params, Top
from sstoken.selection import num_kept


class SurpriseParams(Params):
    rho: Annotated[float, Field(gt=0, le=1)] = 0.5
    \"\"\"The share of response tokens to keep.\"\"\"


METHOD = Method(
    name="surprise",
    family="examples",
    inputs=("current.loss", "current.entropy"),
    formula="loss - entropy: how much rarer the token is than expected",
    source="docs/methods.md",
    score=lambda tokens, params: tokens["current.loss"] - tokens["current.entropy"],
    policy=Top("keeps the ceil(rho n) highest", lambda n, params: num_kept(n, params.rho)),
    params=SurpriseParams,
    scopes=("sample", "global"),
)
```

`score` gets flat arrays of the response tokens, numpy's offline and torch's in a training loop; take functions from
`tokens.xp`. `tokens.mean`, `tokens.minmax` and `tokens.in_top` work within examples. Other policies: `Where` (a test of
the score), `Weight` (the score is the weight).

## Signals

`score --signal NAME` measures these, except `critical`, which has a verb of its own. ARG is what follows the `@`.

| signal | unit | range | meaning |
|---|---|---|---|
SIGNALS

## Each method

ENTRIES\
"""


if __name__ == "__main__":
    print(page(), end="")
