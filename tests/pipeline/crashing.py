"""Runs a configuration over and over, each time killed (SIGKILL) at some change it makes to its folder.

Called as `crashing.py CONFIG RUN SEED [OVERRIDE]...`; ends when a run ends by itself, and prints the number of
kills on a last line of its own. SEED `never`: no kills; `rising`: the first run dies at its first change, the
next at its fourth, its seventh, and so on.

Whatever alters a file or folder below RUN through Python is an instant at which to die: just before something is
opened, renamed, removed or made. Which of them is drawn from SEED, so that a failure can be repeated. Each run
is a process of its own, forked after the heavy imports.
"""

import os
import random
import signal
import sys
from typing import Any

MOST_CHANGES = 150
"""Before the next kill: few enough to die many times in a run, enough to get on."""
NEVER = 1 << 60


def main(config: str, run: str, seed: str, overrides: list[str]) -> int:
    import transformers  # noqa: F401

    from sstoken.pipeline import cli
    from sstoken.pipeline.verbs import runs  # noqa: F401

    random_ = random.Random(seed)
    kills = 0
    while True:
        survive = {"never": NEVER, "rising": 3 * kills + 1}.get(seed) or random_.randrange(1, MOST_CHANGES)
        child = os.fork()
        if child == 0:
            _die_after(survive, os.path.abspath(run))
            options = [option for override in overrides for option in ("--set", override)]
            cli.main(["run", config, *options])  # exits
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            print(kills)
            return os.waitstatus_to_exitcode(status)
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        kills += 1


def _die_after(changes: int, run: str) -> None:
    left = changes

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if not _changes(event, arguments, run):
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _changes(event: str, arguments: tuple[Any, ...], run: str) -> bool:
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        return True  # by `shutil.rmtree`, whose paths are relative to an open folder
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or flags & os.O_ACCMODE == os.O_RDONLY:
            return False
    elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
        path = arguments[0]
    else:
        return False
    return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
