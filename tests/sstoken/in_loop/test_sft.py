"""TRL's SFT trainer with selection: packed, padding-free or padded, the same masks as offline and in `Trainer`."""

import importlib

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import sstoken.in_loop.sft
from sstoken import SelfModulatedMixin, SelfModulatedSFTTrainer, SelfModulation, UsageError
from tests.sstoken.in_loop.small import (
    SETTINGS,
    Watcher,
    dumping,
    make_examples,
    make_model,
    recompute,
    save_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def sft(folder, tokenizer, watcher, *, model=None, dataset=None, selection=None, trainer=None, **changes):
    config = {"max_length": None, "loss_type": "nll", "gradient_checkpointing": False} | SETTINGS | changes
    peft_config = config.pop("peft_config", None)
    made = dumping(watcher, trainer or SelfModulatedSFTTrainer)(
        make_model() if model is None else model,
        SFTConfig(str(folder), **config),
        train_dataset=Dataset.from_list(make_examples()) if dataset is None else dataset,
        processing_class=tokenizer,
        selection=selection or SelfModulation(rho=0.4, gamma=0.6),
        observers=[watcher],
        peft_config=peft_config,
    )
    made.train()
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": True, "max_length": 64, "per_device_train_batch_size": 2},
        {"packing": True, "max_length": 64, "gradient_checkpointing": True, "shuffle_dataset": True},
        {"padding_free": True},
        {"max_length": 16},
        {"max_length": 16, "truncation_mode": "keep_end"},
        {"loss_type": "dft"},
    ],
    ids=str,
)
def test_masks_are_those_of_an_offline_recomputation(tmp_path, tokenizer, settings):
    watcher, examples = Watcher(), make_examples()
    trainer = sft(tmp_path, tokenizer, watcher, dataset=Dataset.from_list(examples), **settings)
    if "packing" not in settings and settings.get("max_length"):
        cut = slice(16) if settings.get("truncation_mode") is None else slice(-16, None)
        examples = [{name: values[cut] for name, values in e.items()} for e in examples]
    by_ids = {np.array(e["input_ids"]).tobytes(): e for e in examples}
    masks = watcher.masks()
    assert len(masks) >= 3 * 4
    for (step, ids), mask in masks.items():
        assert mask == recompute(make_model(), watcher.weights[step], by_ids[ids], 0.4, 0.6)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"mean_token_accuracy", "entropy", "selection/kept_share", "selection/rel_kept"} <= logs[0].keys()
    assert trainer.train_dataset.column_names == [
        *(["input_ids", "seq_lengths"] if settings.get("packing") else ["input_ids"]),
        "labels",
        "history_loss",
    ]


def test_one_step_is_that_of_the_kept_tokens_alone(tmp_path, tokenizer):
    """Packed or not: the gradient of the mean over the kept tokens, in plain PyTorch."""
    for settings in ({}, {"packing": True, "max_length": 96}):
        watcher = Watcher()
        trainer = sft(
            tmp_path,
            tokenizer,
            watcher,
            max_steps=1,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0,
            **settings,
        )
        model, losses = make_model(), []
        for seen in watcher.seen:
            log_probs = model(torch.from_numpy(seen.input_ids)[None]).logits[0].log_softmax(-1)
            losses += [-log_probs[i - 1, seen.input_ids[i]] for i in np.flatnonzero(seen.keep_mask)]
        torch.stack(losses).mean().backward()
        for (name, p), ours in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(ours.detach(), p.detach() - p.grad, atol=1e-5, rtol=0, msg=name)


def test_a_mixin_of_ones_own(tmp_path, tokenizer):
    class Mine(SFTTrainer):
        pass

    class Selecting(SelfModulatedMixin, Mine):
        pass

    watcher = Watcher()
    sft(tmp_path, tokenizer, watcher, trainer=Selecting, max_steps=1)
    assert len(watcher.masks()) == 4


@pytest.mark.parametrize("history", ["base", "ema"])
@pytest.mark.parametrize("packing", [False, True])
def test_lora_with_a_history_of_its_own(tmp_path, tokenizer, history, packing):
    """Conversations as they are: no column is needed. At the first step the history is the model itself: REL is 0."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"w{i} w7"},
                {"role": "assistant", "content": f"w{i + 3} w9 w2"},
            ]
        }
        for i in range(1, 30)
    ]
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>{% endgeneration %}"
        "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    watcher = Watcher()
    trainer = sft(
        tmp_path,
        tokenizer,
        watcher,
        dataset=Dataset.from_list(rows),
        selection=SelfModulation(history=history),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        assistant_only_loss=True,
        packing=packing,
        max_length=32 if packing else None,
    )
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert abs(logs[0]["selection/rel_kept"]) < 1e-5
    assert abs(logs[2]["selection/rel_kept"]) > 1e-3
    assert all(o.response_mask.sum() == 4 and o.keep_mask.sum() == 3 for o in watcher.seen)


def test_evaluation_is_the_ordinary_one(tmp_path, tokenizer):
    examples = Dataset.from_list(make_examples(8))
    trainer = sft(tmp_path, tokenizer, Watcher(), max_steps=1)
    plain = SFTTrainer(
        trainer.model,
        SFTConfig(str(tmp_path), max_length=None, **SETTINGS),
        train_dataset=examples,
        processing_class=tokenizer,
    )
    expected = plain.evaluate(examples)["eval_loss"]
    assert trainer.evaluate(examples)["eval_loss"] == pytest.approx(expected, abs=1e-6)


def test_data_for_evaluation_may_be_called_train(tmp_path, tokenizer):
    plain = Dataset.from_list(make_examples(8)).remove_columns("history_loss")
    trainer = SelfModulatedSFTTrainer(
        make_model(),
        SFTConfig(str(tmp_path), max_length=None, **SETTINGS),
        train_dataset=Dataset.from_list(make_examples()),
        eval_dataset={"train": plain, "other": plain},
        processing_class=tokenizer,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_train_loss"] == pytest.approx(metrics["eval_other_loss"])


@pytest.mark.parametrize("packing", [False, True])
def test_bad_history_losses_are_refused_when_the_trainer_is_made(tmp_path, tokenizer, packing):
    examples = make_examples()
    examples[5]["history_loss"] = examples[5]["history_loss"][1:]
    settings = {"packing": packing, "max_length": 64 if packing else None}
    with pytest.raises(UsageError, match=r"training example 5: .* history losses for"):
        sft(tmp_path, tokenizer, Watcher(), dataset=Dataset.from_list(examples), **settings)
    without = Dataset.from_list(make_examples()).remove_columns("history_loss")
    with pytest.raises(UsageError, match="no column 'history_loss'"):
        sft(tmp_path, tokenizer, Watcher(), dataset=without, **settings)


def test_a_trl_that_is_too_old_is_refused_on_import(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.6.0")
    with pytest.raises(ImportError, match=r"needs TRL 1\.7 or newer, and this is 1\.6\.0"):
        importlib.reload(sstoken.in_loop.sft)
