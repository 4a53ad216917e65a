"""Reporting during training through the trainer's integrations, besides the run's own log."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from sstoken.errors import UsageError

Reporter = Literal["none", "tensorboard", "wandb", "trackio"]
_DIRECTORY = "TENSORBOARD_LOGGING_DIR"
"""Environment variable that names the folder of transformers' TensorBoard integration."""


def check(reporter: Reporter) -> None:
    """Refuse a reporter whose package is missing."""
    if reporter != "none" and importlib.util.find_spec(reporter) is None:
        raise UsageError(f"report_to is {reporter!r}, which is not installed; pip install {reporter}")


@contextmanager
def tensorboard_beside(out: Path) -> Iterator[None]:
    """Put TensorBoard's files into `tensorboard` beside the output, unless the environment names another folder."""
    given = os.environ.get(_DIRECTORY)
    os.environ.setdefault(_DIRECTORY, str(out.parent / "tensorboard" / out.name.removesuffix(".partial")))
    try:
        yield
    finally:
        if given is None:
            del os.environ[_DIRECTORY]


@contextmanager
def no_messages() -> Iterator[None]:
    """Silence transformers' log lines and progress bars, which would disturb ours."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
