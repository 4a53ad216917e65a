"""Scoring speed and memory: the `score` stage, disk to disk, against a plain script.

Both sides give both signals (loss of every response token, attention importance of the last layer), in turns in
one run, on one thread. The plain script does what one writes first: batches of 8 in the order of the data, padded,
all logits, everything kept in memory; its attention comes from eager attention of all layers (`eager`), or from
sdpa and a recomputation of the last layer's weights (`one-layer`).

The limit is the time that the arithmetic needed takes at the rate of this machine's matrix product, measured in
the same run: every real token through the layers once, causal attention, the output embedding for response tokens.

    python benchmarks/scoring.py --quick
    python benchmarks/scoring.py --json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SHARED = Path(__file__).parent.parent.parent / "shared"
VOCABULARY = 32_000
MODELS = {"6x256": (6, 256, 8), "8x512": (8, 512, 8)}
"""Layers, hidden size, heads."""
PLAIN_BATCH = 8


def main() -> None:
    """Parse the options; compare, or measure one side for `compare`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: one model, few examples")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure_side(options.side, options.work)))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(Path(folder), quick=options.quick)
    if options.json:
        print(json.dumps(figures))


def compare(work: Path, *, quick: bool) -> dict[str, Any]:
    """Time every side in turns, then read the memory of the two main ones as the data grows."""
    figures: dict[str, Any] = {}
    rounds, rows = (1, 32) if quick else (3, 320)
    for model in list(MODELS)[: 1 if quick else None]:
        for lengths in ("short",) if quick else ("short", "long"):
            place = work / f"{model}-{lengths}"
            make_inputs(place, model, rows if lengths == "short" else rows // 8, lengths, copies=1)
            seconds: dict[str, list[float]] = {"sstoken": [], "eager": [], "one-layer": []}
            shares: list[float] = []
            for _ in range(rounds):
                for side, times in seconds.items():
                    done = run_side(side, place)
                    times.append(done["seconds"])
                    if side == "sstoken":
                        shares.append(done["limit_seconds"] / done["seconds"])
            median = {side: statistics.median(times) for side, times in seconds.items()}
            facts = {
                "tokens_per_second": done["tokens"] / median["sstoken"],
                "share_of_limit": statistics.median(shares),
                **{f"ratio_to_{side}": median[side] / median["sstoken"] for side in ("eager", "one-layer")},
            }
            figures[f"{model} {lengths}"] = {key: round(value, 3) for key, value in facts.items()}
            print(f"{model} {lengths:5}  " + "  ".join(f"{k} {v:,.2f}" for k, v in facts.items()), flush=True)
    memory: dict[str, dict[str, float]] = {}
    for copies in (1, 4) if quick else (1, 4, 16):
        place = work / f"memory-{copies}"
        make_inputs(place, "6x256", 16 if quick else 160, "short", copies=copies)
        for side in ("sstoken",) if quick else ("sstoken", "eager"):
            memory.setdefault(side, {})[f"{copies}x"] = run_side(side, place)["peak_mb"]
        peaks = ", ".join(f"{side} {peak[f'{copies}x']:,.0f} MB" for side, peak in memory.items())
        print(f"peak memory at {copies:2}x data: {peaks}", flush=True)
    return figures | {"peak_mb": memory}


def run_side(side: str, work: Path) -> dict[str, Any]:
    """One side in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--side", side, "--work", str(work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the side {side!r} failed")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_side(side: str, work: Path) -> dict[str, Any]:
    """Time one side. Loading libraries and the model is left out on both sides; the first batch is not."""
    import resource

    import torch

    torch.set_num_threads(1)
    tokens, model = work / "tokens", work / "model"
    if side == "sstoken":
        seconds = time_stage(tokens, model, work / f"scores-{time.time_ns()}")
    else:
        seconds = time_plain(tokens, model, side)
    masks = read_rows(tokens, ["response_mask"])
    lengths = np.array([len(row["response_mask"]) for row in masks])
    responses = sum(sum(row["response_mask"]) for row in masks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": seconds,
        "tokens": int(lengths.sum()),
        "limit_seconds": needed_flops(model, lengths, responses) / matmul_rate(),
        "peak_mb": peak,
    }


def time_stage(tokens: Path, model: Path, out: Path) -> float:
    """The real stage, through the function that the command calls."""
    from pipeline import api
    from stages.backends import BackendOptions, hf

    options = BackendOptions(str(model), True, -1, "float32", "cpu", 2048, False)
    hf.HFBackend(options)  # loads the model, which the stage then finds in memory
    start = time.perf_counter()
    api.score(tokens=tokens, checkpoints=[str(model)], out=out, device="cpu")
    return time.perf_counter() - start


def time_plain(tokens: Path, folder: Path, attention: str) -> float:
    """The plain script."""
    import torch
    from transformers import AutoModelForCausalLM

    implementation = "eager" if attention == "eager" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()
    start = time.perf_counter()
    rows = read_rows(tokens)
    kept: list[Any] = []
    with torch.no_grad():
        for first in range(0, len(rows), PLAIN_BATCH):
            batch = rows[first : first + PLAIN_BATCH]
            longest = max(len(row["input_ids"]) for row in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros(len(batch), longest, dtype=torch.long)
            for i, row in enumerate(batch):
                ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
                mask[i, : len(row["input_ids"])] = 1
            if attention == "eager":
                out = model(input_ids=ids, attention_mask=mask, output_attentions=True)
                weights = out.attentions[-1]
            else:
                out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
                weights = last_layer_weights(model, out.hidden_states[-2], longest)
            log_p = out.logits[:, :-1].float().log_softmax(-1)
            losses = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
            for i, row in enumerate(batch):
                response = torch.tensor(row["response_mask"])
                n = len(row["response_mask"])
                prompt = (~response).float()
                importance = (weights[i, :, :n, :n].mean(0) * prompt).sum(-1)
                kept.append((losses[i, : n - 1].tolist(), importance.tolist()))
    return time.perf_counter() - start


def last_layer_weights(model: Any, hidden: Any, length: int) -> Any:
    """The last layer's attention weights [B, H, T, T], computed again from its input."""
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    layer = model.model.layers[-1]
    attention, states = layer.self_attn, layer.input_layernorm(hidden)
    shape = (*states.shape[:-1], -1, attention.head_dim)
    query = attention.q_proj(states).view(shape).transpose(1, 2)
    key = attention.k_proj(states).view(shape).transpose(1, 2)
    cos, sin = model.model.rotary_emb(states, torch.arange(length)[None])
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    scores = query @ repeat_kv(key, attention.num_key_value_groups).transpose(2, 3) * attention.scaling
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


def read_rows(tokens: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """All rows of a tokens folder."""
    parts = sorted(tokens.glob("*.parquet"))
    return pa.concat_tables([pq.read_table(part, columns=columns) for part in parts]).to_pylist()


def needed_flops(folder: Path, lengths: "np.ndarray[Any, Any]", responses: int) -> float:
    """Multiplications and additions that no way of computing both signals does without."""
    config = json.loads((folder / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    attention = layers * 2 * hidden * float((lengths.astype(float) ** 2).sum())  # half of 4 T^2 D: causal
    return 2.0 * weights * float(lengths.sum()) + attention + 2.0 * hidden * config["vocab_size"] * responses


def matmul_rate() -> float:
    """FLOP/s of a large fp32 product on this machine now: the best of several."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best


def make_inputs(work: Path, model: str, rows: int, lengths: str, copies: int) -> None:
    """A random Llama and a finished tokens folder whose lengths are those of real data."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, heads = MODELS[model]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(work / "model")
    examples = list(real_examples(rows, lengths)) * copies
    write_tokens(work / "tokens", examples)


def real_examples(rows: int, lengths: str) -> list[tuple[int, int]]:
    """Prompt and response lengths: of GSM8K where it is at hand, else like them; `long` joins them to 2k-4k."""
    random = np.random.default_rng(0)
    data = SHARED / "data" / "gsm8k" / "train.jsonl"
    if data.is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "base")
        lines = [
            json.loads(line)
            for line in data.read_text().splitlines()[: rows * (1 if lengths == "short" else 16)]
        ]
        pairs = [
            (len(tokenizer(row["question"])["input_ids"]) + 8, len(tokenizer(row["answer"])["input_ids"]) + 1)
            for row in lines
        ]
    else:
        count = rows * (1 if lengths == "short" else 16)
        pairs = [(int(p), int(r)) for p, r in random.gamma(4, [[20, 30]], (count, 2)).clip(8, 400)]
    if lengths == "short":
        return pairs
    joined, at = [], 0
    for _ in range(rows):
        target, prompt, response = int(random.integers(2000, 4000)), 0, 0
        while prompt + response < target:
            prompt, response = prompt + pairs[at % len(pairs)][0], response + pairs[at % len(pairs)][1]
            at += 1
        joined.append((min(prompt, 2000), min(response, 2000)))
    return joined


def write_tokens(folder: Path, examples: list[tuple[int, int]]) -> None:
    """A folder as `encode` leaves it."""
    from pipeline.manifest import Manifest, list_files, write_manifest
    from stages import tables

    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for part, first in enumerate(range(0, len(examples), 1000)):
        shard = examples[first : first + 1000]
        table = pa.table(
            [
                [f"{first + i}" for i in range(len(shard))],
                [random.integers(0, VOCABULARY, p + r) for p, r in shard],
                [np.arange(p + r) >= p for p, r in shard],
            ],
            schema=tables.TOKENS,
        )
        facts = {"kind": "tokens", "tokenizer": {"fingerprint": "none", "name": "none"}, "stats": {}}
        tables.write_part(folder / tables.part_name(part), table, facts)
    manifest = Manifest(
        stage="encode", fingerprint="benchmark", settings={}, seed=0, inputs={}, sources={}, version="0",
        seconds=0, metrics={}, files=list_files(folder),
    )  # fmt: skip
    write_manifest(folder, manifest)


if __name__ == "__main__":
    main()
