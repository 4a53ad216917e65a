"""Where a training run reports its loss as it goes, besides its own log: the trainer's integrations."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from sstoken.errors import UsageError

Reporter = Literal["none", "tensorboard", "wandb", "trackio"]
_DIRECTORY = "TENSORBOARD_LOGGING_DIR"
"""Where transformers' TensorBoard integration looks for its folder."""


def check(reporter: Reporter) -> None:
    """Refuse a reporter whose package is missing.

    Raises:
        UsageError: names the package.
    """
    if reporter != "none" and importlib.util.find_spec(reporter) is None:
        raise UsageError(f"report_to is {reporter!r}, which is not installed; pip install {reporter}")


@contextmanager
def tensorboard_beside(out: Path) -> Iterator[None]:
    """Have TensorBoard's files in the folder `tensorboard` beside the output, unless the environment names another."""
    given = os.environ.get(_DIRECTORY)
    os.environ.setdefault(_DIRECTORY, str(out.parent / "tensorboard" / out.name.removesuffix(".partial")))
    try:
        yield
    finally:
        if given is None:
            del os.environ[_DIRECTORY]


@contextmanager
def no_messages() -> Iterator[None]:
    """Keep transformers' own log lines and bars off the screen: our progress bar is there."""
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
