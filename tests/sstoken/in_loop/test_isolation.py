"""Sequences that change each other in a batch are spoken of; those that do not are not."""

import warnings

import pytest
import torch

from sstoken import SelfModulatedTrainer, SelfModulation
from tests.sstoken.in_loop.small import arguments, collate, collate_left, flatten, make_examples
from tests.sstoken.measure.tiny_architectures import make_tiny


def remarks(folder, kind, collator, model=None, **changes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SelfModulatedTrainer(
            make_tiny(kind) if model is None else model,
            arguments(folder, max_steps=2, **changes),
            data_collator=collator,
            train_dataset=make_examples(8),
            selection=SelfModulation(gamma=1.0 if kind == "bert" else 0.5),
        ).train()
    return [str(w.message) for w in caught if "other losses than alone" in str(w.message)]


@pytest.mark.parametrize(
    ("kind", "collator", "where"),
    [
        ("lfm2", flatten, "behind others in its row"),
        ("qwen3_5_text", flatten, "behind others in its row"),
        ("bert", flatten, "behind others in its row"),
        ("gpt2", collate_left, "padded with others"),
    ],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_sequences_that_change_each_other(tmp_path, kind, collator, where, bf16):
    (text,) = remarks(tmp_path, kind, collator, bf16=bf16)
    assert where in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("kind", "collator"),
    [("llama", flatten), ("llama", collate_left), ("gpt2", flatten), ("gpt2", collate), ("lfm2", collate)],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_sequences_that_leave_each_other_alone(tmp_path, kind, collator, bf16):
    assert remarks(tmp_path, kind, collator, bf16=bf16) == []  # gpt2 has dropout


def test_the_trial_leaves_training_as_it_was(tmp_path, monkeypatch):
    trained = []
    for tried in (True, False):
        if not tried:
            monkeypatch.setattr("sstoken.in_loop.selector.remarks_on_batch", lambda *_: iter(()))
        model = make_tiny("gpt2")
        remarks(tmp_path, "gpt2", collate, model, bf16=True)
        trained.append(model.state_dict())
    for name, weight in trained[0].items():
        assert torch.equal(weight, trained[1][name]), name
