import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.training.history import HistorySnapshots, snapshot_steps
from sstoken.stages.training.history_index import (
    Entry,
    read_history,
    read_index,
    too_few_steps,
    write_index,
)
from tests import factories


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return factories.save_model(tmp_path_factory.mktemp("model") / "base")


def rows(count=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, factories.VOCABULARY, (count, 8), generator=generator).tolist()
    return [{"input_ids": i, "labels": i} for i in ids]


def trainer(model, folder, *callbacks, **arguments):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        **arguments,
    }
    return Trainer(
        model,
        TrainingArguments(**settings),
        data_collator=default_data_collator,
        train_dataset=rows(),
        callbacks=list(callbacks),
        processing_class=AutoTokenizer.from_pretrained(model.name_or_path) if model.name_or_path else None,
    )


def load(ref):
    return AutoModelForCausalLM.from_pretrained(ref)


def weights(folder):
    return load_file(folder / "model.safetensors")


class Recorder(TrainerCallback):
    """Copies the weights after each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after.append({n: p.detach().clone() for n, p in model.named_parameters()})


@pytest.mark.parametrize(
    ("max_steps", "number", "every", "expected"),
    [
        (100, 4, None, {25, 50, 75, 100}),
        (10, 4, None, {2, 5, 8, 10}),
        (3, 8, None, {1, 2, 3}),
        (1, 4, None, {1}),
        (10, None, 4, {4, 8, 10}),
        (8, None, 4, {4, 8}),
        (3, None, 10, {3}),
    ],
)
def test_steps(max_steps, number, every, expected):
    assert snapshot_steps(max_steps, number, every) == expected


def test_a_training_too_short_for_its_snapshots_says_so() -> None:
    assert "50 snapshots" in too_few_steps(2, 50, None)[0]
    assert "every 10 steps" in too_few_steps(9, None, 10)[0]
    assert too_few_steps(10, None, 10) == too_few_steps(4, 4, None) == too_few_steps(1, None, None) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_snapshots": 2, "every_steps": 2}, "num_snapshots is 2 and every_steps is 2; give one"),
        ({"num_snapshots": 0}, "num_snapshots is 0"),
        ({"every_steps": -1}, "every_steps is -1"),
        ({"ema_decay": 1.0}, r"ema_decay is 1\.0"),
    ],
)
def test_refuses_settings_out_of_range(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        HistorySnapshots(tmp_path, **settings)


def test_in_a_trainer_with_its_own_logging(base, tmp_path):
    recorder = Recorder()
    out = tmp_path / "history"
    trainer(load(base), tmp_path, recorder, HistorySnapshots(out, 3), logging_steps=100).train()
    entries = read_history(out)
    assert [e.name for e in entries] == ["step-0", "step-2", "step-4", "step-6"]
    assert entries[0] == Entry("step-0", str(base), 0, 0, None, "reference")
    assert all(e.tokens_seen is None and e.loss > 0 for e in entries[1:])
    for entry in entries[1:]:
        saved = weights(out / entry.name)
        assert all(torch.equal(saved[n], w) for n, w in recorder.after[entry.step - 1].items() if n in saved)
        AutoTokenizer.from_pretrained(entry.path)


def test_in_an_sft_trainer(base, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    out = tmp_path / "history"
    data = Dataset.from_list([{"input_ids": r["input_ids"]} for r in rows()])
    sft = SFTTrainer(str(base), config, train_dataset=data, callbacks=[HistorySnapshots(out, every_steps=2)])
    sft.train()
    entries = read_history(out)
    assert [(e.name, e.kind) for e in entries] == [
        ("step-0", "reference"),
        ("step-2", "full"),
        ("step-3", "full"),
    ]
    assert entries[0].path == str(base)
    assert all(e.tokens_seen > 0 and e.loss > 0 for e in entries[1:])
    assert load(entries[-1].path).config.vocab_size == factories.VOCABULARY
    AutoTokenizer.from_pretrained(entries[-1].path)


def test_peft_model_saves_adapters(base, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(load(base), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    out = tmp_path / "history"
    callback = HistorySnapshots(out, 1, ema_decay=0.5)
    Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, save_strategy="no", report_to="none", use_cpu=True
        ),
        train_dataset=rows(),
        callbacks=[callback],
    ).train()
    assert [(e.name, e.kind, e.path) for e in read_history(out)] == [
        ("step-0", "reference", str(base)),
        ("step-2", "lora", str(out / "step-2")),
        ("step-2-ema", "ema", str(out / "step-2-ema")),
    ]
    assert not (out / "step-2/model.safetensors").exists()
    PeftModel.from_pretrained(load(base), out / "step-2-ema")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_against_the_formula(base, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    recorder = Recorder()
    expected = {n: p.detach().float().clone() for n, p in model.named_parameters()}
    out = tmp_path / "history"
    trainer(model, tmp_path, recorder, HistorySnapshots(out, every_steps=4, ema_decay=0.8)).train()
    for step, after in enumerate(recorder.after, start=1):
        expected = {n: 0.8 * expected[n] + 0.2 * w.float() for n, w in after.items()}
        if step in (4, 6):
            saved = weights(out / f"step-{step}-ema")
            assert {t.dtype for t in saved.values()} == {torch.float32}
            for name, tensor in saved.items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    # the model trained on undisturbed
    assert all(torch.equal(w, recorder.after[-1][n]) for n, w in weights(out / "step-6").items())
    assert {t.dtype for t in weights(out / "step-6").values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_survives_resuming_to_the_bit(base, tmp_path, dtype):
    def go(out, resume=None, **arguments):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        callback = HistorySnapshots(out, 2, ema_decay=0.8)
        trainer(model, out / "trainer", callback, save_strategy="steps", save_steps=3, **arguments).train(
            resume_from_checkpoint=resume
        )

    go(tmp_path / "whole")
    go(tmp_path / "resumed")
    # from its middle: what came later is forgotten, then made again
    (tmp_path / "resumed/step-6-ema/model.safetensors").unlink()
    go(tmp_path / "resumed", resume=str(tmp_path / "resumed/trainer/checkpoint-3"))
    for name in ("step-3-ema", "step-6", "step-6-ema"):
        file = f"{name}/model.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes(), name
    assert read_index(tmp_path / "whole") == read_index(tmp_path / "resumed")


def test_average_cannot_resume_elsewhere(base, tmp_path):
    out = tmp_path / "history"
    trainer(load(base), tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(SstokenError, match="no step-2-ema, so the average cannot resume at step 2"):
        trainer(load(base), tmp_path, HistorySnapshots(out, 2, ema_decay=0.5)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_training_that_stops_early_keeps_its_last_step(base, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4
            return control

    trainer(load(base), tmp_path / "t", HistorySnapshots(tmp_path, 2), Stop(), logging_steps=1).train()
    assert [e.name for e in read_history(tmp_path)] == ["step-0", "step-3", "step-4"]


def test_model_from_nothing_has_no_reference(tmp_path):
    model = load(factories.save_model(tmp_path / "base"))
    model.name_or_path = ""
    trainer(model, tmp_path, HistorySnapshots(tmp_path / "history", 1)).train()
    assert [e.name for e in read_history(tmp_path / "history")] == ["step-6"]


def test_partial_snapshot_is_swept_away(base, tmp_path):
    (tmp_path / "step-3.0123abcd.tmp").mkdir()
    trainer(load(base), tmp_path / "t", HistorySnapshots(tmp_path, 1)).train()
    assert not list(tmp_path.glob("*.tmp"))


def test_index_errors_are_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"no history\.json; name the folder that `anchor` wrote"):
        read_history(tmp_path)
    (tmp_path / "history.json").write_text('[{"name": "x"}]')
    with pytest.raises(SstokenError, match="damaged"):
        read_history(tmp_path)
    write_index(tmp_path, [Entry("step-0", "user/model", 0, 0, None, "reference")])
    assert read_history(tmp_path)[0].path == "user/model"
    write_index(tmp_path, [Entry("step-1", "step-1", 1, None, 1.5, "full")])
    with pytest.raises(SstokenError, match="names step-1, which is missing"):
        read_history(tmp_path)
    assert json.loads((tmp_path / "history.json").read_text())[0]["loss"] == 1.5


def test_reading_an_index_needs_no_heavy_library():
    modules = "sstoken.stages.training.history_index, stages.anchor"
    code = f"import sys, {modules}; print({{'torch', 'transformers'}} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize("adapted", [False, True])
def test_the_base_is_found_from_anywhere(adapted, tmp_path, monkeypatch):
    """Trained with a path as typed; read from another directory, and after both were moved."""
    from peft import LoraConfig, get_peft_model

    from sstoken.stages.checkpoints import adapter_base, check_loadable

    place = tmp_path / "place"
    factories.save_model(place / "base")
    monkeypatch.chdir(place)
    model = AutoModelForCausalLM.from_pretrained("base")
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments("out", max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
    Trainer(model, arguments, train_dataset=rows(), callbacks=[HistorySnapshots("history", 1)]).train()
    monkeypatch.chdir(tmp_path)
    history = place / "history"
    assert read_history(history)[0].path == str(place / "base")
    if adapted:
        assert adapter_base(str(history / "step-1")) == str(place / "base")
        check_loadable(str(history / "step-1"))
    (tmp_path / "later").mkdir()
    history.rename(tmp_path / "later" / "history")
    assert read_history(tmp_path / "later" / "history")[0].path == str(place / "base"), "left where it was"
    (place / "base").rename(tmp_path / "later" / "base")
    assert read_history(tmp_path / "later" / "history")[0].path == str(tmp_path / "later" / "base")


def test_a_hub_base_is_kept_with_its_commit():
    from sstoken.stages.checkpoints import lasting_reference

    assert lasting_reference("user/name", "abc") == "user/name@abc"
    assert lasting_reference("user/name@main", "abc") == "user/name@abc"
    assert lasting_reference("user/name@v1") == "user/name@v1"
    assert lasting_reference("user/name") == "user/name"
