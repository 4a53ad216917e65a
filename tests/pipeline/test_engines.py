"""The local engine: results, progress, devices, and processes that die."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from sstoken.errors import QuarantinedError, UsageError
from sstoken.pipeline import engines
from sstoken.pipeline.engines import local
from sstoken.pipeline.engines.dispatch import ATTEMPTS
from sstoken.pipeline.engines.local import LocalEngine
from sstoken.stages.stage import EngineOptions, Progress, Task, Worker
from tests.support import PATIENCE, ROOT, wait_until


class Counting(Progress):
    def __init__(self) -> None:
        self.done, self.steps = 0, 0

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        self.steps += amount != 0


class Devices(EngineOptions):
    device: str = "cuda:0,cuda:1"


def square(number: int, worker: Worker) -> tuple[int, str | None]:
    worker.advance(number)
    return number * number, worker.device


def die(work: tuple[Path, int, int], worker: Worker) -> int:
    """Die as often as asked for, after half of the work."""
    folder, number, deaths = work
    worker.advance(5)
    mine = folder / str(number)
    tries = int(mine.read_text()) if mine.exists() else 0
    mine.write_text(str(tries + 1))
    if tries < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    worker.advance(5)
    return number


def tasks_of(folder: Path, deaths: dict[int, int], count: int) -> list[Task[Any]]:
    return [Task(folder / f"part-{i}", 10, (folder, i, deaths.get(i, 0))) for i in range(count)]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_result_comes_and_all_is_counted(workers: int) -> None:
    bar = Counting()
    tasks = (Task(Path(str(i)), i, i) for i in range(20))  # read lazily
    found = list(LocalEngine(EngineOptions(workers=workers)).map(square, tasks, bar))
    assert sorted(found) == [(i * i, None) for i in range(20)]
    assert bar.done == sum(range(20))


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_what_a_dead_worker_left_is_done_again(tmp_path: Path) -> None:
    bar = Counting()
    deaths = {1: 1, 4: ATTEMPTS - 1}
    found = list(LocalEngine(EngineOptions(workers=2)).map(die, tasks_of(tmp_path, deaths, 6), bar))
    assert sorted(found) == list(range(6))
    assert {i: int((tmp_path / str(i)).read_text()) for i in range(6)} == {
        i: deaths.get(i, 0) + 1 for i in range(6)
    }
    assert bar.done == 60, "progress of an attempt in vain is taken back"


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_task_that_kills_its_worker_is_named_after_all_others_are_done(tmp_path: Path) -> None:
    bar, found = Counting(), []
    results = LocalEngine(EngineOptions(workers=2)).map(die, tasks_of(tmp_path, {2: 99}, 6), bar)
    with pytest.raises(
        QuarantinedError, match=r"part-2 \(killed by SIGKILL\); all others are done"
    ) as caught:
        found.extend(results)
    assert caught.value.exit_code == 1
    assert sorted(found) == [0, 1, 3, 4, 5]
    assert (tmp_path / "2").read_text() == str(ATTEMPTS)
    assert bar.done == 50


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_the_death_of_a_process_started_in_place_of_an_idle_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local._stop_all()
    monkeypatch.setattr(local, "_IDLE", 0.2)
    deaths = {0: 1, 1: 1}
    try:
        for round_ in range(5):  # without a second look, about two rounds in five hang
            (tmp_path / str(round_)).mkdir()
            tasks = tasks_of(tmp_path / str(round_), deaths, 2)
            assert sorted(LocalEngine(EngineOptions(workers=2)).map(die, tasks, Counting())) == [0, 1]
            wait_until(lambda: not any(pool._processes for pool in local._PROCESSES.values()))
    finally:
        local._stop_all()


def test_an_error_in_a_worker_ends_the_call(tmp_path: Path) -> None:
    tasks = [Task(tmp_path, 1, None)] * 4
    with pytest.raises(TypeError):
        list(LocalEngine(EngineOptions(workers=2)).map(square, tasks, Counting()))


def test_each_worker_has_its_device() -> None:
    found = LocalEngine(Devices()).map(square, [Task(Path(str(i)), 1, i) for i in range(8)], Counting())
    assert {device for _, device in found} == {"cuda:0", "cuda:1"}


def test_another_engine_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(LocalEngine):
        pass

    module = types.ModuleType("an_engine_of_ones_own")
    vars(module)["Own"] = Own
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(engines.ENGINES, "own", f"{module.__name__}:Own")
    engine = engines.make_engine(EngineOptions(engine="own"), 1, 3)
    assert isinstance(engine, Own)
    assert (engine.rank, engine.world_size) == (1, 3)
    with pytest.raises(UsageError, match="engine 'slurm' is not known; legal: local"):
        engines.make_engine(EngineOptions(engine="slurm"))


INTERRUPTED = """
import sys, time
from pathlib import Path
from sstoken.pipeline.engines.local import LocalEngine
from sstoken.stages.stage import EngineOptions, Progress, Task

def work(index, worker):
    time.sleep(0.001)
    return index

if __name__ == "__main__":
    print("begun", flush=True)
    tasks = (Task(Path("nothing"), 1, index) for index in range(10**6))
    try:
        for _ in LocalEngine(EngineOptions(workers=2)).map(work, tasks, Progress()):
            pass
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.slow
def test_an_interruption_at_any_moment_is_silent(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group: workers that are still starting and work just handed over too."""
    program = tmp_path / "program.py"
    program.write_text(INTERRUPTED)
    for moment in range(8):
        process = subprocess.Popen(
            [sys.executable, str(program)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.2 + 0.3 * moment)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, err) == (130, "")


def test_a_semaphore_that_is_gone_as_the_process_ends_is_no_warning(tmp_path: Path) -> None:
    """A thread that was removing it may not have told loky's tracker yet."""
    gone = """
    from joblib.externals.loky.backend import resource_tracker
    resource_tracker.register("/loky-gone", "semlock")
"""
    program = tmp_path / "program.py"
    program.write_text(INTERRUPTED.replace("10**6", "4") + gone)
    done = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
