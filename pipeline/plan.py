"""Turns a configuration into the jobs of a run, in order.

What is scored can depend on the checkpoints that an anchor run left, so the jobs are made one by one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline.config import RunConfig, validated
from sstoken.pipeline.job import Job, State, state
from sstoken.pipeline.roles import History, Promised, Resolver, Scored, scored_for
from sstoken.pipeline.sections import (
    MASKED,
    SCORES,
    TOKENS,
    CriticalSection,
    ReadsSteps,
    ScoreSection,
    SelectSection,
    chosen,
    combinations,
    label,
    stage_of,
)
from sstoken.stages.anchor import Anchor
from sstoken.stages.critical import CRITICAL, Critical
from sstoken.stages.manifest import Digests, read_manifest
from sstoken.stages.score import Score, ScoreOptions, compared
from sstoken.stages.select import Select
from sstoken.stages.stage import Stage
from sstoken.stages.training.history_index import INDEX, read_history


@dataclass(frozen=True)
class Step:
    """One job of a run."""

    name: str
    """`score/<checkpoint>` for a checkpoint's scores, `select/<setting>` for one selection of a sweep, else the step's
    name."""
    kind: str
    """Its stage: `encode`, `part`, `anchor`, `critical`, `score`, `select`, `export`."""
    job: Job | None
    """None: unknown before an earlier step has run."""
    after: tuple[str, ...] = ()
    """Names of the steps whose results it needs."""

    @property
    def step(self) -> str:
        """The step's name in the configuration."""
        return self.name.partition("/")[0]

    @property
    def stage(self) -> str:
        """Alias of `step`, for programs written for the four sections."""
        return self.step


def check_run(config: RunConfig) -> None:
    """Check a run as far as possible before any work.

    Raises:
        UsageError: a field or a checkpoint's name is wrong.
        SstokenError: a checkpoint is incomplete.
    """
    try:
        for step in promised_steps(config):
            assert step.job is not None, "every checkpoint is promised"
            step.job.stage.check()
    except (UsageError, SstokenError) as error:
        raise type(error)(f"{error}{_looked(config, str(error))}") from None


def promised_steps(config: RunConfig) -> Iterator[Step]:
    """Yield the steps of a run as if every anchor run had left all its checkpoints; each step has its job."""
    return _Planner(config, promised=True).steps()


def run_steps(config: RunConfig) -> Iterator[Step]:
    """Yield the steps of a run; run each before asking for the next."""
    return _Planner(config, promised=False).steps()


def run_groups(config: RunConfig) -> Iterator[list[Step]]:
    """The steps of a run in groups that may be run together; ask for the next group when the last is finished."""
    return _Planner(config, promised=False).groups()


def score_job(ref: str, attention: bool, options: Mapping[str, object], tokens: Path, out: Path) -> Job:
    """Make the job that scores one checkpoint; finished scores with additional signals count as its output."""
    stage = Score(checkpoint=ref, attention=attention, **options)
    job = Job(stage, {"tokens": tokens}, out, seed=0)
    finished = read_manifest(out)
    if finished is not None and finished.stage == stage.name:
        with_more = replace(job, stage=stage.holding(finished.settings))
        if with_more != job and state(with_more, Digests()) is State.FINISHED:
            return with_more
    return job


class _Planner:
    """Makes the steps of a run one by one; with `promised`, as if every anchor run had left all its checkpoints."""

    def __init__(self, config: RunConfig, *, promised: bool) -> None:
        self._config, self._promised = config, promised
        self._made: dict[str, str] = {}
        """The stage of each step so far."""
        self._places: dict[str, Path] = {}
        """The folder of each step so far; a sweep has one per selection."""
        self._histories: dict[str, History | None] = {}
        """The checkpoints of each anchor step; None: it has not run yet."""
        self._resolver = Resolver(self._histories)
        self._scored: dict[str, Scored | None] = {}
        """What each score step measures; None: unknown yet."""

    def steps(self) -> Iterator[Step]:
        return chain.from_iterable(self.groups())

    def groups(self) -> Iterator[list[Step]]:
        for name, section in self._config.named.items():
            steps = list(self._steps_of(name, section))
            # no checkpoint's scores need another one's
            yield from [steps] if isinstance(section, ScoreSection) else ([step] for step in steps)
            self._made[name] = section.name
            self._places.setdefault(name, self._config.place(name))
            if isinstance(section, Anchor):
                self._histories[name] = self._history(name, section)

    def _steps_of(self, name: str, section: Stage) -> Iterator[Step]:
        if isinstance(section, ScoreSection):
            yield from self._score(name, section)
        elif isinstance(section, SelectSection):
            yield from self._select(name, section)
        elif isinstance(section, Anchor):
            yield self._anchor(name, section)
        elif isinstance(section, CriticalSection):
            yield self._critical(name, section)
        elif isinstance(section, ReadsSteps):
            reads = section.reads.items()
            inputs = {what: self._step(name, what, getattr(section, what), kinds) for what, kinds in reads}
            yield self._job(name, stage_of(section, section.runs), inputs)
        else:
            yield self._job(name, section, {})

    def _job(self, name: str, stage: Stage, inputs: Mapping[str, str], after: tuple[str, ...] = ()) -> Step:
        folders = {key: self._places[step] for key, step in inputs.items()}
        job = Job(stage, folders, self._config.place(name), self._config.seed)
        return Step(name, stage.name, job, (*after, *inputs.values()))

    def _step(self, step: str, what: str, given: str | None, kinds: tuple[str, ...]) -> str:
        """The earlier step that a step reads: the one that it names, or the only candidate."""
        there = [name for name in self._places if self._made[name.partition("/")[0]] in kinds]
        if given in there:
            return str(given)
        if given is None and len(there) == 1:
            return there[0]
        asked = "needs one step of its kind before it" if given is None else f"is {given!r}"
        raise UsageError(
            f"{step}.{what} {asked}; before it, there are: {', '.join(there) or 'none'}"
            + (f" (a step of {' or '.join(kinds)})" if not there else "")
        )

    def _anchor(self, name: str, section: Anchor) -> Step:
        tokens, masked = getattr(section, "tokens", None), getattr(section, "masked", None)
        if tokens is not None and masked is not None:
            raise UsageError(f"{name}.tokens is {tokens!r} and {name}.masked is {masked!r}; give one of them")
        if masked is not None:
            named = {"masked": self._step(name, "masked", masked, MASKED)}
        else:
            named = {"tokens": self._step(name, "tokens", tokens, TOKENS)}
        start = section.model.partition("/")[0]
        if start not in self._histories:
            return self._job(name, stage_of(section, Anchor), named)
        if self._resolver.unknown(section.model):
            return Step(name, Anchor.name, None, (start, *named.values()))
        model = self._resolver.resolve(section.model)[1]
        return self._job(name, stage_of(section, Anchor, model=model), named, (start,))

    def _critical(self, name: str, section: CriticalSection) -> Step:
        tokens = self._step(name, "tokens", section.tokens, TOKENS)
        if awaited := self._resolver.awaited(section.checkpoint):
            return Step(name, Critical.name, None, (*awaited, tokens))
        checkpoint = self._resolver.resolve(section.checkpoint)[1]
        stage = stage_of(section, Critical, checkpoint=checkpoint)
        return self._job(name, stage, {"tokens": tokens}, tuple(self._histories))

    def _history(self, name: str, section: Anchor) -> History | None:
        if self._promised:
            start, model = section.model.partition("/")[0], section.model
            return Promised(self._resolver.resolve(model)[1] if start in self._histories else model)
        folder = self._config.place(name)
        if not (folder / INDEX).is_file():
            return None
        return {entry.name: entry.path for entry in read_history(folder)}

    def _score(self, name: str, section: ScoreSection) -> Iterator[Step]:
        tokens = self._step(name, "tokens", section.tokens, TOKENS)
        resolver, selections = self._resolver, self._selections(name)
        waits = resolver.waits_for(section, [s for _, s in selections])
        if waits:
            self._scored[name] = None
            yield Step(name, Score.name, None, (*waits, tokens))
            return
        scored = scored_for(name, section, selections, resolver, short=not self._config.steps)
        self._scored[name] = scored
        base = stage_of(section, ScoreOptions)
        signals = base.signals or ("loss",)
        for checkpoint, ref in scored.refs.items():
            options = base.model_dump()
            if more := [s for s in scored.signals.get(checkpoint, ()) if s not in signals]:
                options["signals"] = (*signals, *more)
            options = compared(options, checkpoint, scored.refs)
            place = self._config.place(name) / checkpoint
            attended = checkpoint in scored.attended
            if self._promised:
                stage = Score(checkpoint=ref, attention=attended, **options)
                job = Job(stage, {"tokens": self._places[tokens]}, place, seed=0)
            else:
                job = score_job(ref, attended, options, self._places[tokens], place)
            after = (*resolver.asked(section, checkpoint), tokens)
            yield Step(f"{name}/{checkpoint}", Score.name, job, after)

    def _selections(self, score: str) -> list[tuple[str, SelectSection]]:
        """The selections that read a step's scores."""
        named = self._config.named
        scores = [n for n, s in named.items() if isinstance(s, ScoreSection)]
        return [
            (name, section)
            for name, section in named.items()
            if isinstance(section, SelectSection)
            and section.reads_scores
            and (section.scores or scores[0]) == score
        ]

    def _select(self, name: str, section: SelectSection) -> Iterator[Step]:
        tokens = self._step(name, "tokens", section.tokens, TOKENS)
        supplied: dict[str, Path] = {}
        read: list[str] = []
        if section.reads_critical:
            critical = self._step(name, "critical", section.critical, (Critical.name,))
            read.append(critical)
            supplied = {CRITICAL if section.reads_scores else "current": self._places[critical]}
        score = self._step(name, "scores", section.scores, SCORES) if section.reads_scores else None
        scored = self._scored[score] if score is not None else Scored(roles={name: {}})
        anchors = tuple(self._histories)
        given = {f: getattr(section, f) for f in Select.model_fields if f in section.model_fields_set}
        for choice in combinations(section.sweep):
            full, place = name, self._config.place(name)
            if choice:
                full, place = f"{name}/{label(choice)}", place.with_name(f"{place.name}-{label(choice)}")
            self._places[full] = place
            if scored is None:
                yield Step(full, Select.name, None, (*anchors, tokens, *read, str(score)))
                continue
            stage = validated(Select, chosen(given, choice), full)
            roles = scored.roles[name]
            inputs = {"tokens": self._places[tokens], **supplied}
            if score is not None:
                inputs |= {role: self._config.place(score) / name for role, name in roles.items()}
            after = (*anchors, tokens, *(f"{score}/{c}" for c in roles.values()), *read)
            yield Step(full, Select.name, Job(stage, inputs, place, self._config.seed), after)


def _looked(config: RunConfig, error: str) -> str:
    """For an error about a missing path, name the folders from which relative paths are resolved."""
    if config.file is None or "no such" not in error:
        return ""
    here, beside = Path.cwd(), config.file.parent.resolve()
    return f" (looked in {beside}{'' if here == beside else f' and {here}'})"
