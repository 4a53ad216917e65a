"""From a configuration to the jobs of a run, in order.

What is scored can depend on what the anchor run left behind, so the jobs are made one after the other.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from sstoken.errors import UsageError
from sstoken.methods import get_method
from sstoken.pipeline.config import RunConfig, ScoreSection, SelectSection
from sstoken.pipeline.runner import Job, State, state
from sstoken.stages.anchor import Anchor
from sstoken.stages.encode import Encode
from sstoken.stages.manifest import MANIFEST, Digests, read_manifest
from sstoken.stages.score import Score, ScoreOptions
from sstoken.stages.select import Select
from sstoken.stages.training.history_index import INDEX, read_history

LAST = "last"
NO_ATTENTION = "none"
_SNAPSHOT = re.compile(r"step-\d+(-ema)?")


@dataclass(frozen=True)
class Step:
    """One job of a run, or the promise of one."""

    name: str
    """`encode`, `anchor`, `score/<checkpoint>`, `select`."""
    job: Job | None
    """None: not known before an earlier step has run."""
    next_checkpoint: str | None = None
    """What the step after it loads."""

    @property
    def stage(self) -> str:
        """The stage's name."""
        return self.name.partition("/")[0]


def check_run(config: RunConfig) -> None:
    """Refuse, before any work, what can be seen to be wrong without doing it.

    Raises:
        UsageError: a section's field, or a checkpoint's name.
        SstokenError: an incomplete checkpoint.
    """
    for section in (config.encode, config.anchor, config.select):
        if section is not None:
            section.check()
    promised: dict[str, str] = {}
    if config.anchor is not None:
        listed = config.score.checkpoints or ()
        named = (*(listed.values() if isinstance(listed, dict) else listed), config.score.attention_from)
        named += (config.select.history, config.select.current)
        snapshots = ("step-0", *(name for name in named if name and _SNAPSHOT.fullmatch(name)), LAST)
        promised = dict.fromkeys(snapshots, config.anchor.model)
    roles, refs = _roles(config.score, config.select, promised)
    options = _fields(ScoreOptions, config.score)
    for name, ref in refs.items():
        Score(checkpoint=ref, attention=name == roles.get("attention"), **options).check()


def run_steps(config: RunConfig) -> Iterator[Step]:
    """The steps of a run; ask for the next one when the last is finished."""
    run = config.folder
    tokens, history = run / Encode.folder, run / Anchor.folder
    scores, masked = run / Score.folder, run / Select.folder
    yield Step("encode", Job(config.encode, {}, tokens, config.seed))
    if config.anchor is not None:
        yield Step("anchor", Job(config.anchor, {"tokens": tokens}, history, config.seed))
        if not (history / INDEX).is_file():
            yield Step("score", None)
            yield Step("select", None)
            return
    known = {e.name: e.path for e in read_history(history)} if config.anchor is not None else {}
    roles, refs = _roles(config.score, config.select, known)
    options = _fields(ScoreOptions, config.score)
    following = dict(pairwise(refs))
    for name, ref in refs.items():
        job = score_job(ref, name == roles.get("attention"), options, tokens, scores / name)
        yield Step(f"score/{name}", job, refs.get(following.get(name, "")))
    inputs = {role: scores / name for role, name in roles.items()}
    select = Select(**_fields(Select, config.select))
    yield Step("select", Job(select, {"tokens": tokens, **inputs}, masked, config.seed))


def score_job(ref: str, attention: bool, options: Mapping[str, object], tokens: Path, out: Path) -> Job:
    """The job that scores one checkpoint; finished scores that hold more signals are as good."""
    stage = Score(checkpoint=ref, attention=attention, **options)
    job = Job(stage, {"tokens": tokens}, out, seed=0)
    finished = read_manifest(out)
    if (
        finished is None
        or finished.stage != stage.name
        or (more := stage.holding(finished.settings)) == stage
    ):
        return job
    with_more = replace(job, stage=more)
    return with_more if state(with_more, Digests()) is State.FINISHED else job


def named_checkpoints(refs: Iterable[str]) -> dict[str, str]:
    """Checkpoints by name from `PATH` (named after its folder) or `NAME=PATH`; a name holds no slash.

    Raises:
        UsageError: two of one name, or a name that cannot be a folder's.
    """
    named: dict[str, str] = {}
    for given in refs:
        name, separator, ref = given.partition("=")
        if not separator or ("/" in name and not _names_a_folder(given, ref)):
            ref, name = given, Path(given.partition("@")[0]).name or Path(given).resolve().name
        _check_name(name, given, ref)
        _enter(named, name, ref)
    if not named:
        raise UsageError("no checkpoint given; name at least one")
    return named


def _names_a_folder(given: str, ref: str) -> bool:
    """Whether `NAME=PATH` was meant though NAME holds a slash; a path may hold `=` itself: runs/lr=1e-5/step-100."""
    return not Path(given).expanduser().is_dir() and Path(ref).expanduser().is_dir()


def _check_name(name: str, given: str, ref: str) -> None:
    if not name or "/" in name or name.startswith("."):
        raise UsageError(f"checkpoint {given!r}: {name!r} cannot be a folder's name; write NAME={ref}")


def _enter(named: dict[str, str], name: str, ref: str) -> None:
    """Add a checkpoint, unless another one has that name."""
    if named.setdefault(name, ref) != ref:
        raise UsageError(f"two checkpoints are called {name!r}; name one of them: NAME={ref}")


def given_roles(roles: Mapping[str, str], history: str | None, current: str | None) -> dict[str, str]:
    """The checkpoint's name by role, of those given.

    Raises:
        UsageError: a role that is given twice, with two names.
    """
    found = dict(roles)
    for role, name in (("history", history), ("current", current)):
        if name is not None and found.setdefault(role, name) != name:
            raise UsageError(f"role {role!r} is given twice: {name!r} and {found[role]!r}; give it once")
    return found


def select_inputs(method: str, scores: Path, given: Mapping[str, str]) -> dict[str, Path]:
    """The score folders that a selection reads, by role, found below `scores`.

    Args:
        method: its roles decide what has to be there.
        scores: holds a folder for each scored checkpoint.
        given: the checkpoint's name by role. Where there is none, `history` is `base`, `step-0` or the one that is not
            current, and `current` the only other one, or the one of the highest step.

    Raises:
        UsageError: a name that is not there, or several that could be meant.
    """
    if not scores.is_dir():
        raise UsageError(f"{scores}: no such folder; name the one that holds the checkpoints' scores")
    if (scores / MANIFEST).is_file():
        raise UsageError(
            f"{scores}: the scores of one checkpoint, or other work; name the folder above scores"
        )
    folders = sorted(p for p in scores.iterdir() if p.is_dir())
    there = [p.name for p in folders if (p / MANIFEST).is_file()]
    listed = f"there are: {', '.join(there) or 'none'}"
    if len(there) < len(folders):
        listed += f" (unfinished: {', '.join(p.name for p in folders if p.name not in there)})"
    found = dict(given)
    for name in found.values():
        if name not in there:
            raise UsageError(f"{scores}: no finished scores of {name!r}; {listed}")
    needed = get_method(method).roles
    _guess_roles(found, needed, there)
    attended = [name for name in there if _has_attention(scores / name)]
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
    _check_compared(method, found.get("history"), found.get("current"))
    return {role: scores / name for role, name in found.items()}


def _guess_roles(found: dict[str, str], needed: Iterable[str], there: list[str]) -> None:
    """Add `history` and `current` where the names leave no doubt."""
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


def _check_compared(method: str, history: str | None, current: str | None) -> None:
    if history == current and {"history", "current"} <= set(get_method(method).roles):
        raise UsageError(
            f"history and current are both {current!r}; method {method!r} compares two checkpoints, name another"
        )


def _only_or_last(names: list[str]) -> str | None:
    """The only name; or, of `step-*` names, the highest step."""
    if len(names) == 1:
        return names[0]
    steps = [n for n in names if n.removeprefix("step-").isdigit()]
    return max(steps, key=lambda n: int(n.removeprefix("step-"))) if steps else None


def _has_attention(folder: Path) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and bool(
        manifest.settings.get("attention") or "attention" in manifest.settings.get("signals", ())
    )


def _roles(
    score: ScoreSection, select: SelectSection, known: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Which checkpoint plays which role, and every checkpoint to score, by name.

    `known`: the run's history, name to path, in the order of training; empty without an anchor run.
    """

    def resolve(given: str) -> tuple[str, str]:
        steps = [name for name in known if not name.endswith("-ema")]
        name = steps[-1] if given == LAST and steps else given
        if name in known:
            return name, known[name]
        name, ref = next(iter(named_checkpoints([given]).items()))
        if "/" not in ref and not Path(ref).exists():
            there = ", ".join({**known, **refs}) or "none"
            raise UsageError(f"checkpoint {given!r}: no such folder, and not one of this run's ({there})")
        return name, ref

    refs: dict[str, str] = {}
    listed = score.checkpoints
    if isinstance(listed, dict):
        for name, given in listed.items():
            _check_name(name, f"{name}: {given}", given)
            refs[name] = resolve(given)[1]
    else:
        for given in listed or ():
            _enter(refs, *resolve(given))
    if not refs and not known:
        raise UsageError("score.checkpoints is empty and there is no anchor run; name two checkpoints")

    def role(given: str | None, default: str) -> str:
        name = given or default
        if name in refs:
            return name
        name, ref = resolve(name)
        _enter(refs, name, ref)
        return name

    history = role(select.history, "step-0" if known else next(iter(refs)))
    current = role(select.current, LAST if known else list(refs)[-1])
    _check_compared(select.method, history, current)
    roles = {"history": history, "current": current}
    if score.attention_from != NO_ATTENTION:
        roles["attention"] = role(score.attention_from, current)
    elif "current.attention" in get_method(select.method).inputs:
        raise UsageError(
            f"score.attention_from is {NO_ATTENTION!r}, and method {select.method!r} needs attention; name a "
            "checkpoint, or choose a method without it"
        )
    return roles, refs


def _fields(
    of: type[ScoreOptions] | type[Select], section: ScoreSection | SelectSection
) -> dict[str, object]:
    """The fields of a section that were given and that the stage itself has."""
    return {name: getattr(section, name) for name in of.model_fields if name in section.model_fields_set}
