"""`sstoken-curate demo --model M`: the same noisy data, scored by a pretrained model without training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sstoken import curate
from sstoken.pipeline.demo.data import DemoExample, write_jsonl, write_noise
from sstoken.pipeline.job import Result
from sstoken.stages.processor import multiplies_bfloat16

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_LOCAL = Path(".models") / "smollm2"
"""The folder to which `make smollm2` downloads it."""
NUM_EXAMPLES = 80
"""Takes minutes on two cores with a model of 135 M parameters."""
METHODS = ("recommended", "random", "full")


def place_of(model: str) -> str:
    """Return a model's folder or Hub id; `smollm2` stands for SmolLM2-135M-Instruct, the local copy if there is one."""
    if model != "smollm2":
        return model
    return str(_LOCAL) if (_LOCAL / "config.json").is_file() else SMOLLM2


def run_pretrained(
    out: Path, model: str, examples: Sequence[DemoExample], seed: int, rho: float, say: Callable[[str], None]
) -> dict[str, Result]:
    """Encode the examples, score them under `model`, and return each method's selection."""
    write_jsonl(out / "data.jsonl", examples)
    write_noise(out / "noise.jsonl", examples)
    say(f"encode: {len(examples):,} examples, with noise planted in their answers")
    tokens = curate.encode(data=str(out / "data.jsonl"), model=model, out=out / "tokens").folder
    say(f"score: their tokens under {model}, with and without their prompts; no training")
    scores = curate.score(
        tokens=tokens,
        checkpoints=[f"base={model}"],
        out=out / "scores",
        attention_from="none",
        signals=("loss", "loss_unconditional"),
        dtype=_dtype(),
    ).folder
    say(f"select: {', '.join(METHODS)}")
    choice: dict[str, Any] = {"rho": rho, "scope": "sample", "seed": seed}
    return {
        method: curate.select(
            tokens=tokens,
            scores=scores,
            out=out / f"masked-{method}",
            method=method,
            **({} if method == "full" else choice),
        )
        for method in METHODS
    }


def _dtype() -> str:
    """bfloat16 if this machine is fast with it."""
    import torch

    return "bfloat16" if torch.accelerator.is_available() or multiplies_bfloat16() else "float32"
