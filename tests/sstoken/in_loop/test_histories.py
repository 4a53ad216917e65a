"""History losses of every source are those of the weights that they speak of."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from sstoken import SelfModulatedTrainer, SelfModulation
from sstoken.in_loop.rule import Rule
from tests.sstoken.in_loop.small import (
    Watcher,
    arguments,
    collate,
    dumping,
    make_examples,
    make_model,
    recompute,
)

STEPS = 6


def adapted(**settings):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    return get_peft_model(make_model(), config)


@pytest.fixture
def histories(monkeypatch):
    """The history losses [N] that each step selected with."""
    seen = []
    decide = Rule.decide

    def recording(self, signals, *args, **kwargs):
        seen.append(signals.get("history.loss"))
        return decide(self, signals, *args, **kwargs)

    monkeypatch.setattr(Rule, "decide", recording)
    return seen


def train(folder, model, selection, **changes):
    watcher = Watcher()
    examples = [{k: e[k] for k in ("input_ids", "labels")} for e in make_examples(8)]
    trainer = dumping(watcher, SelfModulatedTrainer)(
        model,
        arguments(folder, max_steps=STEPS, **changes),
        data_collator=collate,
        train_dataset=examples,
        selection=selection,
        observers=[watcher],
    )
    trainer.train()
    return trainer, watcher


def losses_under(model, seen):
    """Return the losses of each response token, example by example."""
    found = []
    with torch.no_grad():
        for o in seen:
            log_probs = model(torch.from_numpy(o.input_ids)[None]).logits[0].log_softmax(-1)
            found += [-log_probs[i - 1, o.input_ids[i]] for i in np.flatnonzero(o.response_mask)]
    return torch.stack(found)


def with_weights(state, model=None):
    model = make_model() if model is None else model
    model.load_state_dict(state)
    return model.eval()


def check(watcher, histories, model_at):
    """`model_at(step)` is the model whose losses step `step` should have been compared with."""
    assert len(histories) == STEPS
    for step, history in enumerate(histories):
        seen = [o for o in watcher.seen if o.step == step]
        torch.testing.assert_close(history, losses_under(model_at(step), seen), atol=1e-5, rtol=1e-5)


def test_the_base_under_an_adapter(tmp_path, histories):
    trainer, watcher = train(tmp_path, adapted(lora_dropout=0.3), SelfModulation(history="base"))
    base = make_model().eval()
    check(watcher, histories, lambda step: base)
    moved = [n for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in n]
    assert all(not torch.equal(watcher.weights[0][n], watcher.weights[STEPS - 1][n]) for n in moved)


@pytest.mark.parametrize("offload", [False, True])
def test_an_earlier_snapshot(tmp_path, histories, offload):
    selection = SelfModulation(history="snapshot", history_every=2, offload_history=offload)
    trainer, watcher = train(tmp_path, make_model(), selection)
    check(watcher, histories, lambda step: with_weights(watcher.weights[step - step % 2]))
    assert not torch.equal(watcher.weights[0]["lm_head.weight"], watcher.weights[2]["lm_head.weight"])


@pytest.mark.parametrize("offload", [False, True])
def test_a_moving_average(tmp_path, histories, offload):
    selection = SelfModulation(history="ema", history_every=2, history_decay=0.7, offload_history=offload)
    _, watcher = train(tmp_path, make_model(), selection)

    def average(step):
        state = copy.deepcopy(watcher.weights[0])
        for at in range(2, step + 1, 2):
            state = {k: 0.7 * state[k] + 0.3 * watcher.weights[at][k] for k in state}
        return with_weights(state)

    check(watcher, histories, average)


def test_a_moving_average_of_an_adapter_keeps_the_adapter_alone(tmp_path, histories):
    selection = SelfModulation(history="ema", history_decay=0.5)
    trainer, watcher = train(tmp_path, adapted(), selection)
    kept = trainer._history._kept
    assert sum(k.numel() for k in kept) < 0.1 * sum(p.numel() for p in trainer.model.parameters())

    def average(step):
        state = dict(watcher.weights[0])
        for at in range(1, step + 1):
            state = {k: 0.5 * state[k] + 0.5 * watcher.weights[at][k] for k in state}
        return with_weights(state, adapted())

    check(watcher, histories, average)


@pytest.mark.parametrize("history", ["base", "ema", "snapshot"])
def test_a_forward_pass_of_the_history_leaves_training_as_it_was(tmp_path, history):
    """Where everything is kept, weights move as without it: dropout, gradients and weights are untouched."""
    selections = [
        SelfModulation(rho=0.999999, history=history),  # of fewer than a million tokens, all
        SelfModulation(rho=1.0, gamma=0.0),
    ]
    trained = []
    for selection in selections:
        trainer, _ = train(tmp_path, adapted(lora_dropout=0.3), selection, seed=5)
        trained.append(dict(trainer.model.named_parameters()))
    for name, parameter in trained[0].items():
        torch.testing.assert_close(parameter, trained[1][name], atol=1e-6, rtol=0)


def test_history_from_scores_with_lora(tmp_path):
    watcher, examples = Watcher(), make_examples(8)
    dumping(watcher, SelfModulatedTrainer)(
        adapted(),
        arguments(tmp_path, max_steps=STEPS),
        data_collator=collate,
        train_dataset=examples,
        selection=SelfModulation(rho=0.4, gamma=0.6),
        observers=[watcher],
    ).train()
    by_ids = {np.array(e["input_ids"]).tobytes(): e for e in examples}
    model = adapted()
    for (step, ids), mask in watcher.masks().items():
        model.load_state_dict(watcher.weights[step])
        merged = copy.deepcopy(model).merge_and_unload()
        assert mask == recompute(merged, merged.state_dict(), by_ids[ids], 0.4, 0.6)
