"""Names of checkpoints, and which checkpoint plays which role of a method."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from sstoken.errors import UsageError, did_you_mean
from sstoken.methods import METHODS, Input, get_method
from sstoken.signals import get_signal, is_signal
from sstoken.stages.critical import Critical
from sstoken.stages.manifest import read_manifest
from sstoken.stages.selecting.examples import SCORER
from sstoken.stages.storage import expanded


def named_checkpoints(refs: Iterable[str]) -> dict[str, str]:
    """Read checkpoints given as `PATH` (named after its folder) or `NAME=PATH`; return paths by name.

    Raises:
        UsageError: no checkpoint, two with one name, or a name that cannot be a folder's.
    """
    named: dict[str, str] = {}
    for given in refs:
        name, separator, ref = given.partition("=")
        if not separator or ("/" in name and not _names_a_folder(given, ref)):
            ref, name = given, Path(given.partition("@")[0]).name or Path(given).resolve().name
        check_name(name, given, ref)
        if named.get(name) == ref:
            raise UsageError(f"checkpoint {given!r} is given twice; give it once, or write OTHER-NAME={ref}")
        enter(named, name, ref)
    if not named:
        raise UsageError("no checkpoint given; name at least one")
    return named


def _names_a_folder(given: str, ref: str) -> bool:
    """Whether `NAME=PATH` was meant although NAME has a slash; a path may contain `=` itself: runs/lr=1e-5/step-100."""
    return not expanded(given).is_dir() and expanded(ref).is_dir()


def check_name(name: str, given: str, ref: str) -> None:
    """Refuse a checkpoint name that cannot be a folder's: empty, hidden or with a slash."""
    if not name or "/" in name or name.startswith("."):
        raise UsageError(f"checkpoint {given!r}: {name!r} cannot be a folder's name; write NAME={ref}")


def enter(named: dict[str, str], name: str, ref: str) -> None:
    """Add a checkpoint to `named`; refuse another one of the same name."""
    if named.setdefault(name, ref) != ref:
        raise UsageError(f"two checkpoints are called {name!r}; name one of them: NAME={ref}")


def check_roles(roles: Iterable[str]) -> None:
    """Refuse a role that is no method's, nor the name of a signal that a checkpoint supplies."""
    known = [*dict.fromkeys(role for method in METHODS.values() for role in method.roles), SCORER]
    for role in roles:
        if role not in known and not is_signal(role):
            hint = did_you_mean(role, known)
            raise UsageError(f"no method has the role {role!r}; legal: {', '.join(known)}{hint}")


def given_roles(roles: Mapping[str, str], history: str | None, current: str | None) -> dict[str, str]:
    """Merge `--role`, `--history` and `--current` into checkpoint names by role; refuse two names for one role."""
    check_roles(roles)
    found = dict(roles)
    for role, name in (("history", history), ("current", current)):
        if name is not None and found.setdefault(role, name) != name:
            raise UsageError(f"role {role!r} is given twice: {name!r} and {found[role]!r}; give it once")
    return found


def select_inputs(method: str, scores: Path, given: Mapping[str, str]) -> dict[str, Path]:
    """Find the score folders that a method reads, by role, among the checkpoints' folders in `scores`.

    `given` has checkpoint names by role. By default, `history` is `base`, `step-0` or the one that is not current, and
    `current` is the only other one, or the one of the highest step.

    Raises:
        UsageError: no scores of that name, or several candidates for a role.
    """
    if not scores.is_dir():
        kind = "is a file" if scores.exists() else "no such folder"
        raise UsageError(f"{scores}: {kind}; name the one that holds the checkpoints' scores")
    if (made := read_manifest(scores)) is not None:
        what = "the scores of one checkpoint; name the folder above scores"
        if made.stage not in ("score", "observed", "critical"):
            what = (
                f"written by {made.stage!r}; scores has to be the folder that 'score' wrote (exchanged with another "
                "option?)"
            )
        raise UsageError(f"{scores}: {what}")
    manifests = {p.name: read_manifest(p) for p in sorted(scores.iterdir()) if p.is_dir()}
    there = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    listed = f"there are: {', '.join(there) or 'none'}"
    if len(there) < len(manifests):
        listed += f" (unfinished: {', '.join(name for name in manifests if name not in there)})"
    found = dict(given)
    for name in found.values():
        if name not in there:
            raise UsageError(f"{scores}: no finished scores of {name!r}; {listed}")
    needed = get_method(method).roles
    generated = any(get_signal(Input(i).signal).needs == "generation" for i in get_method(method).inputs)
    _guess_roles(found, needed, [n for n, m in there.items() if (m.stage == Critical.name) == generated])
    measured = {name: manifest.settings for name, manifest in there.items()}
    attended = [n for n, s in measured.items() if s.get("attention") or "attention" in s.get("signals", ())]
    if found.get("current") in attended:
        found.setdefault("attention", found["current"])
    elif len(attended) == 1:
        found.setdefault("attention", attended[0])
    for role in needed:
        if role not in found:
            raise UsageError(
                f"{scores}: method {method!r} needs a checkpoint in the role {role!r}, and which one is not clear; "
                f"{listed}; say --role {role}=NAME"
            )
    check_compared(method, found.get("history"), found.get("current"))
    return {role: scores / name for role, name in found.items()}


def _guess_roles(found: dict[str, str], needed: Iterable[str], there: list[str]) -> None:
    """Add `history` and `current` if the names of the checkpoints are unambiguous."""
    history, current = found.get("history"), found.get("current")
    if history is None and ("history" in needed or "current" in needed):
        history = next((n for n in ("base", "step-0") if n in there and n != current), None)
    if current is None:
        current = _only_or_last([n for n in there if n != history])
        if current is None and "current" in needed and "history" not in needed and "history" not in found:
            current = _only_or_last(there)
    if history is None and "history" in needed:
        alone = "current" not in needed and "current" not in found
        history = _only_or_last([n for n in there if n != current]) or (
            _only_or_last(there) if alone else None
        )
    found |= {r: n for r, n in (("history", history), ("current", current)) if n is not None}


def check_compared(method: str, history: str | None, current: str | None) -> None:
    """Refuse a method that compares history and current where both are the same checkpoint."""
    if history == current and {"history", "current"} <= set(get_method(method).roles):
        raise UsageError(
            f"history and current are both {current!r}; method {method!r} compares two checkpoints, name another"
        )


def _only_or_last(names: list[str]) -> str | None:
    """The only name; or, among `step-*` names, the highest step."""
    if len(names) == 1:
        return names[0]
    steps = [n for n in names if n.removeprefix("step-").isdigit()]
    return max(steps, key=lambda n: int(n.removeprefix("step-"))) if steps else None
