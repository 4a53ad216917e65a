"""Scoring on a GPU: the transformers backend with `cuda_kernels` against a plain script, random weights in bf16.

Both signals. Llama shapes of 1 and 8 billion parameters with a vocabulary of 128 thousand; sequences of up to 2,048
and 8,192 tokens, half of each a response. The plain script pads batches of 8 in the order of the data (fewer where
memory ends) and takes all logits; its attention is recomputed for the last layer. MFU counts the arithmetic that no
way of computing both signals does without, over the GPU's peak; the share of the limit is over the rate of a large
product measured in the same run.

    python benchmarks/scoring_gpu.py --quick
    python benchmarks/scoring_gpu.py --json

Without a GPU it says so and ends; `--device cpu --model tiny` goes through all of it on a CPU.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

MODELS = {
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "intermediate_size": 8192,
    },
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 14336,
    },
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 128},
}
VOCABULARY = {"tiny": 2000}
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16, as the makers state it."""
PARTS = {
    "prompt attention": ("mass_of_block",),
    "loss": ("fold_row",),
    "attention": ("flash", "fmha", "attention", "attn", "flex"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "aten::mm", "aten::addmm", "aten::bmm", "cublas"),
}
"""A kernel belongs to the first part that has a piece of its name."""


def main() -> None:
    """Parse the options; compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: 1b, 2,048 tokens, few sequences"
    )
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens of a batch")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing to measure")
        return
    models = [options.model] if options.model else ["1b"] if options.quick else ["1b", "8b"]
    lengths = (96,) if options.model == "tiny" else (2048,) if options.quick else (2048, 8192)
    figures: dict[str, Any] = {"device": device_name(options.device)}
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder), model, options.device)
            for length in lengths:
                total = 8 * length if options.quick or options.model == "tiny" else 1 << 19
                facts = compare(Path(folder), options.device, length, total, options.batch_tokens)
                figures[f"{model} {length}"] = facts
                print(f"{model}, up to {length} tokens")
                for name, value in facts.items():
                    print(f"  {name}: {value}", flush=True)
    if options.json:
        print(json.dumps(figures))


def make_model(folder: Path, name: str, device: str) -> None:
    """A random Llama in bf16, as a checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = MODELS[name]
    config = LlamaConfig(
        **shape, vocab_size=VOCABULARY.get(name, 128_256), num_key_value_heads=8, max_position_embeddings=8192,
        tie_word_embeddings=name == "1b", dtype="bfloat16",
    )  # fmt: skip
    with torch.device(device):
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def compare(folder: Path, device: str, length: int, total: int, batch_tokens: int) -> dict[str, Any]:
    """Both sides on the same sequences, one after the other, each after a warm-up."""
    from benchmarks.rounds import middle
    from benchmarks.scoring_parts.speed import needed_flops

    random = np.random.default_rng(0)
    lengths = random.integers(length // 2, length + 1, max(2, round(total / (0.75 * length))))
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    sequences = [random.integers(0, vocabulary, n).astype(np.int32) for n in lengths]
    masks = [np.arange(n) >= n // 2 for n in lengths]

    ours = middle(lambda: measure_ours(folder, sequences, masks, device, batch_tokens))
    few = slice(0, 16)  # the plain script is slow; its rate does not depend on how many there are
    theirs = middle(lambda: measure_plain(folder, sequences[few], masks[few], device))
    needed = needed_flops(folder, lengths, int(sum(mask.sum() for mask in masks)))
    needed_per_second = needed / float(lengths.sum()) * ours["tokens_per_second"]
    peak_flops = next((rate for name, rate in PEAK_FLOPS.items() if name in device_name(device)), None)
    return ours | {
        "mfu": round(needed_per_second / peak_flops, 3) if peak_flops else None,
        "share_of_limit": round(needed_per_second / matmul_rate(device), 3),
        "ratio_to_plain": round(ours["tokens_per_second"] / theirs["tokens_per_second"], 2),
        "plain": theirs,
    }


def measure_ours(
    folder: Path, sequences: list[Any], masks: list[Any], device: str, batch_tokens: int
) -> dict[str, Any]:
    """The transformers backend."""
    from sstoken.stages.backends import BackendOptions, base_models, hf

    backend = hf.HFBackend(
        BackendOptions(
            checkpoint=str(folder), signals=("loss", "attention"), layer=-1, dtype="bfloat16", device=device,
            batch_tokens=batch_tokens, trust_remote_code=False, settings=(("cuda_kernels", True),),
        )
    )  # fmt: skip

    def run(some: slice) -> None:
        for _ in backend.measure(sequences[some], masks[some]):
            pass

    facts = rate_and_peak(run, sequences, device) | {"parts": share_by_part(lambda: run(slice(0, 8)), device)}
    base_models.shared_base.held.clear()  # the other side needs the memory
    return facts


def measure_plain(folder: Path, sequences: list[Any], masks: list[Any], device: str) -> dict[str, Any]:
    """The plain script, and what the model's shape would let the backend use here."""
    from transformers import AutoModelForCausalLM

    from sstoken.measure.cuda.packed import check_packed, describe_packed

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", attn_implementation="sdpa")
    model.to(device).eval()
    batch = fitting_batch(lambda size: plain(model, sequences[:size], masks[:size], device, size))
    facts = rate_and_peak(
        lambda some: plain(model, sequences[some], masks[some], device, batch), sequences, device
    )
    kinds = sorted({choice.name for choice in describe_packed(model)})
    return facts | {"batch": batch, "varlen": kinds, "packed": check_packed(model) or "yes"}


def device_name(device: str) -> str:
    """The maker's name of the GPU."""
    import torch

    return str(torch.cuda.get_device_name()) if device == "cuda" else device


def rate_and_peak(run: Callable[[slice], None], sequences: list[Any], device: str) -> dict[str, Any]:
    """Tokens per second, median of three whole runs after a short one; GPU memory beyond the weights, in GB."""
    import torch

    run(slice(0, 8))
    before = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run(slice(None))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rate = sum(len(ids) for ids in sequences) / statistics.median(seconds)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if device == "cuda" else None
    return {"tokens_per_second": round(rate, 1), "peak_gb": peak if peak is None else round(peak, 2)}


def share_by_part(run: Callable[[], None], device: str) -> dict[str, float]:
    """Where the time of a run goes: shares of the wall clock by kind of kernel, and the share without any."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as trace:
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    shares = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in trace.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if on_gpu and event.key.startswith("aten::"):
            continue  # the operator is charged with its kernels, which are listed too
        part = next(
            (p for p, pieces in PARTS.items() if any(x in event.key.lower() for x in pieces)), "other"
        )
        shares[part] += micros / 1e6 / wall
    shares["idle"] = max(0.0, 1.0 - sum(shares.values()))
    return {part: round(share, 3) for part, share in shares.items()}


def plain(model: Any, sequences: list[Any], masks: list[Any], device: str, batch_size: int) -> None:
    """What one writes first: padded batches in the order of the data, all logits, everything kept."""
    import torch

    from benchmarks.scoring_parts.sides import last_layer_weights

    kept: list[Any] = []
    with torch.no_grad(), torch.device(device):
        for first in range(0, len(sequences), batch_size):
            batch = [torch.from_numpy(ids).long() for ids in sequences[first : first + batch_size]]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
            lengths = torch.tensor([len(row) for row in batch])
            seen = torch.arange(ids.shape[1]) < lengths[:, None]
            out = model(input_ids=ids, attention_mask=seen.long(), output_hidden_states=True)
            losses = -out.logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            weights = last_layer_weights(model, out.hidden_states[-2], ids.shape[1])
            for i, mask in enumerate(masks[first : first + batch_size]):
                prompt = torch.from_numpy(~mask).to(device, weights.dtype)
                prompt_attention = (weights[i, :, : len(mask), : len(mask)].mean(0) * prompt).sum(-1)
                kept.append((losses[i, : len(mask) - 1].cpu(), prompt_attention.float().cpu()))


def fitting_batch(run: Callable[[int], None], largest: int = 8) -> int:
    """The largest batch, of 8 or half as many and so on, that does not run out of memory."""
    import torch

    size = largest
    while size > 1:
        try:
            run(size)
            return size
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            size //= 2
    return size


def matmul_rate(device: str) -> float:
    """FLOP/s of a large bf16 product on this device now: the best of several."""
    import torch

    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        c = a @ b
        c[0, 0].item()  # waits for the product
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
