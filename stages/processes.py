"""The processes that torchrun or accelerate started, and which of them this one is."""

import os


def rank() -> int:
    """Return the number of this process, from 0; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Return whether this is the process of rank 0, or the only one."""
    return rank() == 0


def num_processes() -> int:
    """Return the number of processes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))
