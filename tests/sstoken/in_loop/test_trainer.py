"""In-loop training: the masks are those of an offline recomputation, the gradients those of one big batch."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening

from sstoken import SelfModulatedTrainer, SelfModulation
from sstoken.in_loop.settings import Schedule
from tests.sstoken.in_loop.small import (
    Watcher,
    arguments,
    collate,
    collate_left,
    dumping,
    flatten,
    make_examples,
    make_model,
    recompute,
)


def train(folder, *, model=None, collator=collate, selection=None, examples=None, observers=(), **changes):
    trainer = SelfModulatedTrainer(
        make_model() if model is None else model,
        arguments(folder, **changes),
        data_collator=collator,
        train_dataset=make_examples() if examples is None else examples,
        selection=selection or SelfModulation(rho=0.4),
        observers=observers,
    )
    trainer.train()
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(ours, theirs, atol=1e-5):
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("implementation", ["sdpa", "sstoken"])
@pytest.mark.parametrize("collator", [collate, collate_left, flatten, DataCollatorWithFlattening()], ids=str)
def test_masks_are_those_of_an_offline_recomputation(tmp_path, implementation, collator):
    watcher, model, examples = Watcher(), make_model(implementation), make_examples()
    selection = SelfModulation(rho=Schedule(0.9, 0.3), gamma=Schedule(0.2, 0.8, "cosine"), warmup_steps=1)
    trainer = dumping(watcher, SelfModulatedTrainer)(
        model,
        arguments(tmp_path, max_steps=8),
        data_collator=collator,
        train_dataset=Dataset.from_list(examples),
        selection=selection,
        observers=[watcher],
    )
    trainer.train()
    by_ids = {np.array(e["input_ids"]).tobytes(): e for e in examples}
    masks = watcher.masks()
    assert len(masks) == 8 * 4
    assert {step for step, _ in masks} == set(range(8))
    kept_at = {}
    for (step, ids), mask in masks.items():
        rho, gamma = selection.at(step, 8)
        assert mask == recompute(make_model(), watcher.weights[step], by_ids[ids], rho, gamma)
        kept_at.setdefault(step, []).append(np.sum(mask) / np.sum(np.array(by_ids[ids]["labels"]) != -100))
    assert np.mean(kept_at[0]) == 1  # warm-up
    assert np.mean(kept_at[1]) > 0.9 > 0.5 > np.mean(kept_at[7])
