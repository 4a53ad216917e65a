"""What tests of the command line and of the Python API share."""

import pytest

from tests.pipeline.worlds import CommandLine, World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    """A small finished run, the same for all: tests copy what they change."""
    return make_world()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line in this process; a file that needs the output of libraries too has one on `capfd`."""
    return CommandLine(capsys)
