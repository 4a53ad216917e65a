"""What a second worker is worth in `score`, and what handing out a shard costs.

`score` runs with one process and with two, one thread each, in turns; processes are warm. Then 10,000 shards without
work are handed out: wall and CPU time of the driver for each, and how its memory grows after the first thousand.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for the workers
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.rounds import ROUNDS, middle
from sstoken.pipeline import api
from sstoken.pipeline.engines import make_engine
from sstoken.stages.stage import EngineOptions, Progress, Task, Worker
from tests.factories import save_tokenizer

VOCABULARY = 8192


def save_inputs(folder: Path, shards: int, rows: int) -> tuple[Path, Path]:
    """A random Llama of 6 layers x 256, and shards of examples of about 200 tokens."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=512, **shape))
    model.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    draw = np.random.default_rng(0)
    with open(folder / "data.jsonl", "w") as file:
        for _ in range(shards * rows):
            words = [
                " ".join(f"w{w}" for w in draw.integers(1, 50, size)) for size in draw.integers(40, 160, 2)
            ]
            file.write(json.dumps(dict(zip(("question", "answer"), words, strict=True))) + "\n")
    tokens = api.encode(
        data=str(folder / "data.jsonl"),
        model=str(folder / "model"),
        out=folder / "tokens",
        shard_rows=rows,
        workers=1,
    )
    return tokens.folder, folder / "model"


def cpu_seconds() -> float:
    """CPU time of this process and of its workers."""
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def speedup(shards: int, rows: int, rounds: int) -> dict[str, float]:
    """Seconds of each, the best of the rounds, and their ratio; and the ratio of their CPU times.

    On a machine that does something else, the latter says whether the second worker costs anything.
    """
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokens, model = save_inputs(folder, shards, rows)
        small, _ = save_inputs(folder / "small", 4, 2)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        used: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for workers, taken in seconds.items():
                given = {"checkpoints": [f"m={model}"], "workers": workers, "device": "cpu", "force": True}
                api.score(**given, tokens=small, out=folder / "warm")  # processes start, and load the model
                start, cpu = time.perf_counter(), cpu_seconds()
                api.score(**given, tokens=tokens, out=folder / "scores")
                taken.append(time.perf_counter() - start)
                used[workers].append(cpu_seconds() - cpu)
    one, two = min(seconds[1]), min(seconds[2])
    return {
        "one_worker_s": round(one, 2),
        "two_workers_s": round(two, 2),
        "score_speedup": round(one / two, 2),
        "score_cpu_ratio": round(min(used[1]) / min(used[2]), 2),
    }


def nothing(work: int, worker: Worker) -> None:
    """An empty shard."""


def overhead(engine: str, shards: int) -> dict[str, float]:
    """What handing out an empty shard costs the driver."""
    options = EngineOptions(engine=engine, workers=2)
    for _ in make_engine(options).map(nothing, tasks(200), Progress()):
        pass  # processes start
    process, start = psutil.Process(), time.perf_counter()
    before, first = process.cpu_times().user, 0.0
    for done, _ in enumerate(make_engine(options).map(nothing, tasks(shards), Progress()), 1):
        if done == shards // 10:
            first = process.memory_info().rss
    return {
        f"{engine}_ms_per_shard": round(1e3 * (time.perf_counter() - start) / shards, 2),
        f"{engine}_driver_cpu_ms_per_shard": round(1e3 * (process.cpu_times().user - before) / shards, 2),
        f"{engine}_driver_grows_mb": round((process.memory_info().rss - first) / 1e6, 1),
    }


def tasks(count: int) -> Iterator[Task[int]]:
    """Empty shards, made as they are handed out."""
    return (Task(Path(f"part-{index:05d}.parquet"), 1, index) for index in range(count))


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    parser.add_argument("--parts", nargs="+", choices=("score", "overhead"), default=("score", "overhead"))
    parser.add_argument("--engine", default="local", help="of the empty shards: local or ray")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    given = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "score": lambda: speedup(4, 10, ROUNDS) if given.quick else speedup(24, 20, ROUNDS),
        "overhead": lambda: middle(lambda: overhead(given.engine, 1000 if given.quick else 10_000)),
    }
    found: dict[str, float] = {}
    for part in given.parts:
        found |= parts[part]()
    for name, value in found.items():
        print(f"{name}: {value}")
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
