import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import joins, tables
from sstoken.stages.anchor import Anchor
from sstoken.stages.stage import Progress
from sstoken.stages.training.history_index import read_history
from tests import factories
from tests.stages.context import make_context
from tests.stages.tokens_folder import save_tokens
from tests.support import PATIENCE, ROOT, SHARED, TWO_PROCESSES, needs_shared


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return factories.save_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return save_tokens(tmp_path_factory.mktemp("data") / "tokens")


class Interrupted(BaseException):
    pass


def interrupt_at(step, how):
    """A progress bar that calls `how` when so many steps are done."""

    class Bar(Progress):
        done = 0

        def advance(self, amount=1):
            self.done += amount
            if self.done == step:
                how()

        def skip(self, amount):
            self.done += amount

    @contextmanager
    def progress(unit, total):
        yield Bar()

    return progress


def fail():
    raise Interrupted


def run(stage, out, tokens, **context):
    stage.check()
    return stage.run(make_context(out, inputs={"tokens": tokens}, **context))


def content(out):
    """Every file of a finished run but the metrics of time."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_writes_snapshots_index_log_and_picture(model, tokens, tmp_path):
    out = tmp_path / "history"
    metrics = run(Anchor(model=str(model), batch_size=8, epochs=2, learning_rate=1e-2), out, tokens)
    # 40 examples, one without a response: 39, five steps an epoch
    assert metrics["steps"] == 10
    assert metrics["snapshots"] == ["step-0", "step-2", "step-5", "step-8", "step-10"]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [
            "history.json",
            "learning_curve.png",
            "log.jsonl",
            "step-10",
            "step-2",
            "step-5",
            "step-8",
            "tokens.json",
        ]
    )
    entries = read_history(out)
    assert (entries[0].kind, entries[0].path, entries[0].loss) == ("reference", str(model), None)
    assert entries[-1].path == str(out / "step-10")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 11))
    assert entries[2].loss == log[4]["loss"]
    assert entries[2].tokens_seen == log[4]["tokens_seen"]
    rows = pa.concat_tables(tables.pq.read_table(p) for p in tables.parts(tokens)).to_pylist()
    assert entries[2].tokens_seen == sum(len(r["input_ids"]) for r in rows if any(r["response_mask"]))
    assert metrics["loss"] == log[-1]["loss"] < log[0]["loss"]
    assert (out / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_snapshot_loads_with_its_tokenizer_and_differs_from_the_base(model, tokens, tmp_path):
    run(Anchor(model=str(model), max_steps=2, snapshots=1), tmp_path, tokens)
    entry = read_history(tmp_path)[-1]
    loaded = AutoModelForCausalLM.from_pretrained(entry.path)
    base = AutoModelForCausalLM.from_pretrained(model)
    assert any(not torch.equal(a, b) for a, b in zip(loaded.parameters(), base.parameters(), strict=True))
    assert (Path(entry.path) / "tokenizer.json").read_bytes() == (
        tokens / "tokenizer/tokenizer.json"
    ).read_bytes()


def test_first_loss_is_the_models_own(model, tokens, tmp_path):
    """Against the obvious loop: the mean over response tokens, the first token never among them."""
    run(Anchor(model=str(model), max_steps=1, batch_size=40, learning_rate=1e-9), tmp_path, tokens)
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    losses = []
    for part in tables.parts(tokens):
        for row in tables.pq.read_table(part).to_pylist():
            with torch.no_grad():
                logits = base(torch.tensor([row["input_ids"]])).logits[0].float()
            log_probs = logits.log_softmax(-1)
            for i in range(1, len(row["input_ids"])):
                if row["response_mask"][i]:
                    losses.append(-log_probs[i - 1, row["input_ids"][i]].item())
    logged = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["loss"]
    assert logged == pytest.approx(sum(losses) / len(losses), rel=1e-5)


VARIANTS = {
    "full": {"ema_decay": 0.9, "gradient_accumulation": 2, "batch_size": 3},
    "lora": {"lora_rank": 4, "lora_dropout": 0.2, "ema_decay": 0.9, "batch_size": 8},
    "checkpointing": {"gradient_checkpointing": True, "precision": "bfloat16", "batch_size": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_equals_uninterrupted(model, tokens, tmp_path, variant):
    stage = Anchor(model=str(model), epochs=2, snapshots=4, learning_rate=1e-2, **VARIANTS[variant])
    steps = run(stage, tmp_path / "whole", tokens)["steps"]
    # before the first snapshot, in the first epoch, on a snapshot of the second, and at the last step
    for step in (1, steps // 4 + 1, 3 * steps // 4, steps):
        with pytest.raises(Interrupted):
            run(stage, tmp_path / "resumed", tokens, progress=interrupt_at(step, fail))
    run(stage, tmp_path / "resumed", tokens)
    assert content(tmp_path / "resumed") == content(tmp_path / "whole")


def test_goes_on_at_the_last_snapshot(model, tokens, tmp_path):
    stage = Anchor(model=str(model), max_steps=8, snapshot_every=3)
    with pytest.raises(Interrupted):
        run(stage, tmp_path, tokens, progress=interrupt_at(8, fail))
    assert [p.name for p in (tmp_path / "trainer").glob("checkpoint-*")] == ["checkpoint-6"]
    started = []

    @contextmanager
    def progress(unit, total):
        class Bar(Progress):
            skip = advance = lambda self, amount=1: started.append(amount)

        assert (unit, total) == ("steps", 8)
        yield Bar()

    assert run(stage, tmp_path, tokens, progress=progress)["snapshots"] == [
        "step-0",
        "step-3",
        "step-6",
        "step-8",
    ]
    assert started == [6, 1, 1]


def test_killed_after_training_only_finishes(model, tokens, tmp_path, monkeypatch):
    stage = Anchor(model=str(model), max_steps=2)
    monkeypatch.setattr("sstoken.stages.training.learning_curve.draw", lambda *_: fail())
    with pytest.raises(Interrupted):
        run(stage, tmp_path, tokens)
    monkeypatch.undo()
    assert run(stage, tmp_path, tokens, progress=interrupt_at(1, fail))["steps"] == 2
    assert not (tmp_path / "trainer").exists()


CHILD = """
import os, signal, sys
from pathlib import Path
import transformers
from tests.stages.test_anchor import Anchor, interrupt_at, run
model, tokens, out, when = sys.argv[1:]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if when == "saving":  # weights and optimizer are there, the rest is not
    transformers.Trainer._save_rng_state = die
    progress = interrupt_at(-1, die)
else:
    progress = interrupt_at(int(when), die)
stage = Anchor(model=model, epochs=2, snapshots=3, learning_rate=1e-2, ema_decay=0.9)
run(stage, Path(out), Path(tokens), progress=progress)
"""


def child(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], env=environment, timeout=PATIENCE
    )


@pytest.mark.slow
def test_killed_process_goes_on_to_the_same_bytes(model, tokens, tmp_path):
    assert child(model, tokens, tmp_path / "killed", "saving").returncode == -signal.SIGKILL
    torn = tmp_path / "killed/trainer/checkpoint-3"
    assert (torn / "model.safetensors").exists()
    assert not (torn / "whole.json").exists()
    assert child(model, tokens, tmp_path / "killed", 5).returncode == -signal.SIGKILL
    assert (torn / "whole.json").exists()
    stage = Anchor(model=str(model), epochs=2, snapshots=3, learning_rate=1e-2, ema_decay=0.9)
    run(stage, tmp_path / "killed", tokens)
    run(stage, tmp_path / "whole", tokens)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_lora_saves_the_adapter_alone(model, tokens, tmp_path):
    run(Anchor(model=str(model), max_steps=2, snapshots=1, lora_rank=2), tmp_path, tokens)
    entry = read_history(tmp_path)[-1]
    assert entry.kind == "lora"
    assert all("lora_" in name for name in load_file(f"{entry.path}/adapter_model.safetensors"))
    settings = json.loads((Path(entry.path) / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model)
    with pytest.raises(UsageError, match="merge it"):
        Anchor(model=entry.path).check()


def test_loss_that_is_no_number_stops_the_run(model, tokens, tmp_path):
    with pytest.raises(
        SstokenError, match=r"^training failed at step \d+: .* (nan|inf); lower learning_rate"
    ) as error:
        run(Anchor(model=str(model), max_steps=20, learning_rate=1e30, warmup_ratio=0), tmp_path, tokens)
    assert "\n" not in str(error.value)
    for entry in read_history(tmp_path)[1:]:
        assert all(t.isfinite().all() for t in load_file(f"{entry.path}/model.safetensors").values())


def test_refuses_a_model_that_does_not_fit_the_tokens(model, tokens, tmp_path):
    small = factories.save_model(tmp_path / "small", vocabulary=50)
    with pytest.raises(
        SstokenError, match=r"small: its vocabulary has 50 entries, but .*tokens holds token id 12\d"
    ):
        run(Anchor(model=str(small)), tmp_path / "a", tokens)
    short = factories.save_model(tmp_path / "short", positions=16)
    with pytest.raises(
        SstokenError, match=r"takes 16 tokens, .* of 24; encode the data with --max-length 16"
    ):
        run(Anchor(model=str(short)), tmp_path / "b", tokens)
    other = factories.save_model(tmp_path / "other")
    factories.save_tokenizer(other, first="v")
    with pytest.raises(SstokenError, match=r"other: its tokenizer is not the one that made"):
        run(Anchor(model=str(other)), tmp_path / "c", tokens)
    for file in other.glob("tokenizer*"):
        file.unlink()
    run(Anchor(model=str(other), max_steps=1), tmp_path / "d", tokens)


def test_refuses_tokens_without_anything_to_train_on(model, tokens, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SstokenError, match="no part"):
        run(Anchor(model=str(model)), tmp_path / "a", tmp_path / "empty")
    row = {"example_id": "0", "input_ids": [1, 2], "response_mask": [True, False]}
    table = pa.Table.from_pylist([row], schema=tables.TOKENS)
    about = {joins.TOKENS: joins.tokens_fingerprint(table)}
    tables.write_part(tmp_path / "empty" / tables.part_name(0), table, about)
    with pytest.raises(SstokenError, match="none of its 1 examples has a token to train on"):
        run(Anchor(model=str(model)), tmp_path / "b", tmp_path / "empty")


def test_refuses_wrong_settings_before_any_work(model):
    with pytest.raises(UsageError, match="snapshots is 2 and snapshot_every is 3"):
        Anchor(model=str(model), snapshots=2, snapshot_every=3).check()
    with pytest.raises(SstokenError, match="no such folder"):
        Anchor(model="./nowhere").check()
    for field, value in {"batch_size": 0, "ema_decay": 1.0, "learning_rate": -1, "lora_rank": 0}.items():
        with pytest.raises(ValidationError, match=field):
            Anchor(model=str(model), **{field: value})


def test_refuses_to_go_on_with_another_number_of_processes(model, tokens, tmp_path):
    stage = Anchor(model=str(model), max_steps=4)
    with pytest.raises(Interrupted):
        run(stage, tmp_path, tokens, progress=interrupt_at(3, fail))
    mark = tmp_path / "trainer/checkpoint-2/whole.json"
    mark.write_text('{"processes": 2}')
    with pytest.raises(SstokenError, match="made by 2 processes, but now there are 1"):
        run(stage, tmp_path, tokens)


def test_what_snapshots_take_over_from_the_model_is_a_source(tmp_path):
    folder = factories.save_model(tmp_path / "base")
    config = folder / "generation_config.json"
    config.write_text("{}")
    before = Anchor(model=str(folder)).sources(lambda file: file.read_text("latin-1"))
    config.write_text('{"temperature": 0.5}')
    assert Anchor(model=str(folder)).sources(lambda file: file.read_text("latin-1")) != before


def test_fingerprint_leaves_speed_out(model):
    assert "data_workers" not in Anchor(model=str(model)).fingerprinted()
    assert "batch_size" in Anchor(model=str(model)).fingerprinted()


DISTRIBUTED = """
import sys
from pathlib import Path
from sstoken.stages.processes import end_process
from tests.stages.test_anchor import Anchor, Interrupted, fail, interrupt_at, run
model, tokens, out, stop = sys.argv[1:]
stage = Anchor(model=model, epochs=2, snapshots=3, batch_size=4, learning_rate=1e-2, ema_decay=0.9)
metrics = run(stage, Path(out), Path(tokens), progress=interrupt_at(int(stop), fail))
assert metrics["snapshots"][-2] == f"step-{metrics['steps']}", metrics
end_process(0)
"""


@pytest.mark.slow
def test_two_processes_write_one_history_and_resume(model, tokens, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(DISTRIBUTED)

    def launch(out, stop):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        arguments = map(str, (script, model, tokens, out, stop))
        return subprocess.run([*TWO_PROCESSES, *arguments], env=environment, timeout=PATIENCE).returncode

    assert launch(tmp_path / "whole", 1000) == 0
    assert launch(tmp_path / "resumed", 5) != 0
    assert (tmp_path / "resumed/trainer/checkpoint-3/rng_state_1.pth").exists()
    assert launch(tmp_path / "resumed", 1000) == 0
    assert content(tmp_path / "resumed") == content(tmp_path / "whole")
    # the same batches as one process with twice the batch size, until the last of the epoch is filled up
    single = Anchor(model=str(model), epochs=2, snapshots=3, batch_size=8, learning_rate=1e-2, ema_decay=0.9)
    run(single, tmp_path / "single", tokens)
    logs = [(tmp_path / out / "log.jsonl").read_text().splitlines()[:4] for out in ("whole", "single")]
    for two, one in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert two["tokens_seen"] == one["tokens_seen"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


@needs_shared
def test_real_model_learns(tmp_path):
    from transformers import AutoTokenizer

    base, folder = SHARED / "models/base", tmp_path / "tokens"
    tokenizer = AutoTokenizer.from_pretrained(base)
    folder.mkdir()
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = []
    for number, line in enumerate((SHARED / "data/gsm8k/train.jsonl").read_text().splitlines()[:16]):
        example = json.loads(line)
        prompt = tokenizer(example["question"])["input_ids"]
        answer = tokenizer(example["answer"])["input_ids"] + [tokenizer.eos_token_id]
        mask = [False] * len(prompt) + [True] * len(answer)
        rows.append({"example_id": str(number), "input_ids": prompt + answer, "response_mask": mask})
    table = pa.Table.from_pylist(rows, schema=tables.TOKENS)
    about = {joins.TOKENS: joins.tokens_fingerprint(table)}
    tables.write_part(folder / tables.part_name(0), table, about)
    stage = Anchor(
        model=str(base), batch_size=4, epochs=2, snapshots=2, learning_rate=1e-3, schedule="constant"
    )
    assert run(stage, tmp_path / "out", folder)["snapshots"] == ["step-0", "step-4", "step-8"]
    before, after = (e.loss for e in read_history(tmp_path / "out")[1:])
    assert after < before


@pytest.mark.parametrize(("name", "value"), [("lora_alpha", 16.0), ("lora_dropout", 0.1)])
def test_settings_of_an_adapter_that_is_not_trained_are_refused(name, value, model):
    with pytest.raises(UsageError, match=f"{name} is {value}, which needs lora_rank"):
        Anchor(model=str(model), **{name: value}).check()
    Anchor(model=str(model), lora_rank=2, **{name: value}).check()


RATES = {
    "constant": [0, 0.5e-3, *[1e-3] * 6],
    "linear": [1e-3 * share for share in (0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)],
    "cosine": [0, 0.5e-3, *(0.5e-3 * (1 + np.cos(np.pi * done / 6)) for done in range(6))],
}
"""Learning rates of 8 steps, of which 2 are the warm-up, from 0."""


@pytest.mark.parametrize("schedule", RATES)
def test_the_learning_rate_warms_up_and_follows_its_schedule(model, tokens, tmp_path, schedule):
    settings = {"max_steps": 8, "warmup_ratio": 0.25, "learning_rate": 1e-3, "snapshots": 1}
    run(Anchor(model=str(model), schedule=schedule, **settings), tmp_path / "out", tokens)
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines] == pytest.approx(RATES[schedule], abs=1e-12)


def moved(model, tokens, out, **settings):
    """How far two steps carry the weights of the layers, and the weights."""
    constant = {"max_steps": 2, "schedule": "constant", "warmup_ratio": 0, "snapshots": 1}
    run(Anchor(model=str(model), learning_rate=1e-2, **constant | settings), out, tokens)
    before, after = (
        {
            name: weight
            for name, weight in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()
            if name.endswith("proj.weight")
        }
        for folder in (model, out / "step-2")
    )
    return max(float((after[name] - before[name]).abs().max()) for name in before), before, after


def test_gradients_are_clipped(model, tokens, tmp_path):
    free, _, _ = moved(model, tokens, tmp_path / "free", max_grad_norm=0)
    clipped, _, _ = moved(model, tokens, tmp_path / "clipped", max_grad_norm=1e-9)
    assert free > 1e-2  # Adam's step is the learning rate, whatever the gradient's size
    assert clipped < free / 10  # but for gradients near its epsilon of 1e-8


def test_weights_decay(model, tokens, tmp_path):
    # With gradients clipped away, decay alone is left: two factors of 1 - rate * decay.
    settings = {"max_grad_norm": 1e-12, "weight_decay": 10.0}
    _, before, after = moved(model, tokens, tmp_path / "out", **settings)
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight * 0.9**2, atol=1e-5)


def test_the_log_grows_with_the_training(model, tokens, tmp_path):
    out = tmp_path / "history"
    with pytest.raises(Interrupted):
        run(
            Anchor(model=str(model), max_steps=6, snapshots=2, batch_size=2),
            out,
            tokens,
            progress=interrupt_at(4, fail),
        )
    live = [json.loads(line)["step"] for line in (out / "trainer" / "log.jsonl").read_text().splitlines()]
    assert live == [1, 2, 3]
    run(Anchor(model=str(model), max_steps=6, snapshots=2, batch_size=2), out, tokens)
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [
        *range(1, 7)
    ]


def test_reports_to_tensorboard_beside_the_output(model, tokens, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    run(Anchor(model=str(model), max_steps=2, report_to="tensorboard"), tmp_path / "history", tokens)
    assert list((tmp_path / "tensorboard" / "history").glob("events.*"))
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_refuses_a_reporter_that_is_not_installed(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match="report_to is 'trackio', which is not installed; pip install trackio"
    ):
        Anchor(model=str(model), report_to="trackio").check()


@pytest.mark.parametrize("native", [True, False])
def test_names_what_would_make_it_faster(native, model, monkeypatch):
    monkeypatch.setattr("sstoken.stages.anchor.multiplies_bfloat16", lambda: native)
    said = Anchor(model=str(model)).faster()
    assert "--lora-rank" in said
    assert "--lora-rank" not in Anchor(model=str(model), lora_rank=4).faster()
    if not torch.accelerator.is_available():
        assert ("--precision bfloat16" in said) == native
