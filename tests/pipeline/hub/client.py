"""The command line against a Hub on localhost: other processes, with unmodified clients that HF_ENDPOINT points there.

Run as a program, it calls the command line, or a program of the test's, for each line of standard input, so that a
test does not wait for imports.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.pipeline.hub.store import Hub
from tests.support import PATIENCE, ROOT, messages


@dataclass(frozen=True)
class Outcome:
    """What a command gave."""

    code: int
    out: str
    err: str


class Client:
    """Runs commands under one account after the other."""

    def __init__(self, hub: Hub, url: str, home: Path, token: str) -> None:
        self.hub, self.token = hub, token
        unset = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_ENABLE_HF_TRANSFER", "HUGGING_FACE_HUB_TOKEN")
        self._environment = {key: value for key, value in os.environ.items() if key not in unset} | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": str(PATIENCE),
            "HF_HUB_DOWNLOAD_TIMEOUT": str(PATIENCE),
        }
        self._process = self._start("-m", "tests.pipeline.hub.client", stdin=subprocess.PIPE)

    def __call__(self, *arguments: object, token: str | None = None) -> Outcome:
        """Run a verb to its end, with that token ('': none) or the usual one."""
        token = self.token if token is None else token
        outcome = self._ask(None, arguments, token)
        assert not token or token not in outcome.out + outcome.err
        assert "Traceback" not in outcome.out + outcome.err, outcome.err
        return outcome

    def python(self, program: str, *arguments: object) -> Outcome:
        """Run a program of somebody who has the client libraries alone."""
        return self._ask(program, arguments, self.token)

    def _ask(self, program: str | None, arguments: tuple[object, ...], token: str) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"program": program, "arguments": [str(a) for a in arguments], "token": token}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process has ended"
        return Outcome(**json.loads(answer))

    def works(self, *arguments: object) -> dict:
        """Run a verb that has to succeed, with --json; the facts."""
        outcome = self(*arguments, "--json")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    def fails(self, code: int, *arguments: object, token: str | None = None) -> str:
        """Run a verb that has to fail with one line; that line."""
        outcome = self(*arguments, token=token)
        lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        assert (outcome.code, len(lines)) == (code, 1), outcome
        assert messages(outcome.err)[-1] == lines[0]
        return lines[0]

    def start(self, *arguments: object) -> subprocess.Popen:
        """A verb in a process of its own, to be killed."""
        return self._start("-m", "sstoken.pipeline", *map(str, arguments), HF_TOKEN=self.token)

    def separately(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
        """A verb in a process of its own, whose environment differs."""
        return subprocess.run(
            [sys.executable, "-m", "sstoken.pipeline", *map(str, arguments)],
            env=self._environment | {"HF_TOKEN": self.token} | environment,
            cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _start(self, *arguments: str, stdin: int | None = None, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *arguments], env=self._environment | environment, cwd=ROOT, text=True,
            stdin=stdin, stdout=subprocess.PIPE, stderr=None if stdin else subprocess.DEVNULL,
        )  # fmt: skip


def serve_requests() -> None:
    """Answer each line of standard input."""
    from sstoken.pipeline import cli

    answers = sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        os.environ["HF_TOKEN"] = request["token"]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = 0
            try:
                if request["program"] is None:
                    cli.main(request["arguments"])
                sys.argv = ["-c", *request["arguments"]]
                exec(request["program"], {"__name__": "__main__"})
            except SystemExit as ended:
                code = ended.code
            except BaseException:
                code = traceback.format_exc()
        print(
            json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}), file=answers, flush=True
        )


if __name__ == "__main__":
    serve_requests()
