"""A run that goes on from a checkpoint keeps the tokens that an uninterrupted one keeps."""

import pytest
import torch

from sstoken import SelfModulatedTrainer, SelfModulation, SstokenError
from tests.sstoken.in_loop.small import Watcher, arguments, collate, make_model, make_scored_examples
from tests.sstoken.in_loop.test_histories import adapted
from tests.support import slow_but

STEPS, SAVED = 4, 2
SAVE = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "per_device_train_batch_size": 2}


def train(folder, selection, resume=None):
    watcher = Watcher()
    trainer = SelfModulatedTrainer(
        adapted() if selection.history == "base" else make_model(),
        arguments(folder, **SAVE, gradient_accumulation_steps=2),
        data_collator=collate,
        train_dataset=make_scored_examples(16),
        selection=selection,
        observers=[watcher],
    )
    trainer.train(resume_from_checkpoint=resume)
    return watcher, trainer


SELECTIONS = [
    SelfModulation(rho=0.4),
    SelfModulation(rho=0.4, history="base"),
    SelfModulation(method="t3s"),
    SelfModulation(method="eaft"),
    SelfModulation(method="prift-prob", history="base"),
]


@pytest.mark.parametrize(
    "selection", slow_but(SELECTIONS[:2], SELECTIONS), ids=lambda s: f"{s.method}-{s.history}"
)
def test_resumed_is_uninterrupted(tmp_path, selection):
    whole, trainer = train(tmp_path, selection)
    rest, resumed = train(tmp_path, selection, resume=str(tmp_path / f"checkpoint-{SAVED}"))
    assert {o.step for o in rest.seen} == set(range(SAVED, STEPS))
    expected = {key: mask for key, mask in whole.masks().items() if key[0] >= SAVED}
    assert rest.masks() == expected
    for (name, a), b in zip(trainer.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("history", ["ema", "snapshot"])
def test_histories_that_are_weights_are_not_in_a_checkpoint(tmp_path, history):
    train(tmp_path, SelfModulation(history=history))
    with pytest.raises(SstokenError, match=f"history {history!r} cannot go on from step {SAVED}"):
        train(tmp_path, SelfModulation(history=history), resume=str(tmp_path / f"checkpoint-{SAVED}"))
