"""Both sides in turns in one process: tokens per second, ratios, share of the machine's limit."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scoring_parts.inputs import make_inputs, read_rows, write_tokens
from benchmarks.scoring_parts.sides import PLAIN_BATCH, plain_model, plain_script, score_stage

PLAIN = ("eager", "one-layer")


def compare_speed(
    work: Path, model: str, lengths: str, rows: int, rounds: int, compiled: bool = False
) -> dict[str, float]:
    """Every side once a round, each after a warm-up on two rows that loads its model; medians over the rounds.

    With `compiled`, the stage with compiled layers is one more side, whose warm-up meets all shapes.
    """
    make_inputs(work, model, rows, lengths)
    write_tokens(work / "warm-up", [(8, 8), (12, 20)])
    folder = work / "model"
    models = {attention: plain_model(folder, attention) for attention in PLAIN}
    ours = ["sstoken", "compiled"] if compiled else ["sstoken"]
    sides: dict[str, Callable[[Path], Any]] = {
        **{
            side: lambda tokens, side=side: score_stage(tokens, folder, work, compiled=side == "compiled")
            for side in ours
        },
        **{
            side: lambda tokens, side=side: plain_script(tokens, models[side], side, PLAIN_BATCH[lengths])
            for side in PLAIN
        },
    }
    for side, run in sides.items():
        run(work / "warm-up")
        if side == "compiled":
            run(work / "tokens")
    num_tokens, flops = work_of(work / "tokens", folder)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    shares: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            took, share = timed(lambda run=run: run(work / "tokens"), flops)
            seconds[side].append(took)
            shares[side].append(share)
    median = {side: statistics.median(times) for side, times in seconds.items()}
    facts: dict[str, float] = {}
    for side in ours:
        prefix = "" if side == "sstoken" else f"{side}_"
        facts[f"{prefix}tokens_per_second"] = num_tokens / median[side]
        facts[f"{prefix}share_of_limit"] = statistics.median(shares[side])
        facts |= {f"{prefix}ratio_to_{plain}": median[plain] / median[side] for plain in PLAIN}
    facts |= {f"limit_to_{plain}": 1 / statistics.median(shares[plain]) for plain in PLAIN}
    return {name: round(float(value), 3) for name, value in facts.items()}


def timed(run: Callable[[], Any], flops: float) -> tuple[float, float]:
    """Seconds of a call, and its share of the machine's limit for so much arithmetic.

    The share is of CPU time: a shared machine takes its cores away for milliseconds.
    """
    with products_between_batches() as products:
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        took, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    products_took, products_cpu = np.array(products).sum(0)
    rate = 2 * 1024**3 * len(products) / products_cpu
    return took - products_took, flops / rate / (cpu - products_cpu)


@contextmanager
def products_between_batches(count: int = 2) -> Iterator[list[tuple[float, float]]]:
    """Within this context models multiply large fp32 matrices before each batch: seconds by the clock, and of CPU.

    A shared machine is half as fast in one second as in the next: its limit has to be measured in the same moments.
    """
    import torch
    from transformers import LlamaModel

    left, right, product = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)
    torch.mm(left, right, out=product)
    products: list[tuple[float, float]] = []
    forward = LlamaModel.forward

    @wraps(forward)
    def after_products(*args: Any, **kwargs: Any) -> Any:
        for _ in range(count):
            start, cpu_start = time.perf_counter(), time.process_time()
            torch.mm(left, right, out=product)
            products.append((time.perf_counter() - start, time.process_time() - cpu_start))
        return forward(*args, **kwargs)

    LlamaModel.forward = after_products  # type: ignore[method-assign]
    try:
        yield products
    finally:
        LlamaModel.forward = forward  # type: ignore[method-assign]


def work_of(tokens: Path, folder: Path) -> tuple[int, float]:
    """Tokens of a folder, and the arithmetic that they need."""
    masks = [row["response_mask"] for row in read_rows(tokens, ["response_mask"])]
    lengths = np.array([len(mask) for mask in masks])
    return int(lengths.sum()), needed_flops(folder, lengths, sum(sum(mask) for mask in masks))


def needed_flops(folder: Path, lengths: "np.ndarray[Any, Any]", responses: int) -> float:
    """Multiplications and additions that no way of computing both signals does without."""
    config = json.loads((folder / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    weights = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    attention = layers * 2 * hidden * float((lengths.astype(float) ** 2).sum())  # half of 4 T^2 D: causal
    return 2.0 * weights * float(lengths.sum()) + attention + 2.0 * hidden * config["vocab_size"] * responses
