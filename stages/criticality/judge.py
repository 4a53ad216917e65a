"""Which response tokens are critical: without them, greedy decoding no longer ends right.

Critical Token Fine-tuning (arXiv 2510.10974, known second-hand): of a problem that the model answers rightly by greedy
decoding, each response token is replaced by the likeliest other tokens, one at a time; if every continuation ends
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
    """[T], the prompt and the response."""
    first: int
    """Where the response begins; it ends with the last token."""


@dataclass
class Verdict:
    """What was found of one problem."""

    outcome: str
    """One of `OUTCOMES`."""
    critical: NDArray[np.float32]
    """[n], of the response tokens: 1 critical, 0 not, NaN not tried."""
    tried: NDArray[np.bool_]
    """[n]: chosen by the budget."""
    error: str | None = None
    """What a checker raised first."""
    cut: bool = False
    """The model's own answer did not end within the limit."""
    cut_branches: int = 0
    """How many continuations did not."""


@dataclass(frozen=True)
class Judge:
    """How problems are judged."""

    generator: Generator
    checker: Checker
    text: Callable[[Sequence[int]], str]
    """The text of some tokens, without special ones."""
    stop: frozenset[int]
    max_positions: int
    """0: all."""
    alternatives: int
    max_new_tokens: int
    advance: Callable[[int], None] = field(default=lambda _: None)
    """Called with the number of problems that are done."""

    def __call__(self, problems: Sequence[Problem]) -> list[Verdict]:
        """Judge some problems, of which as many are held in memory.

        A checker that raises leaves its problem, or the position that it raised at, untried.
        """
        references = [self.text(p.ids[p.first :].tolist()) for p in problems]
        verdicts = [self._unanswered(p, r) for p, r in zip(problems, references, strict=True)]
        asked = [i for i, verdict in enumerate(verdicts) if verdict.outcome == WRONG]
        for branch, said in self._continue(problems, [Branch(i, problems[i].first) for i in asked]):
            i = branch.sequence
            verdict = verdicts[i]
            verdict.cut = not said.ended
            right = self._is_right(self.text(said.ids.tolist()), references[i], verdict)
            verdict.outcome = RAISED if right is None else RIGHT if right else WRONG
        right_ones = [i for i in asked if verdicts[i].outcome == RIGHT]
        self.advance(len(problems) - len(right_ones))
        chosen = {i: chosen_positions(verdicts[i].tried.size, self.max_positions) for i in right_ones}
        for group in _groups({i: places.size * self.alternatives for i, places in chosen.items()}):
            self._try({i: chosen[i] for i in group}, problems, references, verdicts)
            self.advance(len(group))
        return verdicts

    def _unanswered(self, problem: Problem, reference: str) -> Verdict:
        """A problem whose answer is wrong until it is known; unless its own reference is not right."""
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
        """Replace the tokens at the places chosen of some problems."""
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
                    if (
                        verdicts[i].critical[place] == 1
                    ):  # else one ended right already, or the checker raised
                        branches.append(Branch(i, problem.first + place, others[rank]))
            for branch, said in self._continue(problems, branches):
                problem, verdict = problems[branch.sequence], verdicts[branch.sequence]
                place = branch.length - problem.first
                verdict.cut_branches += not said.ended
                before = problem.ids[problem.first : branch.length].tolist()
                before += [] if branch.token is None else [branch.token]
                answer = self.text([*before, *said.ids.tolist()])
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
        return ((branches[n], said) for n, said in found)

    def _is_right(self, answer: str, reference: str, verdict: Verdict) -> bool | None:
        """What the checker says; None: it raised."""
        try:
            return self.checker(answer, reference)
        except CheckerError as error:
            verdict.error = verdict.error or str(error)
            return None


def chosen_positions(count: int, most: int) -> NDArray[np.int64]:
    """Places in a response of `count` tokens that are tried: all, or `most` at even distances.

    The same for the same response, and the middle one of each of `most` equal parts.
    """
    if not most or count <= most:
        return np.arange(count)
    return ((2 * np.arange(most) + 1) * count) // (2 * most)


def _groups(sizes: Mapping[int, int]) -> Iterator[list[int]]:
    """Problems, by their numbers of branches, in groups that make good batches."""
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
