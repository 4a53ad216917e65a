"""Train in the loop: at each step, tokens are selected with the model as it is then.

Run after `sstoken-curate demo`, on what it made: python configs/in_loop.py --max-steps 100
Data and a model of your own: python configs/in_loop.py --data mine.jsonl --model Qwen/Qwen3-0.6B
The history is the base model, scored once; what training saw comes back as scores for the mask of a next epoch.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from sstoken import Schedule, SelfModulatedTrainer, SelfModulation, curate
from sstoken.stages.training.observed_losses import ObservedLosses
from sstoken.stages.training.score_column import with_history

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="runs/demo/data.jsonl")
parser.add_argument("--model", default="runs/demo/base")
parser.add_argument("--out", type=Path, default=Path("runs/in-loop-epoch"))
parser.add_argument("--max-steps", type=int, default=-1, help="default: one epoch")
options = parser.parse_args()
tokens, scores = options.out / "tokens", options.out / "scores"

curate.encode(data=options.data, model=options.model, out=tokens)
curate.score(tokens=tokens, checkpoints=[f"base={options.model}"], out=scores, attention_from="none")

tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
trainer = SelfModulatedTrainer(
    model=AutoModelForCausalLM.from_pretrained(options.model),
    args=TrainingArguments(
        str(options.out / "trained"),
        num_train_epochs=1,
        max_steps=options.max_steps,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        logging_steps=10,
        report_to="none",
    ),
    train_dataset=with_history(tokens, scores / "base"),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    # Until the model has moved away from its history, REL is rounding error: the first steps train on all.
    selection=SelfModulation(rho=Schedule(1.0, 0.6), gamma=0.5, warmup_steps=5),
    observers=[ObservedLosses(options.out / "observed")],
)
trainer.train()
trainer.save_model()

if options.max_steps < 0:  # every example was seen
    curate.observed(recorded=options.out / "observed", tokens=tokens, out=scores / "epoch-1")
    print(curate.select(tokens=tokens, scores=scores, out=options.out / "masked").metrics)
