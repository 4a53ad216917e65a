"""Every method's decisions by one process or, under torchrun, several: each process writes its own and the weights."""

import argparse
import os
from pathlib import Path

import torch
from datasets import Dataset

from sstoken import SelfModulatedTrainer, SelfModulation
from tests.sstoken.in_loop.small import Watcher, arguments, collate, make_examples, make_model
from tests.sstoken.in_loop.test_every_method import runs, with_columns
from tests.support import end_process


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--accumulate", type=int, required=True)
    options = parser.parse_args()
    decided, weights = {}, {}
    for method in runs("scores"):
        selection, watcher, model = SelfModulation(method=method, history="scores"), Watcher(), make_model()
        trainer = SelfModulatedTrainer(
            model,
            arguments(
                options.out / method,
                max_steps=2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=options.accumulate,
                optim="sgd",
                learning_rate=0.1,
                max_grad_norm=0,
                **({"ddp_backend": "gloo"} if "RANK" in os.environ else {}),
            ),
            data_collator=collate,
            train_dataset=Dataset.from_list(with_columns(make_examples(16), selection.columns)),
            selection=selection,
            observers=[watcher],
        )
        trainer.train()
        for o in watcher.seen:
            weight = None if o.weight is None else o.weight[o.response_mask].tolist()
            decided[method, o.step, o.input_ids.tobytes()] = o.keep_mask.tolist(), weight
        weights[method] = {name: value.detach().clone() for name, value in model.state_dict().items()}
    rank = int(os.environ.get("RANK", "0"))
    torch.save({"decided": decided, "weights": weights}, options.out / f"rank-{rank}.pt")


if __name__ == "__main__":
    main()
    end_process()
