"""What tests of the command line and of the Python API share."""

from collections.abc import Iterator

import pytest

from tests.object_stores import s3_server
from tests.pipeline.worlds import CommandLine, World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    """A small finished run, the same for all: tests copy what they change."""
    return make_world()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line in this process; a file that needs the output of libraries too has one on `capfd`."""
    return CommandLine(capsys)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 service with an empty bucket, which the environment names; its address."""
    with s3_server(tmp_path_factory.mktemp("cache")) as address:
        yield address
