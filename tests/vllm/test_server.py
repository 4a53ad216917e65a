"""`--backend vllm-server` against vLLM's own server, in a process of its own, and against transformers."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sstoken.errors import UsageError
from sstoken.pipeline import api
from sstoken.stages import tables
from tests.factories import VOCABULARY, save_tokenizer
from tests.support import PATIENCE, ROOT
from tests.vllm.models import save_model

SIGNALS = ("loss", "loss_unconditional")
LONGEST = 64
"""Tokens that the server takes, with one that it generates."""


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A served checkpoint, another one, and encoded data."""
    work = tmp_path_factory.mktemp("world")
    for name, seed in (("base", 0), ("later", 1)):
        save_model(work / name, "llama", seed=seed, vocab_size=VOCABULARY)
        save_tokenizer(work / name)
    save_tokenizer(work / "words", first="v")
    words = [[f"w{i * j % 120 + 1}" for j in range(1, 9 + i % 20)] for i in range(60)]
    rows = [{"prompt": " ".join(row[:3]), "completion": " ".join(row[3:])} for row in words]
    (work / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    api.encode(data=str(work / "data.jsonl"), model=str(work / "base"), out=work / "tokens", workers=1)
    return work


@pytest.fixture(scope="module")
def url(world):
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    command += ["--model", str(world / "base"), "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--max-model-len", str(LONGEST), "--enforce-eager"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": str(ROOT)}
    with (world / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address = f"http://localhost:{port}"
    try:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and server.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except OSError:
                time.sleep(0.5)
        assert server.poll() is None, (world / "server.log").read_text()[-2000:]
        yield address
    finally:
        server.terminate()
        server.wait(PATIENCE)


def score(world, out, checkpoint="base", backend="hf", signals=SIGNALS, **options):
    return api.score(
        tokens=world / "tokens",
        checkpoints=[str(world / checkpoint)],
        attention_from="none",
        signals=signals,
        backend=backend,
        backend_options=options,
        out=out,
    )


def read(folder):
    return pl.concat([pl.read_parquet(Path(part)) for part in tables.parts(folder)])


def test_losses_are_those_of_transformers(world, url, tmp_path):
    score(world, tmp_path / "hf")
    score(world, tmp_path / "server", backend="vllm-server", url=url, requests=4)
    for signal in SIGNALS:
        ours, theirs = (read(tmp_path / name / "base")[signal].explode() for name in ("server", "hf"))
        assert (ours.is_null() == theirs.is_null()).all()
        np.testing.assert_allclose(ours.drop_nulls(), theirs.drop_nulls(), atol=1e-5)
    metadata = tables.read_metadata(tables.parts(tmp_path / "server" / "base")[0])
    assert metadata["dtype"] == "the server's"
    assert "weights and dtype cannot be checked" in metadata["computed_with"]


def test_a_stride_goes_by_what_the_server_takes(world, url, tmp_path):
    rows = [{"prompt": "w1 w2", "completion": " ".join(f"w{i % 120 + 1}" for i in range(90))}]
    (tmp_path / "long.jsonl").write_text(json.dumps(rows[0]))
    api.encode(
        data=str(tmp_path / "long.jsonl"), model=str(world / "base"), out=tmp_path / "tokens", workers=1
    )
    given = {
        "tokens": tmp_path / "tokens",
        "checkpoints": [str(world / "base")],
        "attention_from": "none",
        "backend": "vllm-server",
        "backend_options": {"url": url},
    }
    with pytest.raises(Exception, match=f"the model takes {LONGEST - 1}; encode with --max-length"):
        api.score(**given, out=tmp_path / "refused")
    api.score(**given, stride=20, out=tmp_path / "scores")
    assert read(tmp_path / "scores" / "base")["loss"].explode().drop_nulls().len() > LONGEST


def test_another_checkpoint_is_refused_unless_it_is_named(world, url, tmp_path):
    with pytest.raises(UsageError, match=r"serves 'tiny', not from this path or id; .*model=NAME"):
        score(world, tmp_path / "a", "later", "vllm-server", url=url)
    with pytest.raises(UsageError, match="serves no 'large'; it serves 'tiny'"):
        score(world, tmp_path / "b", "later", "vllm-server", url=url, model="large")
    score(world, tmp_path / "c", "later", "vllm-server", url=url, model="tiny")


def test_another_tokenizer_is_refused(world, url, tmp_path):
    save_model(world / "words", "llama", vocab_size=VOCABULARY)
    with pytest.raises(UsageError, match="serves 'tiny' with another tokenizer than this checkpoint's"):
        score(world, tmp_path, "words", "vllm-server", url=url, model="tiny")


def test_signals_that_the_api_does_not_give_are_refused(world, url, tmp_path):
    with pytest.raises(UsageError, match="vllm-server does not measure entropy"):
        score(world, tmp_path, "base", "vllm-server", ("loss", "entropy"), url=url)
