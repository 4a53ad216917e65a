"""transformers' Trainer."""

from sstoken.stages.exporting.base import ParquetTarget

SCRIPT = '''"""python train.py MODEL [any setting of TrainingArguments, such as --num_train_epochs 1]"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

folder = Path(__file__).resolve().parent
model, *settings = sys.argv[1:]
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--output_dir", "trained", *settings])
tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(model),
    args=args,
    train_dataset=load_dataset("parquet", data_files=f"{folder}/data/*.parquet", split="train"),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
)
trainer.train()
trainer.save_model()
'''


class Transformers(ParquetTarget):
    """`input_ids, labels`; the collator makes the attention mask."""

    name = "transformers"
    program = ("train.py", SCRIPT)
    training = """```bash
python train.py MODEL --output_dir ../trained
```

In a script of your own, the collator is `DataCollatorForSeq2Seq`, or
`DataCollatorWithFlattening` (packs a batch; for models with FlashAttention). `DataCollatorForLanguageModeling`
overwrites these labels: it silently trains on every token.
"""
