"""A run that goes on from a checkpoint keeps the tokens that an uninterrupted one keeps."""

import json
import warnings

import pytest
import torch

from sstoken import SelfModulatedTrainer, SelfModulation, SstokenError
from sstoken.in_loop.settings import Schedule
from tests.sstoken.in_loop.small import Watcher, arguments, collate, make_model, make_scored_examples
from tests.sstoken.in_loop.test_histories import adapted
from tests.support import slow_but

STEPS, SAVED = 4, 2
SAVE = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "per_device_train_batch_size": 2}


def train(folder, selection, resume=None, **changes):
    watcher = Watcher()
    trainer = SelfModulatedTrainer(
        adapted() if selection.history == "base" else make_model(),
        arguments(folder, **SAVE | changes, gradient_accumulation_steps=2),
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


def said(folder, selection, saved=SAVED, **changes):
    """What a run that goes on says of settings that differ from those of its checkpoint."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(folder, selection, resume=str(folder / f"checkpoint-{saved}"), **changes)
    return [text for w in caught if "goes on" in (text := str(w.message))]


RISING = SelfModulation(rho=Schedule(0.2, 0.8))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (SelfModulation(rho=0.4), SelfModulation(rho=0.8), "rho was 0.4 and is 0.8"),
        (SelfModulation(gamma=1.0), SelfModulation(gamma=0.5), "gamma was 1.0 and is 0.5"),
        (
            SelfModulation(rho=0.4),
            SelfModulation(method="loss", scope="batch", denominator="response", warmup_steps=1),
            "method was 'sstoken' and is 'loss'; rho was 0.4 and is 0.6; scope was 'sample' and is 'batch'; "
            "denominator was 'kept' and is 'response'; warmup_steps was 0 and is 1",
        ),
        (SelfModulation(), SelfModulation(layer=0), "layer was 'last' and is 0"),
        (SelfModulation(history="ema"), SelfModulation(), "history was 'ema' and is 'scores'"),
        (RISING, SelfModulation(rho=0.8), "rho was \"Schedule(start=0.2, end=0.8, shape='linear')\" and is 0.8"),
        (SelfModulation(), SelfModulation(rho=0.6, params={"gamma": 0.5}), None),
        (RISING, SelfModulation(rho=Schedule(0.2, 0.8)), None),
    ],
)  # fmt: skip
def test_other_settings_than_the_checkpoint_was_made_with(tmp_path, before, after, expected):
    train(tmp_path, before)
    found = said(tmp_path, after)
    if expected is None:
        assert found == []
    else:
        (text,) = found
        assert f"goes on from step {SAVED} with other settings than before: {expected}; ignore" in text


def test_a_schedule_is_stretched_by_other_steps(tmp_path):
    train(tmp_path, RISING)
    assert "num_steps was 4 and is 6" in said(tmp_path, RISING, max_steps=6)[0]
    train(tmp_path / "constant", SelfModulation())
    assert said(tmp_path / "constant", SelfModulation(), max_steps=6) == []


def test_settings_are_compared_with_those_of_the_last_run(tmp_path):
    """Also if the trainer restores its callbacks from the checkpoint."""
    restoring = {"max_steps": 6, "restore_callback_states_from_checkpoint": True}
    train(tmp_path, SelfModulation(rho=0.4))
    other = SelfModulation(rho=0.8)
    assert "rho was 0.4 and is 0.8" in said(tmp_path, other, **restoring)[0]
    assert said(tmp_path, other, saved=4, **restoring) == []
    assert "rho was 0.8 and is 0.4" in said(tmp_path, SelfModulation(rho=0.4), saved=4, **restoring)[0]


def test_a_checkpoint_without_a_record_of_the_settings(tmp_path):
    train(tmp_path, SelfModulation())
    path = tmp_path / f"checkpoint-{SAVED}" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"].pop("SelectionRecord")["selection"]["rho"] == 0.6
    path.write_text(json.dumps(state))
    assert said(tmp_path, SelfModulation(rho=0.4)) == []
    assert "rho was 0.4 and is 0.6" in said(tmp_path, SelfModulation(), saved=4, max_steps=6)[0]


def test_a_trainer_that_starts_again_does_not_go_on(tmp_path):
    _, trainer = train(tmp_path, RISING)
    trainer.args.max_steps = 6
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*goes on")
        trainer.train()
