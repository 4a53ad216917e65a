"""The vLLM backend against the transformers backend: the same sequences, signals compared, tokens/s as a ratio.

Both are asked for both signals through the interface that `score` uses, in turns in one run, after a first call of each
that loads and warms up. On a CPU: a random Llama in fp32. On a GPU: Llama shapes of 1 and 8 billion parameters in bf16;
vLLM's attention backend is then whichever it chooses, and the run fails where the self-check of the capture does.

    python benchmarks/backends.py --quick
    python benchmarks/backends.py --json

Runs in an environment that has vLLM (`make test-vllm` makes one in .venv-vllm); elsewhere it says so and ends.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from benchmarks.rounds import ROUNDS

VOCABULARY = 32_000
SHAPES: dict[str, dict[str, int]] = {
    "6x256": {
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 688,
    },
    "1b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192,
    },
    "8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336,
    },
}  # fmt: skip


def main() -> None:
    """Parse the options; compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: the smallest model, few sequences"
    )
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    options = parser.parse_args()
    from sstoken.stages.backends.vllm_limits import installed_version

    if installed_version() is None:
        print(
            "vLLM is not installed here: nothing to compare (make test-vllm makes .venv-vllm, which has it)"
        )
        if options.json:
            print(json.dumps({}))
        return
    import torch

    on_gpu = torch.cuda.is_available()
    models = ["1b", "8b"] if on_gpu else ["6x256"]
    figures = {
        model: compare(model, quick=options.quick, on_gpu=on_gpu)
        for model in models[: 1 if options.quick else None]
    }
    if options.json:
        print(json.dumps(figures))


def compare(model: str, *, quick: bool, on_gpu: bool) -> dict[str, Any]:
    """Time both backends in turns; the largest difference of each signal, and the ratio of their rates."""
    from sstoken.stages.backends import BackendOptions, make_backend

    rounds, count = ROUNDS, 16 if quick else 256
    if on_gpu:
        count *= 8
    sequences, masks = make_sequences(count)
    tokens = sum(s.size for s in sequences)
    with tempfile.TemporaryDirectory() as work:
        checkpoint = save_model(Path(work), model, "bfloat16" if on_gpu else "float32")
        memory = {"vllm": (("gpu_memory_utilization", 0.5),), "hf": ()}  # both hold the model at once
        backends = {
            name: make_backend(
                name,
                BackendOptions(
                    checkpoint, ("loss", "attention"), -1, "auto", "cuda" if on_gpu else "cpu", 8192, False, settings,
                    log_folder=Path(work),
                ),
            )
            for name, settings in memory.items()
        }  # fmt: skip
        signals = {name: dict(backend.measure(sequences, masks)) for name, backend in backends.items()}
        seconds: dict[str, list[float]] = {name: [] for name in backends}
        for _ in range(rounds):
            for name, backend in backends.items():
                start = time.perf_counter()
                list(backend.measure(sequences, masks))
                seconds[name].append(time.perf_counter() - start)
    rates = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    facts = {
        "loss_difference": largest(signals, "loss"),
        "attention_difference": largest(signals, "attention"),
        **{f"{name}_tokens_per_second": round(rate, 1) for name, rate in rates.items()},
        "ratio_to_hf": round(rates["vllm"] / rates["hf"], 3),
    }
    print(f"{model}  " + "  ".join(f"{key} {value:,.3g}" for key, value in facts.items()), flush=True)
    return facts


def largest(signals: dict[str, Any], name: str) -> float:
    """The largest difference of a signal between the two backends."""
    differences = [np.abs(signals["vllm"][i][name] - signals["hf"][i][name]).max() for i in signals["hf"]]
    return float(max(differences))


def make_sequences(count: int) -> tuple[list["np.ndarray[Any, Any]"], list["np.ndarray[Any, Any]"]]:
    """Random tokens in sequences as long as instructions and answers are."""
    random = np.random.default_rng(0)
    prompts, responses = random.gamma(4, [[20, 30]], (count, 2)).clip(8, 400).astype(int).T
    sequences = [
        random.integers(3, VOCABULARY, p + r).astype(np.int32)
        for p, r in zip(prompts, responses, strict=True)
    ]
    return sequences, [np.arange(s.size) >= p for s, p in zip(sequences, prompts, strict=True)]


def save_model(folder: Path, model: str, dtype: str) -> str:
    """A random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[model], num_key_value_heads=8, vocab_size=VOCABULARY, max_position_embeddings=4096,
        dtype=dtype, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder / "model")
    return str(folder / "model")


if __name__ == "__main__":
    main()
