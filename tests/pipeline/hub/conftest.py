"""A Hub on localhost, a client of it, and something to publish."""

from pathlib import Path

import pytest

from sstoken.pipeline import api
from tests.pipeline.hub.client import Client
from tests.pipeline.hub.server import WRITE, serve
from tests.pipeline.hub.store import Hub
from tests.pipeline.worlds import make_world


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    return Hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def client(hub, tmp_path_factory):
    server = serve(hub)
    client = Client(hub, server.url, tmp_path_factory.mktemp("home"), WRITE)
    yield client
    client.close()
    server.shutdown()


@pytest.fixture(scope="session")
def masked(tmp_path_factory) -> Path:
    """24 rows in three shards, with all columns. Read-only."""
    world, out = make_world(), tmp_path_factory.mktemp("run") / "masked"
    api.select(tokens=world.tokens, scores=world.scores, out=out, history="base", current="later")
    return out
