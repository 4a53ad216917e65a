"""Run the command line in processes forked from this one, whose imports are done: a trial takes no start-up.

Nothing here may compute with torch or start a thread before the last fork.
"""

import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import PATIENCE

FOREVER = 1 << 40


@dataclass(frozen=True)
class Fault:
    """What is to happen to a command."""

    fault: str = ""
    """`SSTOKEN_FAULT`."""
    after: float | None = None
    """Seconds until SIGKILL."""
    alone: bool = False
    """Whether that SIGKILL spares the processes that the command started."""
    when: Callable[[], bool] | None = None
    """Kill it as soon as this is true."""
    request: int = FOREVER
    """The request to the Hub at which it dies: 1, 3, ...: before the first, second, ... is sent; 2, 4, ...: after."""


@dataclass(frozen=True)
class Outcome:
    """What became of a command."""

    code: int | None
    """None: killed."""
    out: str
    err: str
    seconds: float
    passed: Counter[str]
    """Fault points passed, by name, and `request`; of a command that ended by itself and was told to count."""


def import_all() -> None:
    """Import what the verbs need."""
    import transformers  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Trainer,
    )

    from sstoken.pipeline import cli  # noqa: F401
    from sstoken.pipeline.verbs import hub, looking, runs, stages  # noqa: F401
    from sstoken.stages import anchor, encode, export, score, select  # noqa: F401
    from sstoken.stages.backends import hf  # noqa: F401
    from sstoken.stages.hub import publication, pull  # noqa: F401


def call(arguments: list[str], folder: Path, fault: Fault = Fault()) -> Outcome:
    """Run a verb in `folder` to its end, whatever that is; a group of its own, of which nothing is left."""
    report, start = folder / "child.json", time.monotonic()
    report.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _be_command(arguments, folder, fault, report)
    with suppress(OSError):  # the child does so, too: whoever is first
        os.setpgid(child, child)
    status = _wait(child, fault)
    seconds = time.monotonic() - start
    files = (folder / name for name in ("child.out", "child.err"))  # not there if it was killed at once
    out, err = (file.read_text(errors="replace") if file.exists() else "" for file in files)
    passed = Counter(json.loads(report.read_text())) if report.exists() else Counter()
    code = None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
    if code is None and os.WTERMSIG(status) != signal.SIGKILL:
        raise AssertionError(f"{arguments}: ended by signal {os.WTERMSIG(status)}: {err}")
    return Outcome(code, out, err, seconds, passed)


def _wait(child: int, fault: Fault) -> int:
    deadline = time.monotonic() + PATIENCE
    kill_at = deadline if fault.after is None else time.monotonic() + fault.after
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > kill_at or (fault.when is not None and kill_at == deadline and fault.when()):
            (os.kill if fault.alone else os.killpg)(child, signal.SIGKILL)
            kill_at = math.inf
        assert time.monotonic() < deadline, "never ends"
        time.sleep(0.002)


def _be_command(arguments: list[str], folder: Path, fault: Fault, report: Path) -> None:
    os.setpgid(0, 0)
    os.chdir(folder)
    for number, name in ((1, "child.out"), (2, "child.err")):
        # Appended: what is left of a command killed before may still write into the same file.
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    code: Any = 70
    try:
        from sstoken.pipeline import cli
        from sstoken.stages import faults

        os.environ[faults.VARIABLE] = fault.fault
        requests = _count_requests(fault.request)
        try:
            cli.main(arguments)
        except SystemExit as ended:
            code = ended.code
        active = faults.plan()
        if active is not None:
            report.write_text(json.dumps(active.passed | requests))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)


def _count_requests(last: int) -> Counter[str]:
    from huggingface_hub import get_session

    client, passed = type(get_session()), Counter[str]()
    send = client.send

    def point() -> None:
        passed["request"] += 1
        if passed["request"] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(*arguments: Any, **options: Any) -> Any:
        point()
        answer = send(*arguments, **options)
        point()
        return answer

    client.send = counted
    return passed
