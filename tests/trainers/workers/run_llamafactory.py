"""LLaMA-Factory: `llamafactory-cli train` on the export's own configuration."""

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType

import yaml
from recording import Recording, arguments, rows, save

export, model, out = arguments()
os.chdir(export)
os.environ["DISABLE_VERSION_CHECK"] = "1"
# LLaMA-Factory imports it for audio alone, and there is none for this torch without CUDA.
sys.modules["torchaudio"] = ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)

from datasets import load_from_disk  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402

config = yaml.safe_load((export / "llamafactory.yaml").read_text())
config |= {
    "model_name_or_path": str(model),
    "output_dir": str(out / "trained"),
    "use_cpu": True,
    "plot_loss": False,
}
with Recording().of_transformers() as plain:
    run_exp(config)
loaded = load_from_disk(config["tokenized_path"])
save(out, version=version("llamafactory"), loaded=rows(loaded), plain=plain.report())
