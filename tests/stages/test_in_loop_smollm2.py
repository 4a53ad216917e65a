"""The first program of docs/in-loop.md, on the model that it names and in TRL's defaults: bfloat16 autocast, LoRA."""

import json

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from transformers import AutoTokenizer, TrainerCallback

from sstoken.stages import checkpoints, joins, tables
from sstoken.stages.score import Score
from sstoken.stages.select import Select
from tests.smollm2 import FOLDER, needs_smollm2
from tests.sstoken.in_loop.recipe import trainer_of_the_first
from tests.sstoken.in_loop.small import Watcher
from tests.stages.context import make_context

STEPS, WARMUP, SAVED = 10, 2, (5, 9)
TOLERANCE = 0.05
"""Share of the response tokens that are kept in the loop and not offline: the loop's adapter is not merged."""


class SavesAdapters(TrainerCallback):
    """The adapter as it stands before some steps."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step in SAVED:
            model.save_pretrained(self.folder / f"now-{state.global_step}")


def save_data(path):
    """Sums in words: short, and with something to learn."""
    random = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(2 * STEPS):
            a, b, c = (int(n) for n in random.integers(2, 90, 3))
            question = f"Ann has {a} marbles and buys {b} more. She gives {c % a} away. How many has she now?"
            total, left = a + b, a + b - c % a
            answer = (
                f"She has {a} + {b} = {total} marbles first, then {total} - {c % a} = {left}. #### {left}"
            )
            row = {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            file.write(json.dumps(row) + "\n")


def save_tokens(folder, seen):
    """A tokens folder of what training saw."""
    folder.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokenizer.save_pretrained(folder / "tokenizer")
    facts = {"fingerprint": checkpoints.tokenizer_fingerprint(tokenizer), "name": "smollm2"}
    rows = [
        {
            "example_id": str(i),
            "input_ids": o.input_ids.tolist(),
            "response_mask": o.response_mask.tolist(),
        }
        for i, o in enumerate(seen)
    ]
    table = pa.Table.from_pylist(rows, schema=tables.TOKENS)
    about = {"kind": "tokens", "stats": {}, "tokenizer": facts}
    about[joins.TOKENS] = joins.tokens_fingerprint(table)
    tables.write_part(folder / tables.part_name(0), table, about)


@needs_smollm2
@pytest.mark.timeout(1800)
def test_ten_steps_in_trls_defaults_select_as_offline(tmp_path):
    save_data(tmp_path / "data.jsonl")
    watcher = Watcher()
    trainer = trainer_of_the_first(
        FOLDER,
        tmp_path / "data.jsonl",
        tmp_path / "trained",
        watcher,
        STEPS,
        WARMUP,
        learning_rate=4e-3,
        settings=", per_device_train_batch_size=2",
    )
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    trainer.add_callback(SavesAdapters(tmp_path))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    wrong, number = 0, 0
    for step in SAVED:
        seen = [o for o in watcher.seen if o.step == step]
        inputs = {"tokens": tmp_path / f"tokens-{step}"}
        save_tokens(inputs["tokens"], seen)
        for role, checkpoint in (("history", FOLDER), ("current", tmp_path / f"now-{step}")):
            inputs[role] = tmp_path / f"{role}-{step}"
            stage = Score(checkpoint=str(checkpoint), attention=True, device="cpu", dtype="bfloat16")
            stage.run(make_context(inputs[role], {"tokens": inputs["tokens"]}))
        inputs["attention"], masked = inputs["current"], tmp_path / f"masked-{step}"
        Select(rho=0.6, gamma=0.5).run(make_context(masked, inputs))
        rows = pl.read_parquet(masked / "part-*.parquet").sort("example_id")
        for o, (keep, response) in zip(
            seen, rows.select("keep_mask", "response_mask").iter_rows(), strict=True
        ):
            keep, response = np.array(keep, bool), np.array(response, bool)
            wrong += int((o.keep_mask != keep)[response].sum())
            number += int(response.sum())
    print(f"losses {losses}; {wrong} of {number} decisions differ")
    assert wrong <= TOLERANCE * number
