"""Which checkpoints a run scores, with which signals, and which checkpoint plays which role of a selection."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sstoken.errors import UsageError
from sstoken.methods import Input
from sstoken.pipeline.checkpoint_names import (
    check_compared,
    check_name,
    check_roles,
    enter,
    named_checkpoints,
)
from sstoken.pipeline.sections import ScoreSection, SelectSection
from sstoken.signals import get_signal

LAST = "last"
NO_ATTENTION = "none"
_SNAPSHOT = re.compile(r"step-\d+(-ema)?")
History = Mapping[str, str]
"""The checkpoints that an anchor run left: name to path, in the order of training."""


class Promised(dict[str, str]):
    """The history that an anchor run will leave: any snapshot is in it, and stands for the base model."""

    def __init__(self, model: str) -> None:
        super().__init__({"step-0": model, LAST: model})
        self._model = model

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and bool(_SNAPSHOT.fullmatch(name)))

    def __missing__(self, name: str) -> str:
        return self._model


class Resolver:
    """Finds checkpoints: those of anchor runs by name, others by path."""

    def __init__(self, histories: Mapping[str, History | None]) -> None:
        """`histories`: those of earlier anchor steps, by step; None: the step has not run yet."""
        self._histories = histories

    @property
    def known(self) -> History:
        """The checkpoints that can be named without their run: those of the only anchor run."""
        only = next(iter(self._histories.values()), None) if len(self._histories) == 1 else None
        return {} if only is None else only

    def run_of(self, given: str) -> str | None:
        """The anchor step in a name such as `train/last`; None: the name has none."""
        step, slash, _ = given.partition("/")
        return step if slash and step in self._histories else None

    def unknown(self, given: str) -> bool:
        """Whether the checkpoint belongs to an anchor step that has not run yet."""
        run = self.run_of(given)
        return run is not None and self._histories[run] is None

    def waits_for(self, score: ScoreSection, selections: Iterable[SelectSection]) -> list[str]:
        """The anchor steps that must run before it is known what to score."""
        if len(self._histories) == 1:
            return self._still_to_run()
        sections: list[ScoreSection | SelectSection] = [score, *selections]
        named = [given for section in sections for given in _named(section)]
        return list(dict.fromkeys(step for given in named for step in self.awaited(given)))

    def awaited(self, given: str) -> list[str]:
        """The anchor step that has to run before one checkpoint is known."""
        if self.unknown(given):
            return [str(self.run_of(given))]
        named = (given == LAST or _SNAPSHOT.fullmatch(given)) and not Path(given).exists()
        return self._still_to_run() if named and len(self._histories) == 1 else []

    def _still_to_run(self) -> list[str]:
        return [name for name, history in self._histories.items() if history is None]

    def asked(self, score: ScoreSection, checkpoint: str) -> tuple[str, ...]:
        """The anchor steps from which a scored checkpoint may come."""
        if len(self._histories) == 1:
            return tuple(self._histories)
        listed = score.checkpoints
        given = listed.get(checkpoint, "") if isinstance(listed, dict) else checkpoint
        run = self.run_of(given)
        return tuple(self._histories) if run is None else (run,)

    def resolve(self, given: str, others: Iterable[str] = ()) -> tuple[str, str]:
        """Return name and path of a checkpoint.

        Raises:
            UsageError: no such checkpoint; lists the known ones and `others`.
        """
        run = self.run_of(given)
        known = self.known if run is None else self._histories[run]
        assert known is not None, "called only once the run is finished"
        wanted = given if run is None else given.partition("/")[2]
        steps = [name for name in known if not name.endswith("-ema")]
        name = steps[-1] if wanted == LAST and steps else wanted
        if name in known:
            return (name if run is None else f"{run}-{name}"), known[name]
        if run is not None:
            raise UsageError(f"checkpoint {given!r}: {run} left no such one; there are: {', '.join(known)}")
        name, ref = next(iter(named_checkpoints([given]).items()))
        if "/" not in ref and not Path(ref).exists():
            there = ", ".join([*known, *others]) or "none"
            raise UsageError(f"checkpoint {given!r}: no such folder, and not one of this run's ({there})")
        return name, ref


@dataclass
class Scored:
    """What a score step measures, and the roles of its checkpoints in each selection."""

    refs: dict[str, str] = field(default_factory=dict)
    """Every checkpoint: name to path."""
    attended: set[str] = field(default_factory=set)
    """Checkpoints whose prompt attention is measured."""
    signals: dict[str, list[str]] = field(default_factory=dict)
    """By checkpoint: the signals that selections need besides loss and attention."""
    roles: dict[str, dict[str, str]] = field(default_factory=dict)
    """By selection: the checkpoint in each role."""


def scored_for(
    name: str,
    score: ScoreSection,
    selections: Iterable[tuple[str, SelectSection]],
    resolver: Resolver,
    *,
    short: bool,
) -> Scored:
    """Plan a score step for the selections that read it.

    Args:
        name, score: the step's name and section.
        selections: their names and sections.
        resolver: finds checkpoints.
        short: whether the run is written as sections; roles then default to its history's first and last checkpoint.

    Raises:
        UsageError: a missing checkpoint, a role without a checkpoint, or a checkpoint compared with itself.
    """
    scored, known = Scored(), resolver.known
    listed = score.checkpoints
    if isinstance(listed, dict):
        for checkpoint, given in listed.items():
            check_name(checkpoint, f"{checkpoint}: {given}", given)
            scored.refs[checkpoint] = resolver.resolve(given, scored.refs)[1]
    else:
        for given in listed or ():
            enter(scored.refs, *resolver.resolve(given, scored.refs))
    if not scored.refs and not known:
        raise UsageError(
            f"{name}.checkpoints is empty and there is no anchor run; name two checkpoints, or add a section anchor"
        )
    from_history = known and (short or not scored.refs)

    def entered(given: str) -> str:
        if given in scored.refs:
            return given
        checkpoint, ref = resolver.resolve(given, scored.refs)
        enter(scored.refs, checkpoint, ref)
        return checkpoint

    for selection, section in selections:
        check_roles(section.roles)
        roles = {role: entered(given) for role, given in section.roles.items()}
        for role, asked, end in (("history", section.history, 0), ("current", section.current, -1)):
            if asked is not None and roles.get(role, asked) != asked:
                raise UsageError(f"{selection}: role {role!r} is given twice; give it once")
            default = ("step-0", LAST)[end] if from_history else list(scored.refs)[end]
            roles[role] = entered(asked or roles.get(role) or default)
        roles = {role: roles[role] for role in ("history", "current", *roles)}
        _add_needs(selection, section, roles, score, scored)
        if score.attention_from != NO_ATTENTION:
            roles["attention"] = entered(score.attention_from or roles["current"])
            scored.attended.add(roles["attention"])
        scored.roles[selection] = roles
    if score.attention_from not in (None, NO_ATTENTION):
        scored.attended.add(entered(str(score.attention_from)))
    return scored


def _add_needs(
    selection: str, section: SelectSection, roles: Mapping[str, str], score: ScoreSection, scored: Scored
) -> None:
    """Record the signals that the selection's methods need; refuse a selection that lacks a role."""
    for method in section.methods():
        name = method.name
        check_compared(name, roles["history"], roles["current"])
        for role in method.roles:
            if role not in roles:
                raise UsageError(
                    f"{selection}: method {name!r} needs a checkpoint in the role {role!r}; say "
                    f"{selection}.roles.{role}"
                )
        of_examples = section.examples.inputs({r: Path() for r in roles}) if section.examples else ()
        for signal_of in map(Input, (*method.inputs, *of_examples)):
            signal = signal_of.signal
            if get_signal(signal).needs == "generation":
                continue  # that is a step of its own
            if signal == "attention" and score.attention_from == NO_ATTENTION:
                raise UsageError(
                    f"score.attention_from is {NO_ATTENTION!r}, and method {name!r} needs attention; name a "
                    "checkpoint, or choose a method without it"
                )
            if signal not in ("loss", "attention"):
                kind, at, other = signal.partition("@")
                wanted = f"{kind}@{roles[other]}" if at and other in roles else signal
                needed = scored.signals.setdefault(roles[signal_of.role], [])
                if wanted not in needed:
                    needed.append(wanted)


def _named(section: ScoreSection | SelectSection) -> Iterator[str]:
    """Every checkpoint that a section names."""
    if isinstance(section, ScoreSection):
        listed = section.checkpoints or ()
        yield from listed.values() if isinstance(listed, dict) else listed
        if section.attention_from is not None:
            yield section.attention_from
    else:
        yield from section.roles.values()
        yield from (given for given in (section.history, section.current) if given is not None)
