"""The anchor run in two processes, as a user starts it; the other verbs refuse to be started so."""

import subprocess
import sys

import pytest

from tests.stages.tiny import RUN, save_model, save_tokens
from tests.support import PATIENCE

pytestmark = pytest.mark.slow


def torchrun(*arguments, cwd):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pipeline"]
    return subprocess.run(
        [*launch, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE
    )


def test_anchor_in_two_processes_speaks_once_and_is_finished_after(tmp_path):
    from pipeline.manifest import Manifest, list_files, write_manifest

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
