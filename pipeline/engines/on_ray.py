"""The Ray engine: every task is a stateless remote function, on any node of a cluster.

A task reads one shard and writes one atomic file. No actor holds results that a lost node would take with it, and Ray
itself writes no file. A task may run twice, even at the same time; both write the same bytes. The model is cached in
each worker process, by the stage's module.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout, suppress
from itertools import chain, islice
from typing import Any, TypeVar

from sstoken.errors import SstokenError, UsageError, in_one_line
from sstoken.pipeline.engines import ray_task
from sstoken.pipeline.engines.dispatch import Attempt, Died, Raised, dispatch
from sstoken.stages.stage import EngineOptions, Progress, Task, Worker
from sstoken.stages.storage import expanded

T = TypeVar("T")
R = TypeVar("R")
_LOOK_EVERY = 0.2
"""Seconds between polls of the tasks' progress."""
_COUNT_EVERY = 10.0
"""Seconds between polls of the cluster's size: nodes come and go."""
_PATIENCE = 10.0
"""Timeout for connecting to a cluster, in seconds."""
_WAITING = 1.0
"""Tasks queued at Ray per running task, so that no worker is ever idle."""
_HANDED_ON = (
    "ARROW_DEFAULT_MEMORY_POOL",
    "HF_ENDPOINT",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_HUB_OFFLINE",
    "OMP_WAIT_POLICY",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_VERBOSITY",
)
"""Environment variables that are passed on to worker processes."""


class RayEngine:
    """Remote functions on a Ray cluster; see `Engine`."""

    def __init__(self, options: EngineOptions, rank: int = 0, world_size: int = 1) -> None:
        """Check the options; Ray is started or connected to with the first task.

        Raises:
            UsageError: Ray is not installed, or the options name particular devices of one machine.
        """
        _import()
        device = getattr(options, "device", "auto")
        if "," in device or (":" in device and device != "cuda:0"):
            raise UsageError(
                f"device is {device!r}; Ray gives each task a GPU of its own: say cuda, cpu or auto with engine ray"
            )
        self._device, self._options = device, options
        self.rank, self.world_size = rank, world_size

    def map(
        self, function: Callable[[T, Worker], R], tasks: Iterable[Task[T]], progress: Progress
    ) -> Iterator[R]:
        """See `Engine.map`."""
        tasks = iter(tasks)
        first = list(islice(tasks, 1))
        if first:
            connect(self._options)
            pool = _Cluster(function, self._gpus(), self._options.workers, progress)
            with redirect_stdout(sys.stderr):  # Ray prints about lost workers; standard output is for results
                yield from dispatch(pool, chain(first, tasks), progress)

    def _gpus(self) -> int:
        """GPUs per task; 0: one CPU core instead."""
        if not hasattr(self._options, "device") or self._device not in ("auto", "cuda", "cuda:0"):
            return 0
        if not _import().cluster_resources().get("GPU"):
            if self._device == "auto":
                return 0
            raise UsageError(
                f"device is {self._device!r}, and no node of the Ray cluster has a GPU; say --device cpu"
            )
        settings = getattr(self._options, "backend_options", {})
        return int(settings.get("tensor_parallel_size", 1)) * int(settings.get("pipeline_parallel_size", 1))


def connect(options: EngineOptions) -> None:
    """Connect this process to the cluster, once; without an address, start Ray on this machine.

    Raises:
        UsageError: no cluster answers at the address, or the runtime environment cannot be read.
    """
    ray = _import()
    if ray.is_initialized():
        return
    address = options.ray_address or os.environ.get("RAY_ADDRESS")
    own = {} if address else {"num_cpus": options.workers, "include_dashboard": False}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        _knock(address)
        ray.init(
            address=address or "local",
            runtime_env=_runtime_env(options.ray_env),
            log_to_driver=False,
            logging_level="error",
            configure_logging=False,
            **own,
        )
    except UsageError:
        raise
    except Exception as error:  # Ray raises many types, and plain `Exception`
        if address is None:
            raise SstokenError(
                f"Ray does not start on this machine ({_first(error)}); try again, or --engine local"
            ) from error
        raise UsageError(
            f"ray_address is {address!r}: no Ray cluster answers ({_first(error)}); start one with `ray start --head`"
        ) from error


def _knock(address: str | None) -> None:
    """Raise if nothing listens at HOST:PORT; Ray itself would retry for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()


def _runtime_env(file: str | None) -> dict[str, Any]:
    found: Any = {}
    if file is not None:
        import yaml

        try:
            found = yaml.safe_load(expanded(file).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"ray_env is {file!r}: cannot be read ({_first(error)})") from error
        if not isinstance(found, dict):
            raise UsageError(f"ray_env is {file!r}: it has to hold a mapping, such as `env_vars: {{A: b}}`")
    own = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
    return {**found, "env_vars": {**own, **(found.get("env_vars") or {})}}


def _import() -> Any:
    try:
        import ray
    except ImportError:
        raise UsageError("engine ray needs the package ray; pip install ray") from None
    return ray


class _Cluster:
    """The pool of one call of `map`."""

    def __init__(
        self, function: Callable[[Any, Worker], Any], gpus: int, workers: int | None, progress: Progress
    ) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray = _import()
        self._gpus, self._workers, self._progress = gpus, workers, progress
        self._function = ray.put(function)
        # max_calls=0 keeps processes and their models; by default, a process with a GPU ends after its task.
        needs = {"num_gpus": gpus, "num_cpus": 0} if gpus else {"num_cpus": 1}
        self._run = ray.remote(**needs, max_retries=0, max_calls=0, scheduling_strategy="SPREAD")(
            ray_task.run
        )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = ray.remote(ray_task.Board).options(num_cpus=0, scheduling_strategy=here).remote()
        """Collects the tasks' progress; on the driver's node, so that it survives the loss of any other."""
        self._asked: Any = None
        self._running: dict[Any, Attempt] = {}
        self._window, self._counted = 0, -_COUNT_EVERY

    @property
    def window(self) -> int:
        if self._workers is not None:
            return self._workers
        if time.monotonic() - self._counted > _COUNT_EVERY:
            total = self._ray.cluster_resources()
            slots = total.get("GPU", 0) / self._gpus if self._gpus else total.get("CPU", 0)
            self._window = max(1, int(slots * (1 + _WAITING)))
            self._counted = time.monotonic()
        return self._window

    def start(self, attempt: Attempt) -> None:
        place = ray_task.Place(os.getcwd(), (attempt.index, attempt.number), self._board)
        self._running[self._run.remote(self._function, attempt.task.work, place)] = attempt

    def ended(self) -> Iterator[tuple[Attempt, Any]]:
        ray = self._ray
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=_LOOK_EVERY)
        if ready:
            ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        for reference in ready:
            yield self._running.pop(reference), self._result(reference)
        self._show()

    def _result(self, reference: Any) -> Any:
        from ray import exceptions

        try:
            failed, result = self._ray.get(reference)
        except exceptions.RuntimeEnvSetupError as error:
            return Raised(SstokenError(f"Ray cannot set up ray_env on a node: {_first(error)}"))
        except exceptions.RayTaskError as error:
            # Raised before our code runs: the worker cannot load the function or its arguments.
            return Raised(
                SstokenError(
                    f"a Ray worker cannot run the task ({_first(error.cause)}); every node needs this version of "
                    "sstoken"
                )
            )
        except exceptions.RayError as error:
            name = type(error).__name__
            return Died(_REASONS.get(name, f"{name}: {_first(error)}"))
        return Raised(result) if failed else result

    def _show(self) -> None:
        """Update the progress of running tasks if the board has answered."""
        if self._asked is None:
            self._asked = self._board.all.remote()
            return
        ready, _ = self._ray.wait([self._asked], timeout=0)
        if ready:
            self._asked = None
            with suppress(self._ray.exceptions.RayError):
                done = self._ray.get(ready[0])
                for attempt in self._running.values():
                    units = done.get((attempt.index, attempt.number))
                    if units is not None:
                        attempt.show(min(units, attempt.task.size), self._progress)

    def stop(self) -> None:
        for reference in self._running:
            with suppress(Exception):  # the cluster may be gone
                self._ray.cancel(reference, force=True)
        self._running.clear()


def _first(error: BaseException) -> str:
    return in_one_line(error, 300)


_REASONS = {
    "WorkerCrashedError": "its worker process died",
    "NodeDiedError": "its node was lost",
    "OutOfMemoryError": "its node ran out of memory",
    "LocalRayletDiedError": "its node's raylet died",
    "ObjectLostError": "its node was lost",
    "OwnerDiedError": "its node was lost",
}
"""Why Ray lost a task, in a few words; Ray's own messages fill a screen."""
