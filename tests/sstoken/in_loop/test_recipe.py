"""The plain-PyTorch recipe of docs/in-loop.md runs as printed, and trains as the trainer does."""

import json

import pytest
import torch
from torch.utils.data import SequentialSampler

from sstoken import SelfModulatedTrainer, SelfModulation
from tests.sstoken.in_loop.recipe import DOCUMENT, programs, trainer_of_the_first
from tests.sstoken.in_loop.small import (
    Watcher,
    arguments,
    collate,
    make_examples,
    make_model,
    save_tokenizer,
)


class InOrder(SelfModulatedTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def test_the_recipe_is_short_and_trains_as_the_trainer_does(tmp_path):
    own = DOCUMENT.partition("## In a loop of your own")[2]
    setup, loop = programs(own)
    assert len(loop.strip().splitlines()) < 15
    examples, model = make_examples(12), make_model()
    given = {
        "dataset": examples,
        "collator": collate,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5),
    }
    exec(setup + loop, given)
    trainer = InOrder(
        make_model(),
        arguments(tmp_path, optim="sgd", learning_rate=0.5, max_grad_norm=0),
        data_collator=collate,
        train_dataset=examples,
        selection=SelfModulation(rho=0.6, gamma=0.5),
    )
    trainer.train()
    moved = 0.0
    for (name, p), q, start in zip(
        model.named_parameters(), trainer.model.parameters(), make_model().parameters(), strict=True
    ):
        torch.testing.assert_close(p.detach(), q.detach(), atol=1e-5, rtol=0, msg=name)
        moved = max(moved, float((p - start).detach().abs().max()))
    assert moved > 0.05


def test_the_first_program_trains_in_trls_defaults(tmp_path):
    """On a small model; tests/stages/test_in_loop_smollm2.py runs it on the one that it names."""
    assert len(programs()[0].strip().splitlines()) < 17
    make_model().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    rows = [{"prompt": f"w{i} w7 w{i + 1}", "completion": f" w{i + 3} w9 w2 w{i}"} for i in range(1, 60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    watcher = Watcher()
    trainer = trainer_of_the_first(
        tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out", watcher, 4, 2, learning_rate=1e-2
    )
    trainer.train()
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    for seen in watcher.seen:
        assert seen.response_mask.sum() == 5  # and the end
        assert seen.keep_mask.sum() == (5 if seen.step < 2 else 3)


def test_every_name_is_there():
    import sstoken

    for name in sstoken.__all__:
        assert getattr(sstoken, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        sstoken.Nothing  # noqa: B018
