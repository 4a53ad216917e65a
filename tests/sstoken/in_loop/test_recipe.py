"""The plain-PyTorch recipe of docs/in-loop.md runs as printed, and trains as the trainer does."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import SequentialSampler

from sstoken import SelfModulatedTrainer, SelfModulation
from tests.sstoken.in_loop.small import arguments, collate, make_examples, make_model

DOCUMENT = (Path(__file__).parents[3] / "docs" / "in-loop.md").read_text()


class InOrder(SelfModulatedTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def test_the_recipe_is_short_and_trains_as_the_trainer_does(tmp_path):
    own = DOCUMENT.partition("## In a loop of your own")[2]
    setup, loop = re.findall(r"```python\n(.*?)```", own, flags=re.DOTALL)
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


def test_the_other_programs_of_the_document_run():
    first = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)[0]
    names = {}
    exec(first, names)
    assert {"SelfModulatedSFTTrainer", "SelfModulatedTrainer", "SelfModulation"} <= names.keys()


def test_every_name_is_there():
    import sstoken

    for name in sstoken.__all__:
        assert getattr(sstoken, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        sstoken.Nothing  # noqa: B018
