"""What `plan` expects of the steps that are still to do: tokens, time by the last runs on this machine, disk."""

import json
import re
from pathlib import Path

import pytest

from sstoken.pipeline import api, rates
from sstoken.stages import remote_cache
from tests.pipeline.small_run import save_conversations
from tests.pipeline.worlds import CommandLine, World


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSTOKEN_CACHE", str(tmp_path / "cache"))
    return remote_cache.cache()


@pytest.fixture
def config(world: World, tmp_path: Path) -> Path:
    data = save_conversations(tmp_path / "data.jsonl", 150, longest=8)
    file = tmp_path / "c.yaml"
    file.write_text(
        f"out: {tmp_path / 'run'}\nencode: {{data: {data}, model: {world.base}, workers: 1, shard_rows: 100}}\n"
        f"score: {{checkpoints: {{base: {world.base}, later: {world.later}}}}}\n"
    )
    return file


def planned(cli: CommandLine, *arguments: object) -> dict[str, dict[str, object]]:
    return {step["step"]: step for step in json.loads(cli.works("plan", *arguments, "--json"))}


def test_a_run_leaves_the_rates_that_the_next_plan_uses(
    cli: CommandLine, config: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_FEWEST", 1)
    monkeypatch.setattr(rates, "_STEADY", 0.0)
    before = planned(cli, config)
    assert {step["seconds"] for step in before.values()} == {None}
    assert before["score/base"]["tokens"] > 0
    said = cli.works("plan", config)
    assert "none of its kind has run here yet" in said
    assert re.search(r"^all +>", said, re.MULTILINE)  # what is not known is not in the sum
    api.run(config)
    known = json.loads((own_cache / "rates.json").read_text())
    assert {"encode", "select"} <= set(known)
    scored = "score/cpu/float32/hf/loss/attention"  # `auto` is hf here; the first has no attention
    later = planned(cli, config, "--set", "score.batch_tokens=100", "--set", "score.layer=0")
    todo = later["score/later"]
    assert later["encode"]["state"] == "finished"
    assert later["encode"]["seconds"] is None
    made = json.loads((config.parent / "run" / "scores" / "later" / "manifest.json").read_text())
    # what it took, it will take again
    assert todo["seconds"] == pytest.approx(known[scored]["seconds"])
    assert made["took"]["worker_seconds"] == pytest.approx(known[scored]["seconds"], rel=1e-3)
    assert todo["changed"] == ["score.layer none -> 0"]
    said = cli.works("plan", config, "--set", "score.layer=0")
    assert "at the rate of the last run" in said
    named = planned(cli, config, "--set", "score.layer=0", "--set", "score.backend=hf")
    assert named["score/later"]["seconds"] == todo["seconds"]
    other = planned(cli, config, "--set", "score.layer=0", "--set", "score.signals=[entropy]")
    assert other["score/later"]["seconds"] is None
    known[scored]["per_token"] *= 10  # as a larger model's
    (own_cache / "rates.json").write_text(json.dumps(known))
    assert planned(cli, config, "--set", "score.layer=0")["score/later"]["seconds"] is None


def test_a_damaged_record_of_rates_counts_for_nothing(
    cli: CommandLine, config: Path, own_cache: Path
) -> None:
    own_cache.mkdir()
    (own_cache / "rates.json").write_text("{")
    assert planned(cli, config)["score/base"]["seconds"] is None


def test_work_that_is_mostly_start_up_leaves_no_rate(
    config: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_FEWEST", 1_000_000)
    api.run(config, until="encode")
    assert not (own_cache / "rates.json").exists()


def test_rows_that_would_be_refused_are_named_after_the_table(cli: CommandLine, config: Path) -> None:
    data = config.parent / "data.jsonl"
    data.write_text(data.read_text() + '{"messages": [{"role": "user", "content": "w1"}]}\n')
    outcome = cli("plan", config)
    assert outcome.code == 1
    assert "not run yet" in outcome.out
    assert "line 151: no answer" in outcome.err
    assert not (config.parent / "run").exists()


def test_too_little_room_is_said(cli: CommandLine, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sstoken.pipeline.disk.free_bytes", lambda folder: 10)
    outcome = cli("plan", config)
    assert outcome.code == 0
    assert "10 bytes are free" in outcome.err
