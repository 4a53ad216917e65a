"""The processes that torchrun or accelerate started: how many, which one this is, how it ends."""

import os
import sys
from contextlib import suppress
from typing import NoReturn


def rank() -> int:
    """Return the number of this process, from 0; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Return whether this is the process of rank 0, or the only one."""
    return rank() == 0


def num_processes() -> int:
    """Return the number of processes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_process(status: int) -> NoReturn:
    """End this process: as usual if it is the only one, else at once, without freeing anything.

    A thread of gloo takes the interpreter's lock to free the tensors of a collective that is over. On a busy machine
    it does so late, and a process that ends as usual meanwhile aborts, or hangs as it waits for that thread.
    """
    if num_processes() == 1:
        sys.exit(status)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
