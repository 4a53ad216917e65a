"""`score --backend vllm` from the command line: the same masks, a quiet terminal, and an engine that is killed."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from sstoken.errors import SstokenError
from sstoken.pipeline import api
from sstoken.stages import tables
from sstoken.stages.score import Score
from tests.factories import VOCABULARY, save_tokenizer
from tests.stages.context import make_context
from tests.stages.tokens_folder import save_tokens
from tests.support import PATIENCE, ROOT, SHARED, needs_shared
from tests.vllm.models import save_model


def command_line(*arguments, **settings):
    command = [sys.executable, "-m", "sstoken.pipeline", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **settings,
    )


def run(*arguments):
    process = command_line(*arguments)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out, err


def read(folder):
    return pa.concat_tables([pq.read_table(part) for part in tables.parts(folder)])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two checkpoints and encoded data of many shards."""
    work = tmp_path_factory.mktemp("world")
    for name, seed in (("base", 0), ("later", 1)):
        save_model(work / name, "llama", seed=seed, vocab_size=VOCABULARY)
        save_tokenizer(work / name)
    words = [[f"w{i * j % 120 + 1}" for j in range(1, 9 + i % 20)] for i in range(600)]
    rows = [{"prompt": " ".join(row[:3]), "completion": " ".join(row[3:])} for row in words]
    (work / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    api.encode(
        data=str(work / "data.jsonl"), model=str(work / "base"), out=work / "tokens", shard_rows=60, workers=1
    )
    return work


@pytest.fixture(scope="module")
def scored(world):
    """What the command wrote and printed."""
    command = ["score", "--tokens", world / "tokens", "--ckpt", world / "base", "--ckpt", world / "later"]
    out, err = run(*command, "--backend", "vllm", "--out", world / "vllm")
    return world / "vllm", out, err


def test_select_gives_the_same_masks(world, scored):
    checkpoints = [str(world / name) for name in ("base", "later")]
    api.score(tokens=world / "tokens", checkpoints=checkpoints, out=world / "hf", backend="hf")
    for backend in ("hf", "vllm"):
        api.select(tokens=world / "tokens", scores=world / backend, out=world / f"masked-{backend}")
    assert read(world / "masked-hf")["keep_mask"] == read(world / "masked-vllm")["keep_mask"]


def test_the_terminal_stays_quiet_and_the_log_is_nobodys_result(scored):
    folder, out, err = scored
    ours = (" tokens, ", " to go; faster: ")  # the bar's lines, and its advice where that comes in time
    assert [line for line in err.splitlines() if not any(text in line for text in ours)] == []
    assert [line for line in out.splitlines() if not line.startswith(("score/", "  "))] == []
    assert "LLM" in (folder / "vllm.log").read_text()
    for name in ("base", "later"):
        files = json.loads((folder / name / "manifest.json").read_text())["files"]
        assert not [f for f in files if "log" in f["path"]]
    assert api.verify(folder)[1] == []


def engine_of(process):
    """The process that holds vLLM, below that of the command line."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if "sstoken.stages.backends.vllm_engine" in child.cmdline():
            return child
    return None


def test_a_killed_engine_is_one_line_and_the_next_run_goes_on(world, scored, tmp_path):
    command = ["score", "--tokens", world / "tokens", "--ckpt", world / "later", "--backend", "vllm"]
    process = command_line(*command, "--out", tmp_path)
    partial = tmp_path / "later.partial"
    deadline = time.monotonic() + 240
    while not list(partial.glob("part-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.001)
    engine = engine_of(process)
    assert engine is not None
    engine.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    *progress, last = err.strip().splitlines()
    assert last.startswith("error: ")
    assert "vLLM's process ended (killed by SIGKILL)" in last
    assert "finished shards are kept" in last
    assert "Traceback" not in err
    done = {part: part.stat().st_mtime_ns for part in partial.glob("part-*.parquet")}
    assert done
    run(*command, "--out", tmp_path)
    for part in tables.parts(scored[0] / "later"):
        again = tmp_path / "later" / part.name
        assert done.get(partial / part.name, again.stat().st_mtime_ns) == again.stat().st_mtime_ns
        assert pq.read_table(part).equals(pq.read_table(again))


def test_the_engine_ends_with_the_process_that_started_it(world, tmp_path):
    command = ["score", "--tokens", world / "tokens", "--ckpt", world / "base", "--backend", "vllm"]
    process = command_line(*command, "--out", tmp_path / "scores")
    deadline = time.monotonic() + 240
    while (engine := engine_of(process)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    engine.wait(20)  # raises if it lives on


def test_nan_names_shard_and_example(tmp_path):
    """The self-check of the attention leaves it to the loss."""
    broken = save_model(tmp_path / "broken", "llama", vocab_size=VOCABULARY)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    tokens = save_tokens(tmp_path / "tokens")
    stage = Score(checkpoint=str(broken), attention=True, backend="vllm")
    with pytest.raises(
        SstokenError, match=r"broken: NaN or infinite loss in part-00000.parquet, example '\d+'"
    ):
        stage.run(make_context(tmp_path / "scores", {"tokens": tokens}))


@pytest.mark.slow
@needs_shared
def test_a_thousand_examples_of_gsm8k_get_the_same_masks(tmp_path):
    rows = (SHARED / "data/gsm8k/train.jsonl").read_text().splitlines()[:1000]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    api.encode(data=str(tmp_path / "data.jsonl"), model=str(SHARED / "models/base"), out=tmp_path / "tokens")
    for backend in ("hf", "vllm"):
        checkpoints = [str(SHARED / "models" / name) for name in ("base", "sft")]
        api.score(
            tokens=tmp_path / "tokens", checkpoints=checkpoints, out=tmp_path / backend, backend=backend
        )
        api.select(tokens=tmp_path / "tokens", scores=tmp_path / backend, out=tmp_path / f"masked-{backend}")
    kept = [np.concatenate(read(tmp_path / f"masked-{b}")["keep_mask"].to_pylist()) for b in ("hf", "vllm")]
    assert kept[0].size > 200_000
    assert (kept[0] != kept[1]).sum() <= 2  # 0 measured; last bits may move a token at the cut
