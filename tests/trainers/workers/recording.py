"""What reaches a model in training, whatever trainer calls it. Imported by the workers; knows nothing of us."""

import itertools
import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

IGNORED = -100


class Recording:
    """What one training run did: each call of the model, each step's loss, and whether the weights moved."""

    def __init__(self):
        self.calls, self.losses, self._sums = [], [], []

    batch: dict | None = None
    """What the trainer's step got; it may take the labels away before it calls the model."""

    @contextmanager
    def of_transformers(self):
        """From the Llama of transformers, however it is wrapped, and the steps of its Trainer."""
        from transformers import LlamaForCausalLM, Trainer

        make, step, recording = LlamaForCausalLM.__init__, Trainer.training_step, self

        def init(model, *args, **kwargs):
            make(model, *args, **kwargs)
            model.register_forward_pre_hook(
                lambda module, _, inputs: recording.call(inputs), with_kwargs=True
            )

        def training_step(trainer, model, inputs, *args, **kwargs):
            recording.batch = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
            recording.weights(model)
            loss = step(trainer, model, inputs, *args, **kwargs)
            recording.losses.append(float(loss))
            return loss

        LlamaForCausalLM.__init__, Trainer.training_step = init, training_step
        yield self
        LlamaForCausalLM.__init__, Trainer.training_step = make, step

    def call(self, inputs):
        """One call of the model in a step."""
        if self.batch is None:  # not in training: a probe
            return
        tensors = {k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)}
        tensors.setdefault("labels", self.batch.get("labels"))
        missing = tensors["input_ids"].shape[1] - tensors["labels"].shape[1]
        if missing:  # ms-swift asks for no logits before the first label
            tensors["labels"] = torch.nn.functional.pad(tensors["labels"], (missing, 0), value=IGNORED)
        self.calls.append(tensors)

    def weights(self, model):
        """Remember where the weights are."""
        self._sums.append(sum(p.detach().double().abs().sum().item() for p in model.parameters()))

    def report(self, **more):
        """JSON-ready: the examples in each call, the losses, whether the weights moved in between."""
        return {
            "steps": [list(examples(call)) for call in self.calls],
            "losses": [loss if math.isfinite(loss) else None for loss in self.losses],
            "moved": len(set(self._sums)) > 1,
            **more,
        }


def examples(call):
    """The examples in a call as (ids, labels), out of their packs and padding."""
    for row, ids in enumerate(call["input_ids"]):
        labels = call["labels"][row]
        mask = call.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None or mask.dim() != 2 else mask[row]
        position = call.get("position_ids")
        position = (
            torch.arange(len(ids)) if position is None else position[(position.shape[0] > 1 and row) or 0]
        )
        assert (labels[mask == 0] == IGNORED).all(), "padding has labels"
        starts = (position == 0) | (mask != mask.roll(1))
        starts[0] = True
        edges = [*starts.nonzero().flatten().tolist(), len(ids)]
        for a, b in itertools.pairwise(edges):
            if mask[a] != 0:
                assert position[a:b].tolist() == list(range(b - a)), "positions do not start anew"
                yield ids[a:b].tolist(), labels[a:b].tolist()


def rows(dataset):
    """(ids, labels) of what a loader gave, unpadded."""
    return [(list(map(int, row["input_ids"])), list(map(int, row["labels"]))) for row in dataset]


def arguments():
    """The worker's: the export, the model, a folder to work in."""
    return (Path(argument) for argument in sys.argv[1:4])


def save(folder, **report):
    """Where the test looks for it."""
    (folder / "report.json").write_text(json.dumps(report))
