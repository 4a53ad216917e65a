"""transformers: the export's own script with its collator, then the flattening one, which packs a batch."""

import runpy
import sys

import transformers
from recording import Recording, arguments, rows, save

export, model, out = arguments()
SETTINGS = (
    "--use_cpu True --report_to none --save_strategy no --per_device_train_batch_size 4 --num_train_epochs 1"
)


def train():
    """Run train.py in this process."""
    sys.argv = ["train.py", str(model), "--output_dir", str(out / "trained"), *SETTINGS.split()]
    with Recording().of_transformers() as recording:
        done = runpy.run_path(str(export / "train.py"), run_name="__main__")
    return recording, done


plain, done = train()
transformers.DataCollatorForSeq2Seq = lambda tokenizer: transformers.DataCollatorWithFlattening()
packed, _ = train()
save(
    out,
    version=transformers.__version__,
    loaded=rows(done["trainer"].train_dataset),
    plain=plain.report(),
    packed=packed.report(),
)
