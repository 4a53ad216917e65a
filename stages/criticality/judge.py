"""Find critical response tokens: those without which greedy decoding no longer reaches a right answer.

After Critical Token Fine-tuning (arXiv 2510.10974, known second-hand). In each problem that the model answers rightly
by greedy decoding, replace each response token by the likeliest other tokens, one at a time; if every continuation is
wrong, the token is critical.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sstoken.measure.branches import Branch, Continuation, IdArray
from sstoken.stages.backends.generation import Generator
from sstoken.stages.criticality.checkers import Checker, CheckerError

RIGHT, WRONG = "right", "wrong"
NO_REFERENCE = "reference not accepted"
RAISED = "checker raised"
OUTCOMES = (RIGHT, WRONG, NO_REFERENCE, RAISED)
_BRANCHES_TOGETHER = 512


@dataclass(frozen=True)
class Problem:
    """An example whose last response is to be judged."""

    ids: IdArray
    """[T], prompt and response."""
    first: int
    """Where the response starts; it extends to the last token."""


@dataclass
class Verdict:
    """The result for one problem."""

    outcome: str
    """One of `OUTCOMES`."""
    critical: NDArray[np.float32]
    """[n], for the n response tokens: 1 critical, 0 not critical, NaN not tried."""
    tried: NDArray[np.bool_]
    """[n]: whether the budget covers the token."""
    error: str | None = None
    """The checker's first exception."""
    cut: bool = False
    """Whether the model's own answer was cut at `max_new_tokens`."""
    cut_branches: int = 0
    """Number of continuations that were cut."""


@dataclass(frozen=True)
class Judge:
    """Judges problems with a generator and a checker."""

    generator: Generator
    checker: Checker
    text: Callable[[Sequence[int]], str]
    """Decodes tokens, without special ones."""
    stop: frozenset[int]
    max_positions: int
    """0: all."""
    alternatives: int
    max_new_tokens: int
    advance: Callable[[int], None] = field(default=lambda _: None)
    """Called with the number of problems that were completed."""

    def __call__(self, problems: Sequence[Problem]) -> list[Verdict]:
        """Judge problems, holding all of them in memory.

        Where the checker raises, the problem or the position counts as not tried.
        """
        references = [self.text(p.ids[p.first :].tolist()) for p in problems]
        verdicts = [self._unanswered(p, r) for p, r in zip(problems, references, strict=True)]
        asked = [i for i, verdict in enumerate(verdicts) if verdict.outcome == WRONG]
        for branch, answer in self._continue(problems, [Branch(i, problems[i].first) for i in asked]):
            i = branch.sequence
            verdict = verdicts[i]
            verdict.cut = not answer.ended
            right = self._is_right(self.text(answer.ids.tolist()), references[i], verdict)
            verdict.outcome = RAISED if right is None else RIGHT if right else WRONG
        right_ones = [i for i in asked if verdicts[i].outcome == RIGHT]
        self.advance(len(problems) - len(right_ones))
        chosen = {i: chosen_positions(verdicts[i].tried.size, self.max_positions) for i in right_ones}
        for group in _groups({i: places.size * self.alternatives for i, places in chosen.items()}):
            self._try({i: chosen[i] for i in group}, problems, references, verdicts)
            self.advance(len(group))
        return verdicts

    def _unanswered(self, problem: Problem, reference: str) -> Verdict:
        """Return an initial verdict: `WRONG` until the answer is known, unless the checker refuses the reference."""
        count = problem.ids.size - problem.first
        verdict = Verdict(WRONG, np.full(count, np.nan, np.float32), np.zeros(count, bool))
        accepted = self._is_right(reference, reference, verdict)
        if not accepted:
            verdict.outcome = RAISED if accepted is None else NO_REFERENCE
        return verdict

    def _try(
        self,
        chosen: Mapping[int, NDArray[np.int64]],
        problems: Sequence[Problem],
        references: Sequence[str],
        verdicts: Sequence[Verdict],
    ) -> None:
        """Replace the tokens at the chosen places of some problems."""
        for i, places in chosen.items():
            verdicts[i].tried[places] = True
            verdicts[i].critical[places] = 1  # until a continuation ends right
        ranked = self.generator.candidates(
            [problems[i].ids for i in chosen],
            [(problems[i].first + places).astype(np.int32) for i, places in chosen.items()],
            self.alternatives + 1,
        )
        for rank in range(self.alternatives):
            branches = []
            for (i, places), candidates in zip(chosen.items(), ranked, strict=True):
                problem = problems[i]
                for place, row in zip(places.tolist(), candidates.tolist(), strict=True):
                    others = [token for token in row if token != problem.ids[problem.first + place]]
                    # Otherwise a continuation ended right already, or the checker raised.
                    if verdicts[i].critical[place] == 1:
                        branches.append(Branch(i, problem.first + place, others[rank]))
            for branch, continuation in self._continue(problems, branches):
                problem, verdict = problems[branch.sequence], verdicts[branch.sequence]
                place = branch.length - problem.first
                verdict.cut_branches += not continuation.ended
                before = problem.ids[problem.first : branch.length].tolist()
                before += [] if branch.token is None else [branch.token]
                answer = self.text([*before, *continuation.ids.tolist()])
                right = self._is_right(answer, references[branch.sequence], verdict)
                if right is None:
                    verdict.critical[place] = np.nan
                elif right:
                    verdict.critical[place] = 0

    def _continue(
        self, problems: Sequence[Problem], branches: Sequence[Branch]
    ) -> Iterator[tuple[Branch, Continuation]]:
        sequences = [problem.ids for problem in problems]
        found = self.generator.continue_greedily(sequences, branches, self.stop, self.max_new_tokens)
        return ((branches[n], continuation) for n, continuation in found)

    def _is_right(self, answer: str, reference: str, verdict: Verdict) -> bool | None:
        """Return the checker's verdict; None if it raised."""
        try:
            return self.checker(answer, reference)
        except CheckerError as error:
            verdict.error = verdict.error or str(error)
            return None


def chosen_positions(count: int, most: int) -> NDArray[np.int64]:
    """Return the places to try in a response of `count` tokens: all, or the middle of each of `most` equal parts."""
    if not most or count <= most:
        return np.arange(count)
    return ((2 * np.arange(most) + 1) * count) // (2 * most)


def _groups(sizes: Mapping[int, int]) -> Iterator[list[int]]:
    """Group problems so that each group but the last has enough branches for a batch."""
    group: list[int] = []
    total = 0
    for index, size in sizes.items():
        group.append(index)
        total += size
        if total >= _BRANCHES_TOGETHER:
            yield group
            group, total = [], 0
    if group:
        yield group
