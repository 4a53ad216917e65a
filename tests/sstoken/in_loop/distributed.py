"""A training run for one process or, under torchrun, several: writes each process's masks, logs and weights."""

import argparse
import os
from pathlib import Path

import torch
from datasets import Dataset

from sstoken import SelfModulatedTrainer, SelfModulation
from tests.sstoken.in_loop.small import Watcher, arguments, collate, make_examples, make_model
from tests.support import end_process


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--history", default="scores")
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    model = make_model()
    if options.history == "base":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    if options.precision == "bfloat16 weights":
        model = model.to(torch.bfloat16)
    watcher = Watcher()
    trainer = SelfModulatedTrainer(
        model,
        arguments(
            options.out,
            max_steps=4,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0,
            bf16=options.precision == "bfloat16 autocast",
            **({"ddp_backend": "gloo"} if "RANK" in os.environ else {}),
        ),
        data_collator=collate,
        train_dataset=Dataset.from_list(make_examples(32)),
        selection=SelfModulation(rho=0.4, history=options.history),
        observers=[watcher],
    )
    trainer.train()
    rank = trainer.args.process_index
    torch.save(
        {"masks": watcher.masks(), "logs": trainer.state.log_history, "weights": model.state_dict()},
        options.out / f"rank-{rank}.pt",
    )


if __name__ == "__main__":
    main()
    end_process()
