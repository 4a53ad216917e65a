"""Unsloth, which trains through TRL's SFTTrainer."""

from pathlib import Path

from sstoken.stages.exporting.base import Changes, Facts
from sstoken.stages.exporting.trl import TRL

SCRIPT = '''"""python train.py MODEL [any setting of SFTConfig, such as --num_train_epochs 1]"""

import sys
from pathlib import Path

from unsloth import FastLanguageModel  # first: it changes the libraries below

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

folder = Path(__file__).resolve().parent
name, *settings = sys.argv[1:]
settings = ["--output_dir", "trained", "--max_length", "$longest", *settings]
(args,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses(settings)
model, tokenizer = FastLanguageModel.from_pretrained(name, max_seq_length=$longest)
trainer = SFTTrainer(
    model=FastLanguageModel.get_peft_model(model),
    args=args,
    train_dataset=load_dataset("parquet", data_files=f"{folder}/data/*.parquet", split="train"),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
'''


class Unsloth(TRL):
    """The columns of `trl`: Unsloth patches its trainer, and supports TRL before and after 1.7."""

    name = "unsloth"
    program = ("train.py", SCRIPT)
    training = """```bash
python train.py MODEL --output_dir ../trained
```

It needs a GPU. In a script of your own:

- `max_length` and `max_seq_length` have to be at least $longest, the longest row.
- No `train_on_responses_only`, and no `DataCollatorForLanguageModeling`: both overwrite the labels.
- Keep the column `assistant_masks`: with TRL up to 1.6, packing drops `labels` and this carries the mask.
"""

    def settings(self, facts: Facts, out: Path) -> Changes | None:
        """None: Unsloth is used from a script."""
        return None
