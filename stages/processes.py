"""Which of the processes that torchrun or accelerate started this is."""

import os


def rank() -> int:
    """The number of this process, from 0; 0 where it is the only one."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """False in all processes but one."""
    return rank() == 0


def num_processes() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))
