"""TRL: the export's own script, plain and packed."""

import runpy
import sys

import trl
from recording import Recording, arguments, rows, save

export, model, out = arguments()
SETTINGS = "--use_cpu True --bf16 False --report_to none --save_strategy no --per_device_train_batch_size 4"


def train(*settings):
    """Run train.py in this process."""
    sys.argv = ["train.py", str(model), "--output_dir", str(out / "trained"), *SETTINGS.split(), *settings]
    with Recording().of_transformers() as recording:
        done = runpy.run_path(str(export / "train.py"), run_name="__main__")
    return recording, done


plain, done = train("--num_train_epochs", "1")
packed, _ = train("--num_train_epochs", "3", "--packing", "True", "--max_length", "128")
save(
    out,
    version=trl.__version__,
    loaded=rows(done["trainer"].train_dataset),
    plain=plain.report(),
    packed=packed.report(epochs=3),
)
