"""The anchor run in two processes, as a user starts it; the other verbs refuse to be started so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.factories import save_model
from tests.stages.tokens_folder import RUN, save_tokens
from tests.support import PATIENCE, TWO_PROCESSES

pytestmark = pytest.mark.slow


def torchrun(*arguments, cwd):
    launch = [*TWO_PROCESSES, "--no-python", str(Path(sys.executable).parent / "sstoken-curate")]
    return subprocess.run(
        [*launch, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE
    )


def short_anchor(world):
    """Two steps, into `history`."""
    inputs = ["--tokens", world.tokens, "--model", world.base]
    return ["anchor", *inputs, "--out", "history", "--max-steps", "2"]


def test_anchor_in_two_processes_speaks_once_and_is_finished_after(tmp_path):
    from sstoken.stages.manifest import Manifest, list_files, write_manifest

    model, tokens = save_model(tmp_path / "base"), save_tokens(tmp_path / "tokens")
    facts = {"stage": "encode", "fingerprint": RUN, "settings": {}, "seed": 0, "inputs": {}, "sources": {}}
    manifest = Manifest(**facts, version="0", seconds=0, metrics={}, files=list_files(tokens))
    write_manifest(tokens, manifest)
    command = ["anchor", "--tokens", tokens, "--model", model, "--out", "history", "--max-steps", "2"]
    done = torchrun(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("anchor: done") == 1
    assert (tmp_path / "history" / "step-2" / "model.safetensors").is_file()
    again = torchrun(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("anchor: finished already") == 1


def test_other_verbs_refuse_to_be_run_by_several_processes(tmp_path):
    save_model(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    done = torchrun("encode", "--data", "data.jsonl", "--model", "base", "--out", "tokens", cwd=tmp_path)
    assert done.returncode != 0
    assert "error: encode cannot be run by several processes" in done.stderr
    assert not (tmp_path / "tokens").exists()


def test_what_a_killed_run_of_other_settings_left_holds_no_process_up(tmp_path):
    """Its log says that training is over; the main process takes a while to remove it, and the other is faster."""
    from tests.pipeline.worlds import make_world

    world = make_world()
    partial = tmp_path / "history.partial"
    (partial / "old").mkdir(parents=True)
    for number in range(20_000):
        (partial / f"old/{number}").touch()
    (partial / ".fingerprint").write_text("of other settings")
    line = {"step": 1, "loss": 1.0, "learning_rate": 1e-5, "tokens_seen": 10}
    (partial / "log.jsonl").write_text(json.dumps(line) + "\n")
    (partial / "history.json").write_text("[]")
    command = short_anchor(world)
    done = torchrun(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "history/log.jsonl").read_text().splitlines()) == 2
    assert not partial.exists()


def test_a_finished_run_that_was_not_renamed_yet_is_finished_for_all_processes(tmp_path):
    from tests.pipeline.worlds import make_world

    world = make_world()
    command = short_anchor(world)
    assert torchrun(*command, cwd=tmp_path).returncode == 0
    (tmp_path / "history").rename(tmp_path / "history.partial")
    again = torchrun(*command, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("anchor: finished already") == 1
    assert (tmp_path / "history/manifest.json").is_file()
