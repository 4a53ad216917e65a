"""Train offline along the trajectory: each phase on the tokens that the model learned in that phase of an anchor run.

Run after `sstoken-curate demo`, on what it made: python configs/phases.py
Data and a model of your own: python configs/phases.py --data mine.jsonl --model Qwen/Qwen3-0.6B
The anchor run leaves K + 1 snapshots; phase k selects by the losses of snapshots k - 1 and k.
"""

import argparse
from pathlib import Path

import torch
from trl import SFTConfig, SFTTrainer

from sstoken import curate
from sstoken.stages.training.phases import load_phases

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="runs/demo/data.jsonl")
parser.add_argument("--model", default="runs/demo/base")
parser.add_argument("--out", type=Path, default=Path("runs/trajectory"))
parser.add_argument("--phases", type=int, default=3)
parser.add_argument("--steps-per-phase", type=int, default=10)
options = parser.parse_args()
tokens, scores = options.out / "tokens", options.out / "scores"
steps = [number * options.steps_per_phase for number in range(options.phases + 1)]

curate.encode(data=options.data, model=options.model, out=tokens)
curate.anchor(
    tokens=tokens,
    model=options.model,
    out=options.out / "history",
    max_steps=steps[-1],
    snapshot_every=options.steps_per_phase,
)
snapshots = [
    f"step-0={options.model}",
    *(str(options.out / "history" / f"step-{step}") for step in steps[1:]),
]
curate.score(tokens=tokens, checkpoints=snapshots, signals=["loss", "attention"], out=scores)
curate.phases(tokens=tokens, scores=scores, out=options.out / "phases", rho=0.6, gamma=0.5)

# Phase after phase, with a column `phase`; of each as many examples as the anchor run saw in it.
dataset = load_phases(options.out / "phases", seed=0, examples=options.steps_per_phase * 8)
trainer = SFTTrainer(
    model=options.model,
    args=SFTConfig(
        str(options.out / "trained"),
        train_sampling_strategy="sequential",  # in the order of the phases, with one optimizer and schedule
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        max_length=None,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        report_to="none",
    ),
    train_dataset=dataset.select_columns(["input_ids", "labels", "phase"]),
)
trainer.train()
trainer.save_model()
