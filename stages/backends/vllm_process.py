"""The process that runs vLLM: starts on first use, ends when its handle is dropped."""

import os
import signal
import socket
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

from sstoken.errors import SstokenError
from sstoken.stages.backends import BackendOptions, Latest, LoadedModel
from sstoken.stages.backends import vllm_limits as limits
from sstoken.stages.backends.vllm_engine import EngineSpec, Reply, Request
from sstoken.stages.backends.vllm_generation import Prefixes
from sstoken.stages.checkpoints import adapter_base, local_folder, place, stamp

_ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",  # else the first log-softmax compiles for seconds
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine already has its own process
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a request needs room for one more token, which is never computed
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_UNLESS_SET = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # else each worker wants a NUMA node of its own
_SECONDS_TO_END = 30
_BATCH_TOKENS = 8192
"""Default of `batch_tokens`."""
_SMALLEST_ROOM = 1024
"""Shortest sequence length that vLLM is started for."""
_SMALLEST_CACHE = 1 << 30
"""Bytes of the key-value cache on a CPU, at least."""
_ROWS_IN_CACHE = 64
"""Sequences of the smallest room that it holds for generation."""
_adapters = count(1)
"""vLLM identifies adapters by number."""


class EngineProcess:
    """vLLM with one model, in a process of its own."""

    def __init__(self, spec: EngineSpec, device: str, log: Path | None) -> None:
        """Prepare the engine without starting it.

        Args:
            spec: the engine's settings; `spec.longest` grows with the sequences.
            device: `cuda:N` restricts it to that GPU.
            log: file to append vLLM's output to; None: discard it.
        """
        self._spec, self._device, self._log = spec, device, log
        self._connection: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes], Connection], EngineProcess] | None = None

    def ask(self, request: Request | Prefixes, longest: int) -> Reply:
        """Score sequences, or generate after prefixes.

        Args:
            request: what to score, or to continue.
            longest: length in tokens that the engine must support; if it was started for less, it is restarted.

        Raises:
            SstokenError: vLLM cannot load or measure the model, or its process has ended.
        """
        if self._process is None or longest > self._spec.longest:
            self._spec = replace(self._spec, longest=max(longest, self._spec.longest))
            self._start()
        return self._ask(request)

    def close(self) -> None:
        """End the process, if it is running, and wait until its memory is free."""
        if self._end is not None:
            self._end()
        self._process = self._connection = self._end = None

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        environment = _UNLESS_SET | os.environ | _ENVIRONMENT
        if ":" in self._device:
            environment["CUDA_VISIBLE_DEVICES"] = _visible(int(self._device.partition(":")[2]))
        # -P: never import a folder called `vllm` from the working directory
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
                start_new_session=True,  # only this process gets Ctrl-C; the engine ends with it
            )
        finally:
            theirs.close()
            if not isinstance(output, int):
                output.close()
        self._process, self._connection = process, Connection(ours.detach())
        self._end = weakref.finalize(self, _end, process, self._connection)
        self._ask(self._spec)

    def _ask(self, question: EngineSpec | Request | Prefixes) -> Reply:
        assert self._connection is not None
        try:
            self._connection.send(question)
            reply: Reply = self._connection.recv()
        except (EOFError, ConnectionError):
            raise SstokenError(f"{self._spec.model}: {self._how_it_ended()}") from None
        except BaseException:  # interrupted: a late reply must not answer the next request
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
        return f"vLLM's process ended ({cause}); {where}run the same command again: finished shards are kept"


def _end(process: "subprocess.Popen[bytes]", connection: Connection) -> None:
    connection.close()
    if process.stdin is not None:
        process.stdin.close()  # the process exits when this closes
    try:
        process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _visible(number: int) -> str:
    """Return the CUDA_VISIBLE_DEVICES entry of a GPU, by its number among those this process sees."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(number) if not shown else shown.split(",")[number]


_engine = Latest(EngineProcess)
"""This process's engine, shared by adapters."""


class VllmModel(LoadedModel):
    """A checkpoint in vLLM, which starts with the first request: the longest sequence decides its memory."""

    def __init__(self, options: BackendOptions, *, captures: bool = False, generates: bool = False) -> None:
        """Prepare the engine, or take the running one if it has the same specification.

        Args:
            options: the checkpoint, and how to run it.
            captures: whether it measures attention.
            generates: whether to cache keys and values of shared prefixes; excludes capturing attention.
        """
        settings = limits.read(options)
        base = adapter_base(options.checkpoint)
        adapter = None if base is None else local_folder(options.checkpoint)
        full = base or options.checkpoint
        self._options = options
        self._config = limits.load_config(full, options.trust_remote_code)
        self._batch_tokens = options.batch_tokens or _BATCH_TOKENS
        if generates:
            cached = _ROWS_IN_CACHE * min(_SMALLEST_ROOM, self.max_length or _SMALLEST_ROOM)
        else:
            cached = 2 * max(self._batch_tokens, self.max_length or 0)
        model, revision = place(full)
        spec = EngineSpec(
            model=model,
            revision=revision,
            layer=limits.attention_layer(options, self._config) if captures else None,
            dtype=self.dtype,
            longest=0,
            batch_tokens=self._batch_tokens,
            lora_rank=None if adapter is None else limits.lora_rank(adapter),
            lora_modules=() if adapter is None else limits.lora_modules(adapter),
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            quantization=settings.quantization,
            trust_remote_code=options.trust_remote_code,
            cpu_cache_bytes=max(_SMALLEST_CACHE, limits.cache_bytes(self._config, cached)),
            prefix_caching=generates,
        )
        log = None if options.log_folder is None else options.log_folder / "vllm.log"
        self._engine = _engine(stamp(full), spec, options.device, log)
        self._adapter = None if adapter is None else (next(_adapters), str(adapter))

    @property
    def vocab_size(self) -> int:
        """See `LoadedModel.vocab_size`."""
        return int(self._config.vocab_size)

    @property
    def max_length(self) -> int | None:
        """See `LoadedModel.max_length`."""
        return getattr(self._config, "max_position_embeddings", None)

    @property
    def dtype(self) -> str:
        """See `LoadedModel.dtype`. vLLM's own `auto` would convert 32 bits to 16."""
        if self._options.dtype != "auto":
            return self._options.dtype
        return str(getattr(self._config, "dtype", None) or "float32").removeprefix("torch.")

    def _room_for(self, longest: int) -> int:
        """Return the length to start vLLM for: later sequences should seldom exceed it."""
        room = max(_SMALLEST_ROOM, 1 << (longest - 1).bit_length())
        return room if self.max_length is None else min(room, self.max_length)
