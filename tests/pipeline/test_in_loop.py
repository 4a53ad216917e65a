"""In the loop and offline are one: history from `scores/`, masks as `score` and `select` give them, and back again."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from sstoken import SelfModulatedTrainer, SelfModulation, SstokenError, UsageError
from sstoken.pipeline import api
from sstoken.stages.training.observed_losses import ObservedLosses
from sstoken.stages.training.score_column import with_history
from tests.factories import save_model
from tests.pipeline.small_run import environment, save_conversations
from tests.sstoken.in_loop.small import Watcher, arguments, dumping
from tests.support import PATIENCE, ROOT

EXAMPLES, BATCH, STEPS = 30, 5, 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokens/, base/, later/ (that training starts from) and the scores of base."""
    folder = tmp_path_factory.mktemp("in-loop")
    model = AutoModelForCausalLM.from_pretrained(save_model(folder / "base", positions=256))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder / "later")
    data = save_conversations(folder / "data.jsonl", EXAMPLES)
    base = str(folder / "base")
    api.encode(data=str(data), model=base, out=folder / "tokens", shard_rows=11, workers=1)
    api.score(tokens=folder / "tokens", checkpoints=[base], out=folder / "scores")
    return folder


def train(world, out, observers, *, trainer=SelfModulatedTrainer, rho=0.4, gamma=0.6, **changes):
    tokenizer = AutoTokenizer.from_pretrained(world / "tokens" / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    made = trainer(
        AutoModelForCausalLM.from_pretrained(world / "later"),
        arguments(out, max_steps=STEPS, per_device_train_batch_size=BATCH, **changes),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=with_history(world / "tokens", world / "scores" / "base"),
        selection=SelfModulation(rho=rho, gamma=gamma),
        observers=observers,
    )
    made.train()
    return made


def test_masks_at_every_step_are_those_of_score_and_select(world, tmp_path):
    """The weights of each step are saved, scored and selected with by the pipeline."""
    watcher = Watcher()
    train(world, tmp_path, [watcher], trainer=dumping(watcher, SelfModulatedTrainer))
    model, checked = AutoModelForCausalLM.from_pretrained(world / "later"), 0
    for step, weights in watcher.weights.items():
        model.load_state_dict(weights)
        model.save_pretrained(tmp_path / f"now-{step}")
        scores = tmp_path / f"scores-{step}"
        refs = [f"base={world / 'base'}", f"now={tmp_path / f'now-{step}'}"]
        api.score(tokens=world / "tokens", checkpoints=refs, out=scores)
        out = tmp_path / f"masked-{step}"
        api.select(
            tokens=world / "tokens", scores=scores, out=out, rho=0.4, gamma=0.6, history="base", current="now"
        )
        offline = {
            np.array(ids).tobytes(): list(keep)
            for ids, keep in pl.read_parquet(out / "part-*.parquet")
            .select("input_ids", "keep_mask")
            .iter_rows()
        }
        for seen in (o for o in watcher.seen if o.step == step):
            assert seen.keep_mask.tolist() == offline[seen.input_ids.tobytes()]
            checked += 1
    assert checked == EXAMPLES


def test_losses_seen_in_training_are_scores(world, tmp_path):
    """One epoch in the loop, then a mask for the next one: that of the losses seen, which the loop kept by."""
    watcher = Watcher()
    train(world, tmp_path, [watcher, ObservedLosses(tmp_path / "observed")], num_train_epochs=1)
    scores = tmp_path / "scores"
    api.score(tokens=world / "tokens", checkpoints=[str(world / "base")], out=scores, attention_from="none")
    api.observed(recorded=tmp_path / "observed", tokens=world / "tokens", out=scores / "epoch-1")
    masked = api.select(
        tokens=world / "tokens", scores=scores, out=tmp_path / "masked", rho=0.4, gamma=0.6
    ).folder
    rows = pl.read_parquet(masked / "part-*.parquet")
    in_loop = {o.input_ids.tobytes(): o for o in watcher.seen}
    assert len(rows) == len(in_loop) == EXAMPLES
    for ids, keep, attention in rows.select("input_ids", "keep_mask", "attention").iter_rows():
        seen = in_loop[np.array(ids).tobytes()]
        assert list(keep) == seen.keep_mask.tolist()
        found = np.array([np.nan if a is None else a for a in attention], dtype=np.float32)
        np.testing.assert_array_equal(found, seen.attention)
    again = api.observed(recorded=tmp_path / "observed", tokens=world / "tokens", out=scores / "epoch-1")
    assert again.skipped


def test_an_epoch_that_did_not_see_everything_gives_no_scores(world, tmp_path):
    few = tmp_path / "few"
    trainer = train(world, tmp_path, [ObservedLosses(few)], gamma=1.0)
    assert trainer.state.global_step == STEPS
    with pytest.raises(SstokenError, match="no attention was measured"):
        api.observed(recorded=few, tokens=world / "tokens", out=tmp_path / "a")
    assert (
        api.observed(recorded=few, tokens=world / "tokens", out=tmp_path / "b", attention=False).metrics[
            "examples"
        ]
        == EXAMPLES
    )
    with pytest.raises(UsageError, match="has the losses of an earlier training"):
        ObservedLosses(few)
    with pytest.raises(UsageError, match=r"no observed-\*.sqlite"):
        api.observed(recorded=tmp_path / "nowhere", tokens=world / "tokens", out=tmp_path / "c")
    ObservedLosses(few, resume=True)
    other = tmp_path / "other.jsonl"
    save_conversations(other, 5, seed=9)
    api.encode(data=str(other), model=str(world / "base"), out=tmp_path / "other", workers=1)
    with pytest.raises(SstokenError, match="5 of 5 examples were not trained on in full"):
        api.observed(recorded=few, tokens=tmp_path / "other", out=tmp_path / "d", attention=False)


def test_tokens_and_scores_are_joined_row_by_row(world, tmp_path):
    dataset = with_history(world / "tokens", world / "scores" / "base")
    assert dataset.column_names == ["example_id", "input_ids", "history_loss", "labels"]
    tokens = pl.read_parquet(world / "tokens" / "part-*.parquet")
    losses = pl.read_parquet(world / "scores" / "base" / "part-*.parquet")["loss"].to_list()
    assert dataset["example_id"][:] == tokens["example_id"].to_list()
    assert dataset["history_loss"][:] == losses
    for ids, mask, labels in zip(
        tokens["input_ids"], tokens["response_mask"], dataset["labels"], strict=True
    ):
        assert labels == [i if m else -100 for i, m in zip(ids, mask, strict=True)]


def test_scores_of_other_tokens_are_refused(world, tmp_path):
    with pytest.raises(UsageError, match="name the folder that `encode` wrote"):
        with_history(tmp_path, world / "scores" / "base")
    with pytest.raises(UsageError, match="name the scores of one checkpoint"):
        with_history(world / "tokens", world / "scores")
    with pytest.raises(SstokenError, match="not scores"):
        with_history(world / "tokens", world / "tokens")
    other = tmp_path / "other"
    other.mkdir()
    for part in (world / "scores" / "base").glob("part-*.parquet"):
        table = pq.read_table(part)
        pq.write_table(table.take(list(range(len(table)))[::-1]), other / part.name)
    with pytest.raises(SstokenError, match="not row-aligned"):
        with_history(world / "tokens", other)


def test_the_example_runs(world, tmp_path):
    """As a user runs it: with no more than what a clone and the demo's folders hold."""
    root = ROOT
    program = root / "configs" / "in_loop.py"
    assert len(program.read_text().splitlines()) < 60
    demo = tmp_path / "runs" / "demo"
    demo.mkdir(parents=True)
    shutil.copytree(world / "base", demo / "base")
    shutil.copyfile(world / "data.jsonl", demo / "data.jsonl")
    done = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"'examples': {EXAMPLES}" in done.stdout
    assert (tmp_path / "runs" / "in-loop-epoch" / "trained" / "model.safetensors").is_file()
