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
@pytest.mark.parametrize(
    "collator",
    [collate, collate_left, flatten, DataCollatorWithFlattening()],
    ids=["right", "left", "flat", "transformers-flat"],
)
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
        params = selection.rule(step, 8).params
        rho, gamma = getattr(params, "rho", 1.0), getattr(params, "gamma", 0.5)  # the warm-up has neither
        assert mask == recompute(make_model(), watcher.weights[step], by_ids[ids], rho, gamma)
        kept_at.setdefault(step, []).append(np.sum(mask) / np.sum(np.array(by_ids[ids]["labels"]) != -100))
    assert np.mean(kept_at[0]) == 1  # warm-up
    assert np.mean(kept_at[1]) > 0.9 > 0.5 > np.mean(kept_at[7])


def test_gradient_accumulation_changes_nothing(tmp_path):
    """The learning rate is one of SGD: weights show gradients as they are."""
    trained = [
        weights(
            train(
                tmp_path,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                optim="sgd",
                learning_rate=1.0,
                max_grad_norm=0,
            )
        )
        for size in (8, 4, 2, 1)
    ]
    for other in trained[1:]:
        assert_same(trained[0], other)
    start = dict(make_model().named_parameters())
    moved = max(float((trained[0][name] - p.detach()).abs().max()) for name, p in start.items())
    assert moved > 0.05


def test_the_gradient_is_that_of_the_mean_over_all_kept_tokens(tmp_path):
    """One step, against plain PyTorch on the kept tokens of eight examples alone."""
    watcher, examples = Watcher(), make_examples(8)
    trainer = train(
        tmp_path,
        examples=examples,
        observers=[watcher],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0,
    )
    model = make_model()
    losses = []
    for seen in watcher.seen:
        logits = model(torch.from_numpy(seen.input_ids)[None]).logits[0]
        log_probs = logits[:-1].log_softmax(-1)
        losses += [-log_probs[i - 1, seen.input_ids[i]] for i in np.flatnonzero(seen.keep_mask)]
    torch.stack(losses).mean().backward()
    expected = {name: p.detach() - p.grad for name, p in model.named_parameters()}
    assert_same(weights(trainer), expected)
    logged, expected_loss = trainer.state.log_history[0]["loss"], torch.stack(losses).mean().detach()
    assert logged == pytest.approx(float(expected_loss), abs=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "sstoken"])
def test_padded_left_or_right_and_packed_are_the_same(tmp_path, implementation):
    results = []
    for collator in (collate, collate_left, flatten):
        watcher = Watcher()
        trainer = train(
            tmp_path, model=make_model(implementation), collator=collator, observers=[watcher], optim="sgd"
        )
        results.append((weights(trainer), watcher.masks()))
    for trained, masks in results[1:]:
        assert_same(results[0][0], trained)
        assert masks == results[0][1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_and_measures_once(tmp_path, monkeypatch, reentrant):
    from sstoken.measure.capture import AttentionCapture

    measured = []
    measure = AttentionCapture.measure

    def counting(self, *args, **kwargs):
        measured.append(1)
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(AttentionCapture, "measure", counting)
    plain, checkpointed = Watcher(), Watcher()
    without = weights(train(tmp_path, observers=[plain]))
    assert len(measured) == 1 + 3  # the trial at the start, then once a step
    settings = {"use_reentrant": reentrant}
    trainer = train(
        tmp_path,
        observers=[checkpointed],
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=settings,
    )
    assert len(measured) == 2 * (1 + 3)
    assert_same(without, weights(trainer))
    assert plain.masks() == checkpointed.masks()


def test_rho_of_one_is_plain_training(tmp_path):
    from transformers import Trainer

    examples = make_examples()
    ours = train(tmp_path, examples=examples, selection=SelfModulation(rho=1.0))
    plain = Trainer(make_model(), arguments(tmp_path), data_collator=collate, train_dataset=examples)
    plain.train()
    assert_same(weights(ours), weights(plain))
    for mine, theirs in zip(ours.state.log_history, plain.state.log_history, strict=True):
        if "loss" in theirs:
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=5e-6)


def test_a_batch_with_nothing_to_keep_trains_nothing(tmp_path):
    examples = make_examples(4)
    for example in examples:
        example["labels"] = [-100] * len(example["labels"])
    trainer = train(tmp_path, examples=examples, optim="sgd")
    assert_same(weights(trainer), dict(make_model().named_parameters()), atol=0)
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [0.0] * 3


def test_evaluation_and_prediction_use_the_ordinary_loss(tmp_path):
    from transformers import Trainer

    examples = make_examples()
    trainer = train(tmp_path, examples=examples, selection=SelfModulation(rho=0.2))
    plain = Trainer(trainer.model, arguments(tmp_path), data_collator=collate)
    expected = plain.evaluate(examples)["eval_loss"]
    assert trainer.evaluate(Dataset.from_list(examples))["eval_loss"] == pytest.approx(expected, abs=1e-6)
    predicted = trainer.predict(Dataset.from_list(examples[:4]))
    np.testing.assert_allclose(predicted.predictions, plain.predict(examples[:4]).predictions, atol=1e-6)
    assert predicted.metrics["test_loss"] == pytest.approx(
        plain.predict(examples[:4]).metrics["test_loss"], abs=1e-6
    )
    assert not any(key.startswith("selection/") for key in trainer.evaluate(examples))


def test_metrics_are_logged(tmp_path):
    watcher, examples = Watcher(), make_examples(8)
    trainer = train(
        tmp_path, examples=examples, observers=[watcher], max_steps=4, selection=SelfModulation(rho=0.4)
    )
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    history = {np.array(e["input_ids"]).tobytes(): np.array(e["history_loss"]) for e in examples}
    for step, log in enumerate(logs):
        seen = [o for o in watcher.seen if o.step == step]
        keep = np.concatenate([o.keep_mask for o in seen])
        drop = np.concatenate([o.response_mask & ~o.keep_mask for o in seen])
        rel = np.concatenate([history[o.input_ids.tobytes()] - o.loss for o in seen])
        attention = np.concatenate([o.attention for o in seen])
        assert log["selection/kept_share"] == pytest.approx(keep.sum() / (keep.sum() + drop.sum()))
        assert log["selection/rel_kept"] == pytest.approx(rel[keep].mean(), abs=1e-5)
        assert log["selection/rel_dropped"] == pytest.approx(rel[drop].mean(), abs=1e-5)
        assert log["selection/attention_kept"] == pytest.approx(attention[keep].mean(), abs=1e-5)
        assert log["selection/attention_dropped"] == pytest.approx(attention[drop].mean(), abs=1e-5)
        assert log["selection/seconds"] > 0
    # Eight examples in batches of four: the second epoch begins at step 2, and is looked back on at step 3.
    assert "selection/mask_overlap" not in logs[0]
    assert 0 < logs[3]["selection/mask_overlap"] <= 1


def test_scope_batch_keeps_a_share_of_all_examples_together(tmp_path):
    watcher = Watcher()
    selection = SelfModulation(rho=0.3, scope="batch")
    train(tmp_path, observers=[watcher], selection=selection)
    for step in range(3):
        seen = [o for o in watcher.seen if o.step == step]
        total = sum(o.response_mask.sum() for o in seen)
        assert sum(o.keep_mask.sum() for o in seen) == -(-3 * total // 10)
    shares = {o.keep_mask.sum() / o.response_mask.sum() for o in watcher.seen}
    assert len(shares) > 5


def test_an_attempt_that_runs_out_of_memory_leaves_nothing_behind(tmp_path):
    class Small(SelfModulatedTrainer):
        """Has memory for two examples, which shows after the forward pass."""

        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            if self._train_batch_size > 2:
                raise RuntimeError("CUDA out of memory.")
            return loss

    watcher, examples = Watcher(), make_examples()
    trainer = Small(
        make_model(),
        arguments(tmp_path, auto_find_batch_size=True, max_steps=2),
        data_collator=collate,
        train_dataset=examples,
        observers=[watcher],
    )
    trainer.train()
    assert [o.step for o in watcher.seen] == [0, 0, 1, 1]
    for log in trainer.state.log_history[:2]:
        seen = [o for o in watcher.seen if o.step == log["step"] - 1]
        share = sum(o.keep_mask.sum() for o in seen) / sum(o.response_mask.sum() for o in seen)
        assert log["selection/kept_share"] == pytest.approx(share)
