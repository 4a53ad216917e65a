"""`plan --cost`: FLOPs as torch counts them, sizes as encode counts them, and what finished steps took."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from sstoken.errors import SstokenError
from sstoken.pipeline import api, cost, estimates
from sstoken.pipeline.config import load_config
from sstoken.pipeline.job import Job
from sstoken.stages import manifest as manifests
from sstoken.stages.critical import Critical
from tests.pipeline.small_run import save_conversations
from tests.pipeline.worlds import CommandLine, make_world

LENGTH = 48


def test_flops_are_those_that_torch_counts() -> None:
    base = make_world().base
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, LENGTH, dtype=torch.long))
    # torch counts every pair of positions, causal attention needs half of them
    expected = cost.weights(str(base)).forward(LENGTH, LENGTH, 2 * LENGTH**2)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    assert cost.weights(str(base)).stored == model.num_parameters()


def test_a_mixture_counts_the_experts_that_a_token_passes(tmp_path: Path) -> None:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    found = []
    for experts in (2, 8):
        config = MixtralConfig(**size, **heads, num_local_experts=experts, num_experts_per_tok=2)
        config.architectures = [MixtralForCausalLM.__name__]
        config.save_pretrained(tmp_path / str(experts))
        found.append(cost.weights(str(tmp_path / str(experts))))
    router = 2 * 32 * 6
    assert found[1].layers - found[0].layers == router
    assert found[1].stored > 2 * found[0].stored


def test_critical_costs_what_it_generates() -> None:
    """Ten problems of 20 tokens, 8 of them answers: 8 tokens each, and 2 positions x 2 alternatives x 4 tokens."""
    checkpoint = make_world().base
    stage = Critical(checkpoint=str(checkpoint), max_positions=2, alternatives=2)
    size = cost.Sizes(examples=10, tokens=200, response_tokens=80, squares=4000)
    job = Job(stage, {}, Path("out"), seed=0)
    expected = cost.weights(str(checkpoint)).forward(200 + 10 * (8 + 16), 10 * (8 + 16), 4000)
    assert cost.estimate(job, size)[0] == expected


def test_what_is_said_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world()
    data = save_conversations(tmp_path / "data.jsonl", estimates.SAMPLE + 44, longest=8)
    file = tmp_path / "c.yaml"
    file.write_text(
        f"out: {tmp_path / 'run'}\nencode: {{data: {data}, model: {world.base}, workers: 1, shard_rows: 100}}\n"
        f"score: {{checkpoints: {{base: {world.base}, later: {world.later}}}}}\n"
    )
    before = {each.step: each for each in estimates.costs(load_config(file), tflops=1)}
    assert not (tmp_path / "run").exists()
    assert all(each.guessed and each.took_hours is None for each in before.values())
    assert before["score/base"].device_hours == pytest.approx(before["score/base"].flops / 1e12 / 3600)
    api.run(file)
    after = {each.step: each for each in estimates.costs(load_config(file), tflops=1)}
    made = manifests.read_manifest(tmp_path / "run" / "tokens")
    scored = manifests.read_manifest(tmp_path / "run" / "scores" / "base")
    assert made is not None
    assert scored is not None
    assert after["score/base"].tokens == made.metrics["tokens"]
    assert before["score/base"].tokens == pytest.approx(made.metrics["tokens"], rel=0.1)
    assert not any(each.guessed for each in after.values())
    assert scored.took["shards"] == 3
    assert after["score/base"].took_hours == scored.took["worker_seconds"] / 3600
    assert after["score/base"].took_bytes == sum(entry.bytes for entry in scored.files)
    run = CommandLine(capsys)
    assert json.loads(run.works("plan", file, "--cost", "--json", "--tflops", 2))["tflops"] == 2
    assert "device-hours: at 100 TFLOP/s" in run.works("plan", file, "--cost")


def test_a_config_that_says_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(SstokenError, match=r"config\.json does not describe a known model"):
        cost.weights(str(tmp_path))
