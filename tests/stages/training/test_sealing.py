"""Training that was interrupted is gone on with only if nothing of it was changed since."""

import json
import shutil
from pathlib import Path

import pytest

from sstoken.errors import SstokenError
from sstoken.stages.training import sealing
from sstoken.stages.training.history_index import Entry, write_index


@pytest.fixture
def history(tmp_path: Path) -> Path:
    for name in ("step-1", "step-2", "trainer/checkpoint-2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(name.encode() * 10)
    write_index(
        tmp_path,
        [
            Entry("step-0", "base", 0, 0, None, "reference"),
            *(Entry(f"step-{n}", f"step-{n}", n, n, 1.0, "full") for n in (1, 2)),
        ],
    )
    return tmp_path


def test_what_is_unchanged_is_gone_on_with(history: Path) -> None:
    """Also where training had got further than its last checkpoint."""
    seal = sealing.Seals(history).upto(1, [history / "trainer/checkpoint-2"])
    assert list(seal["files"]) == ["step-1/model.safetensors", "trainer/checkpoint-2/model.safetensors"]
    sealing.check(history, seal)
    shutil.rmtree(history / "step-2")
    (history / "other").touch()
    sealing.check(history, seal)


@pytest.mark.parametrize("name", ["step-1/model.safetensors", "trainer/checkpoint-2/model.safetensors"])
@pytest.mark.parametrize("change", ["flip", "remove"])
def test_what_was_changed_is_named(change: str, name: str, history: Path) -> None:
    seal = sealing.Seals(history).upto(2, [history / "trainer/checkpoint-2"])
    if change == "flip":
        (history / name).write_bytes(b"x" + (history / name).read_bytes()[1:])
    else:
        (history / name).unlink()
    with pytest.raises(SstokenError, match=f"{name}: changed since .* remove {history} to start over"):
        sealing.check(history, seal)


def test_another_loss_in_the_index_is_named(history: Path) -> None:
    seal = sealing.Seals(history).upto(2, ())
    index = history / "history.json"
    index.write_text(index.read_text().replace('"loss": 1.0', '"loss": 1.5', 1))
    with pytest.raises(SstokenError, match=r"history\.json: changed"):
        sealing.check(history, seal)


def test_ended_training_is_checked_with_its_log(history: Path) -> None:
    sealing.seal_ended(history, 2, "{}\n", "log.jsonl")
    (history / "log.jsonl").write_text("{}\n")
    sealing.check_ended(history)
    (history / "log.jsonl").write_text("{ }\n")
    with pytest.raises(SstokenError, match=r"log\.jsonl: changed"):
        sealing.check_ended(history)


@pytest.mark.parametrize("text", ["", "[]", '{"files": {}}', '{"filez": {}, "entries": []}'])
def test_a_damaged_seal_is_named(text: str, history: Path) -> None:
    (history / sealing.SEAL).write_text(text)
    with pytest.raises(SstokenError, match="remove"):
        sealing.check_ended(history)


def test_without_a_seal_older_work_is_gone_on_with(history: Path) -> None:
    sealing.check_ended(history)
    sealing.check(history, json.loads('{"processes": 1}'))
