"""Train on a masked dataset with ssToken's settings, and merge the adapter for `evaluate.sh`.

On eight GPUs: torchrun --nproc-per-node 8 configs/paper/train.py --masked runs/paper/X/masked --model ID
Here, on what `sstoken-curate demo` made: python configs/paper/train.py --masked runs/masked --model runs/demo/base
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--masked", type=Path, required=True, help="a masked folder")
parser.add_argument("--model", required=True)
parser.add_argument("--out", type=Path, help="default: `trained` beside the masked folder")
parser.add_argument("--max-steps", type=int, default=-1, help="default: one epoch")
parser.add_argument("--seed", type=int, default=42)
options = parser.parse_args()
out = options.out or options.masked.parent / "trained"
gpu = torch.cuda.is_available()

tokenizer = AutoTokenizer.from_pretrained(options.masked / "tokenizer")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if gpu else torch.float32)
model.enable_input_require_grads()
lora = LoraConfig(r=64, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
trainer = Trainer(
    model=get_peft_model(model, lora),
    args=TrainingArguments(
        str(out / "checkpoints"),
        num_train_epochs=1,
        max_steps=options.max_steps,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-4,
        lr_scheduler_type="linear",
        warmup_steps=0.03,  # below 1: a share of the steps
        bf16=gpu,
        seed=options.seed,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=load_dataset("parquet", data_files=str(options.masked / "part-*.parquet"), split="train"),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
)
trainer.train()
if trainer.is_world_process_zero():
    trainer.model.merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)
