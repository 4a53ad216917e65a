"""Kill every verb, or let the disk fail, at fault points and at random times; then the command has to make it good.

Called as `python -m tests.crash.campaign --trials 2000`; prints the counts, and exits with 1 after a failure. A trial
is drawn from the seed alone: `--only 17` repeats the one of that number.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tests.crash.warm import FOREVER, Fault, Outcome, call, import_all

DISK = ("ENOSPC", "EIO", "EACCES", "short")
KIND_WEIGHTS = {"kill": 6, "time": 3, "workers": 1, "ENOSPC": 2, "EIO": 1, "EACCES": 1, "short": 1}
"""`kill` at a fault point or request; `time`: at a random time; `workers`: so, of several processes or their parent."""
_SECONDS_MORE = 1.1


@dataclass(frozen=True)
class Trial:
    """One attempt to lose work."""

    number: int
    job: str
    kind: str
    at: float
    """Fault point or request (the number), or share of the time that the command takes."""
    by: str
    """What `at` counts: `any` fault point, `request`, `time`."""
    on: bool
    """Whether everything after a disk's fault fails, too."""
    then: str
    """What comes after: the `same` command; `other` settings; `twice`: the same fault again, then the same command;
    `force`: the command was to replace finished work."""


class Campaign:
    """Trials in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        from tests.crash.jobs import build, contents, succeeded

        self.folder, self.jobs = folder, build(folder / "world")
        self.points: dict[str, Counter[str]] = {}
        self.seconds: dict[str, float] = {}
        self.expected: dict[tuple[str, bool], dict[str, Any]] = {}
        for name in self.jobs:
            for other in (False, True):
                place = folder / f"whole-{name}-{other}"
                place.mkdir()
                arguments = self.arguments(name, other, place)
                outcome = call(arguments, place, Fault("none:any:1"))
                succeeded(outcome, arguments)
                self.expected[name, other] = contents(self._result(name, place))
                if not other:
                    self.points[name], self.seconds[name] = outcome.passed, outcome.seconds
            if name != "pull":
                assert self.expected[name, False] != self.expected[name, True], name

    def arguments(self, name: str, other: bool, place: Path) -> list[str]:
        """The command of a job that writes into `place`."""
        job = self.jobs[name]
        where = [*([] if name == "run" else ["--out", "out"])]
        where += ["--repo", f"me/{place.name}"] if name == "publish" else []
        return [*(job.other if other else job.first), *where]

    def _result(self, name: str, place: Path) -> Path:
        """The folder whose content counts: of a publication, what others get."""
        if name != "publish":
            return place / "out"
        outcome = call(["pull", f"me/{place.name}", "--out", "pulled"], place)
        assert outcome.code == 0, outcome
        (place / "shards").mkdir()
        for path in (place / "pulled").glob("part-*"):
            shutil.copy(path, place / "shards")
        return place / "shards"

    def draw(self, number: int, seed: int) -> Trial:
        """The trial of that number."""
        chance = random.Random(f"{seed}/{number}")
        jobs = list(self.jobs.values())
        job = chance.choices(jobs, [each.weight for each in jobs])[0]
        kind = chance.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
        if kind == "workers" and not job.workers:
            kind = "kill"
        by, at = "any", float(chance.randint(1, self.points[job.name]["any"]))
        if kind in ("time", "workers"):
            by, at = "time", chance.random() * _SECONDS_MORE
        elif kind == "kill" and self.points[job.name]["request"] and chance.random() < 0.5:
            by, at = "request", float(chance.randint(1, self.points[job.name]["request"]))
        thens = ["same", "same", "other", "twice", *(["force"] if job.force else [])]
        return Trial(number, job.name, kind, at, by, chance.random() < 0.5, chance.choice(thens))

    def run(self, trial: Trial) -> str:
        """Do it; `injected`, or `not reached` where the command had ended before.

        Raises:
            AssertionError: something was lost, half-written or mixed.
        """
        from tests.crash.jobs import broken, contents, left_over

        job, place = self.jobs[trial.job], self.folder / f"t{trial.number}"
        place.mkdir()
        first, more = self.arguments(trial.job, False, place), []
        if trial.then == "force":
            shutil.copytree(self.folder / f"whole-{trial.job}-True/out", place / "out")
            first = [*first, *job.force]
        if trial.kind == "workers":
            more = [*job.workers]
            at = first.index("--workers") if "--workers" in first else len(first)
            first = [*first[:at], *first[at + 2 :]]
        fault = self._fault(trial)
        hit = False
        for _ in range(2 if trial.then == "twice" else 1):
            outcome = call([*first, *more], place, fault)
            hit |= self._check_failed(trial, outcome)
            assert broken(place) == [], "half-written work is read as complete"
        kept = _complete_shards(place) if trial.then in ("same", "twice") else {}
        other = trial.then == "other"
        last = self.arguments(trial.job, True, place) if other else first
        outcome = call(last, place)
        if other and outcome.code == 2 and "holds finished work of other settings" in outcome.err:
            last = [*last, *job.force]
            outcome = call(last, place)
        assert outcome.code == 0, f"not gone on with: {outcome}"
        found, expected = contents(self._result(trial.job, place)), self.expected[trial.job, other]
        differing = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
        assert not differing, f"other content than of an uninterrupted run: {differing}"
        assert left_over(place / "out") + left_over(place) == [], "unfinished work is left"
        verified = call(["verify", "out"], place)
        assert verified.code == 0, verified
        lost = [name for name, inode in kept.items() if _inode(place / name) != inode]
        assert not lost, f"complete shards were made again: {lost}"
        shutil.rmtree(place)
        return "injected" if hit else "not reached"

    def _fault(self, trial: Trial) -> Fault:
        if trial.by == "time":
            alone = trial.kind == "workers" and trial.on
            seconds = self.seconds[trial.job] + (
                8 if trial.kind == "workers" else 0
            )  # they take time to start
            return Fault(after=trial.at * seconds, alone=alone)
        if trial.by == "request":
            return Fault(request=int(trial.at))
        on = "+" if trial.on and trial.kind != "kill" else ""
        return Fault(f"{trial.kind}:{trial.by}:{int(trial.at)}{on}", request=FOREVER)

    def _check_failed(self, trial: Trial, outcome: Outcome) -> bool:
        """Whether the fault happened; it has to be told well."""
        if trial.kind not in DISK:
            assert outcome.code in (None, 0), outcome
            return outcome.code is None
        if outcome.code == 0:  # a short write; a cache that could not be written
            return trial.kind == "short" or trial.then != "twice"
        lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        assert (outcome.code, len(lines)) == (1, 1), outcome
        assert "Traceback" not in outcome.err, outcome
        assert re.match(
            r"error: (1 of the shards failed .*: )?[^ ]*(out|t\d+|masked|publish)[^ ]*[: ]", lines[0]
        ), lines[0]
        if trial.kind == "ENOSPC":
            assert "no space left on the disk at" in lines[0], lines[0]
            assert " free of " in lines[0], lines[0]
        return True


def _complete_shards(place: Path) -> dict[str, int]:
    """Inodes of the shards that stand complete, by where they are in the end."""
    from sstoken.stages import tables

    found = {}
    for path in place.rglob("part-*.parquet"):
        name = "/".join(part.removesuffix(".partial") for part in path.relative_to(place).parts)
        if ".download" not in name and ".replaced" not in name and tables.is_sound(path):
            found[name] = _inode(path)
    return found


def _inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else -1


def main() -> int:
    """Do the trials; print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int, help="the number of one trial")
    parser.add_argument("--minutes", type=float, help="begin no trial after that time")
    parser.add_argument("--careless", action="store_true", help="write files in place, so that work is lost")
    asked = parser.parse_args()
    numbers = range(asked.trials) if asked.only is None else [asked.only]
    folder = Path(tempfile.mkdtemp(prefix="sstoken-crash-"))
    try:
        from tests.crash.hub import start

        start(folder / "hub")
        import_all()
        if asked.careless:
            _write_in_place()
        campaign = Campaign(folder)
        results = _spread(campaign, list(numbers), asked.seed, asked.processes, folder, asked.minutes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failures = [result for result in results if result["failure"]]
    summary = {
        "trials": len(results),
        "points": len({(r["job"], r["by"], r["at"]) for r in results if r["by"] != "time"}),
        "kills at points": sum(r["kind"] == "kill" and r["end"] == "injected" for r in results),
        "kills at random times": sum(r["by"] == "time" and r["end"] == "injected" for r in results),
        "disk faults": sum(r["kind"] in DISK and r["end"] == "injected" for r in results),
        "ended before": sum(r["end"] == "not reached" for r in results),
        "by job": dict(Counter(r["job"] for r in results)),
        "failures": len(failures),
    }
    print(json.dumps(summary, indent=1))
    for failure in failures:
        print(json.dumps(failure), file=sys.stderr)
    return 1 if failures or not results or (len(results) < len(numbers) and asked.minutes is None) else 0


def _write_in_place() -> None:
    """Break the storage's promise: what the trials are for has to come out."""
    from sstoken.stages import faults, storage

    @contextmanager
    def put(self: storage.LocalDisk, file: Path) -> Iterator[BinaryIO]:
        with faults.create(file) as opened:
            yield opened

    storage.LocalDisk.put = put  # type: ignore[method-assign]


def _spread(
    campaign: Campaign, numbers: list[int], seed: int, processes: int, folder: Path, minutes: float | None
) -> list[dict[str, Any]]:
    children = []
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    for slot in range(processes):
        if (child := os.fork()) == 0:
            with open(folder / f"results-{slot}", "w", buffering=1) as file:
                for number in numbers[slot::processes]:
                    if time.monotonic() > end:
                        break
                    file.write(json.dumps(_tried(campaign, campaign.draw(number, seed))) + "\n")
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [json.loads(line) for path in folder.glob("results-*") for line in path.read_text().splitlines()]


def _tried(campaign: Campaign, trial: Trial) -> dict[str, Any]:
    end, failure = "", ""
    try:
        end = campaign.run(trial)
    except Exception:
        failure = traceback.format_exc()[-2500:]
        print(f"failed: {trial}\n{failure}", file=sys.stderr, flush=True)
    return {**asdict(trial), "end": end, "failure": failure}


if __name__ == "__main__":
    sys.exit(main())
