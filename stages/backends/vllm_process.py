"""The handle on a process that holds vLLM: started when first used, ended when it is let go."""

import os
import signal
import socket
import subprocess
import sys
import weakref
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from sstoken.errors import SstokenError
from sstoken.stages.backends.vllm_engine import EngineSpec, Reply, Request

if TYPE_CHECKING:
    from sstoken.stages.backends.vllm_generating import Prefixes

_ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",  # else the first log-softmax compiles for seconds
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine has a process already
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # of one token more than the model has positions, never computed
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_UNLESS_SET = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # else each worker wants a NUMA node of its own
_SECONDS_TO_END = 30


class Engine:
    """vLLM with one model, in a process of its own."""

    def __init__(self, spec: EngineSpec, device: str, log: Path | None) -> None:
        """Nothing is started yet.

        Args:
            spec: what decides the engine; `spec.longest` grows with the sequences.
            device: `cuda:N` restricts it to that GPU.
            log: takes what vLLM prints, after what is there; None: nothing does.
        """
        self._spec, self._device, self._log = spec, device, log
        self._connection: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes], Connection], Engine] | None = None

    @property
    def process_id(self) -> int | None:
        """Process id of the engine, or None where none is running."""
        return None if self._process is None else self._process.pid

    def ask(self, request: "Request | Prefixes", longest: int) -> Reply:
        """The signals of some sequences, or what comes after some prefixes.

        Args:
            request: what to score, or to go on from.
            longest: tokens that a sequence of this checkpoint may have; an engine made for fewer starts anew.

        Raises:
            SstokenError: vLLM cannot load or measure the model, or its process has ended.
        """
        if self._process is None or longest > self._spec.longest:
            self._spec = replace(self._spec, longest=max(longest, self._spec.longest))
            self._start()
        return self._ask(request)

    def close(self) -> None:
        """End the process, if there is one, and wait for that: its memory is free then."""
        if self._end is not None:
            self._end()
        self._process = self._connection = self._end = None

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        environment = _UNLESS_SET | os.environ | _ENVIRONMENT
        if ":" in self._device:
            environment["CUDA_VISIBLE_DEVICES"] = _visible(int(self._device.partition(":")[2]))
        # -P: a folder called `stages` or `vllm` where the user stands is not what is meant
        command = [sys.executable, "-P", "-m", "sstoken.stages.backends.vllm_engine", str(theirs.fileno())]
        output = subprocess.DEVNULL if self._log is None else self._log.open("ab")
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for this process alone; that one ends with it
            )
        finally:
            theirs.close()
            if not isinstance(output, int):
                output.close()
        self._process, self._connection = process, Connection(ours.detach())
        self._end = weakref.finalize(self, _end, process, self._connection)
        self._ask(self._spec)

    def _ask(self, question: "EngineSpec | Request | Prefixes") -> Reply:
        assert self._connection is not None
        try:
            self._connection.send(question)
            reply: Reply = self._connection.recv()
        except (EOFError, ConnectionError):
            raise SstokenError(f"{self._spec.model}: {self._how_it_ended()}") from None
        except BaseException:  # interrupted: the answer is still under way
            self.close()
            raise
        if reply.problem is not None:
            self.close()
            hint = ""
            if "out of memory" in reply.problem.lower():
                hint = "; lower the backend option gpu_memory_utilization, or --batch-tokens"
            verb = "generate with" if self._spec.prefix_caching else "score"
            where = f"see {self._log}, or " if self._log is not None else ""
            raise SstokenError(
                f"{self._spec.model}: vLLM does not {verb} it ({reply.problem}){hint}; {where}use --backend hf"
            )
        return reply

    def _how_it_ended(self) -> str:
        process = self._process
        assert process is not None
        self.close()
        status = process.wait()
        cause = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        where = f"see {self._log}, and " if self._log is not None else ""
        return (
            f"vLLM's process has ended ({cause}); {where}run the same command again: finished shards are kept"
        )


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    connection.close()
    if process.stdin is not None:
        process.stdin.close()  # what it ends by, within moments
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _visible(number: int) -> str:
    """The name of a GPU by its number among those that this process sees."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(number) if not shown else shown.split(",")[number]
