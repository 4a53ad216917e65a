"""A selection that runs but means nothing is spoken of once, at the first batch; one that means something is not."""

import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from sstoken import SelfModulatedTrainer, SelfModulation
from sstoken.in_loop.settings import Schedule
from tests.sstoken.in_loop.small import (
    arguments,
    collate,
    flatten,
    losses_of,
    make_examples,
    make_model,
    make_scored_examples,
)

OTHER_START = "not those of the model that training starts from"


def remarks(folder, examples=None, model=None, collator=collate, changes=None, **selection):
    """What a run of three steps warns of; the examples' history is an earlier checkpoint, which is meant here."""
    return [
        t
        for t in all_remarks(folder, examples, model, collator, changes, **selection)
        if OTHER_START not in t
    ]


def all_remarks(folder, examples=None, model=None, collator=collate, changes=None, **selection):
    trainer = SelfModulatedTrainer(
        make_model() if model is None else model,
        arguments(folder, **changes or {}),
        data_collator=collator,
        train_dataset=Dataset.from_list(make_scored_examples() if examples is None else examples),
        selection=SelfModulation(**selection),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    texts = [str(w.message) for w in caught if "in-loop selection" in str(w.message)]
    assert all("\n" not in text for text in texts)
    return texts


def relabelled(first):
    """Labels from the position `first(ids)` on."""
    return make_scored_examples(first=first)


@pytest.mark.parametrize("collator", [collate, flatten])
def test_a_selection_that_means_something_is_not_spoken_of(tmp_path, collator):
    assert remarks(tmp_path, collator=collator) == []
    assert remarks(tmp_path, collator=collator, changes={"bf16": True}) == []
    assert remarks(tmp_path, rho=Schedule(1.0, 0.5), warmup_steps=1) == []
    assert remarks(tmp_path, history="ema", warmup_steps=1, changes={"per_device_train_batch_size": 8}) == []


@pytest.mark.parametrize("collator", [collate, flatten])
def test_no_prompt(tmp_path, collator):
    (text,) = remarks(tmp_path, relabelled(lambda ids: 0), collator=collator, gamma=0.3)
    assert "4 of the first 4 examples have no prompt" in text
    assert "assistant_only_loss=True" in text
    assert remarks(tmp_path, relabelled(lambda ids: 0), gamma=1) == []


def test_responses_of_one_token(tmp_path):
    examples = relabelled(lambda ids: len(ids) - 1)
    assert "4 of the first 4 responses have one token" in remarks(tmp_path, examples)[0]
    assert remarks(tmp_path, examples, scope="batch") == []


def test_everything_is_kept(tmp_path):
    (text,) = remarks(tmp_path, rho=0.999)
    assert "rho=0.999 keeps every token of the first 4 responses" in text
    (text,) = remarks(tmp_path, rho=1.0)
    assert "rho is 1" in text


def test_a_warm_up_that_lasts_for_all_of_training(tmp_path):
    (text,) = remarks(tmp_path, warmup_steps=3)
    assert "warmup_steps is 3, and training has 3 steps: nothing is selected" in text


def test_no_response(tmp_path):
    (text,) = remarks(tmp_path, relabelled(len))
    assert "no token of the first batches is a response token" in text


@pytest.mark.parametrize("history", ["ema", "snapshot"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_history_at_rest(tmp_path, history, bf16):
    (text,) = remarks(tmp_path, history=history, changes={"bf16": bf16})
    assert f"history '{history}' equals the current model" in text
    assert "warmup_steps" in text


@pytest.mark.parametrize("bf16", [False, True])
def test_an_adapter_that_does_nothing_yet(tmp_path, bf16):
    torch.manual_seed(0)
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    (text,) = remarks(tmp_path, model=model, history="base", changes={"bf16": bf16})
    assert "history 'base' equals the current model" in text
    # The first step moves it.
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert remarks(tmp_path, model=model, history="base", warmup_steps=1) == []


def test_a_column_of_another_model(tmp_path):
    examples = make_scored_examples()
    for example in examples:  # the losses of other tokens
        losses = np.array(example["history_loss"])
        given = np.flatnonzero(~np.isnan(losses))
        losses[given] = losses[given[::-1]]
        example["history_loss"] = losses.tolist()
    (text,) = remarks(tmp_path, examples)
    assert "look like those of another model" in text


def scored_by(model):
    examples = make_examples()
    for example in examples:
        response = np.array(example["labels"]) != -100
        example["history_loss"] = np.where(response, losses_of(model, example["input_ids"]), np.nan).tolist()
    return examples


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_a_column_of_another_checkpoint(tmp_path, bf16, warmup_steps):
    given = {"changes": {"bf16": bf16}, "warmup_steps": warmup_steps}
    (text,) = all_remarks(tmp_path, **given)
    assert OTHER_START in text
    expected = np.concatenate(
        [
            np.abs(np.array(theirs["history_loss"]) - np.array(ours["history_loss"]))
            for theirs, ours in zip(make_scored_examples(), scored_by(make_model()), strict=True)
        ]
    )
    differ = float(text.split("differ by ")[1].split()[0])
    assert differ == pytest.approx(np.nanmean(expected), rel=0.3)  # over a batch, not all examples
    texts = all_remarks(tmp_path, scored_by(make_model()), **given)
    assert len(texts) == (0 if warmup_steps else 1)
    assert not any(OTHER_START in text for text in texts)


def test_dropout_is_not_taken_for_another_checkpoint(tmp_path):
    model = make_model()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(0.3))
    assert all_remarks(tmp_path, scored_by(make_model()), model=model) == []
    assert all_remarks(tmp_path, scored_by(make_model()), changes={"neftune_noise_alpha": 1.0}) == []


def test_half_precision_that_the_device_has_not(tmp_path):
    given = {"data_collator": collate, "train_dataset": make_scored_examples(8)}
    with pytest.warns(UserWarning, match=r"fp16=True does nothing on this device \(cpu\)"):
        trainer = SelfModulatedTrainer(make_model(), arguments(tmp_path, fp16=True), **given)
    trainer.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "in-loop selection")
        SelfModulatedTrainer(make_model(), arguments(tmp_path, bf16=True), **given)


def test_tokens_of_another_tokenizer(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight *= 20  # sure of what is wrong
    texts = remarks(tmp_path, model=model)
    assert any("more than guessing among" in text for text in texts)


def test_a_trainer_speaks_once(tmp_path):
    trainer = SelfModulatedTrainer(
        make_model(),
        arguments(tmp_path),
        data_collator=collate,
        train_dataset=make_scored_examples(),
        selection=SelfModulation(history="ema"),
    )
    for number in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        assert sum("in-loop selection" in str(w.message) for w in caught) == number
