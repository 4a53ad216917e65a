"""What tests of the command line and of the Python API share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sstoken.pipeline import api
from tests.object_stores import s3_server
from tests.pipeline.worlds import SHARD_ROWS, CommandLine, World, copy_model, make_world


@pytest.fixture(scope="session")
def world() -> World:
    """A small finished run, the same for all: tests copy what they change."""
    return make_world()


HEADERS = (
    "{% for m in messages %}w1 w2 {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}w1 w2 {% endif %}"
)


@pytest.fixture(scope="session")
def scored(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Tokens and scores, with headers that the vocabulary knows: it would write EOS for other words."""
    folder = tmp_path_factory.mktemp("headers")
    checkpoints = [str(copy_model(path, folder / path.name)) for path in (world.base, world.later)]
    for checkpoint in checkpoints:
        (Path(checkpoint) / "chat_template.jinja").write_text(HEADERS)
    api.encode(
        data=str(world.data), model=checkpoints[0], out=folder / "tokens", shard_rows=SHARD_ROWS, workers=1
    )
    api.score(tokens=folder / "tokens", checkpoints=checkpoints, out=folder / "scores")
    return folder / "tokens", folder / "scores"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line in this process; a file that needs the output of libraries too has one on `capfd`."""
    return CommandLine(capsys)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 service with an empty bucket, which the environment names; its address."""
    with s3_server(tmp_path_factory.mktemp("cache")) as address:
        yield address
