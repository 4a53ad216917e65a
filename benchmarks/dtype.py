"""What bfloat16 and float16 weights do to the signals, to keep masks and to the speed, against float32.

Softmax and loss are computed in float32 whatever the weights are. Of two checkpoints on one tokens folder: the largest
and the mean difference of loss (of the current one), rel and attention, and the share of response tokens whose keep
mask differs, at rho 0.6, by the methods `sstoken` and `rel`. `float32, small batches` shows what differs without any
change of dtype. Speed is of both checkpoints together, dtypes in turns, medians, one thread; loading is left out.

    python benchmarks/dtype.py --quick
    python benchmarks/dtype.py --json
    python benchmarks/dtype.py --history runs/demo/base --current runs/demo/trained --tokens runs/tokens

Without arguments it takes the checkpoints and GSM8K of ../shared; where those are not at hand, it needs all three.
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

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from benchmarks.rounds import ROUNDS
from sstoken.pipeline.cli import set_up_libraries

SHARED = Path(__file__).parents[2] / "shared"
CASES = {
    "float32": ("float32", None),
    "float32, small batches": ("float32", 300),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
}
"""dtype and batch budget; the first is what the others are compared with."""
METHODS = {"sstoken": {"rho": 0.6, "gamma": 0.5}, "rel": {"rho": 0.6}}
Values = dict[str, "np.ndarray[Any, Any]"]
"""`history.loss`, `current.loss` and `current.attention` of all response tokens, [N] each."""


def main() -> None:
    """Parse the options; compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: 20 examples")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    parser.add_argument("--history", help="the earlier checkpoint")
    parser.add_argument("--current", help="the later checkpoint")
    parser.add_argument("--tokens", type=Path, help="a finished tokens folder")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    options = parser.parse_args()
    given = [options.history, options.current, options.tokens]
    if any(given) and not all(given):
        parser.error("give --history, --current and --tokens together")
    if not any(given) and not SHARED.is_dir():
        print("no checkpoints at hand: give --history, --current and --tokens")
        if options.json:
            print(json.dumps({}))
        return
    rows = 20 if options.quick else 120
    with tempfile.TemporaryDirectory() as folder:
        if not any(given):
            given = [str(SHARED / "models" / name) for name in ("base", "sft")]
            given.append(encode_gsm8k(Path(folder), rows))
        figures = compare(*given, rows=rows, rounds=ROUNDS, device=options.device)
    for case, facts in figures.items():
        print(f"{case:23}" + "  ".join(f"{name} {value:.2g}" for name, value in facts.items()))
    if options.json:
        print(json.dumps(figures))


def encode_gsm8k(work: Path, rows: int) -> Path:
    """The first problems of GSM8K as tokens."""
    from sstoken.pipeline import api

    lines = (SHARED / "data" / "gsm8k" / "train.jsonl").read_text().splitlines()[:rows]
    data = work / "data.jsonl"
    data.write_text("\n".join(lines))
    api.encode(data=str(data), model=str(SHARED / "models" / "base"), out=work / "tokens", max_length=512)
    return work / "tokens"


def compare(
    history: str, current: str, tokens: Path, *, rows: int, rounds: int, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """The figures of every case but the first, by its name."""
    from sstoken.stages import tables

    table = tables.read_table(tables.parts(tokens)[0]).slice(0, rows)
    sequences, masks = tables.rows(table["input_ids"]), tables.rows(table["response_mask"])
    offsets = np.cumsum([0, *(int(mask.sum()) for mask in masks)])
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    values: dict[str, Values] = {}
    for _ in range(rounds):
        for case, (dtype, batch_tokens) in CASES.items():
            took, values[case] = measure(history, current, sequences, masks, dtype, batch_tokens, device)
            seconds[case].append(took)
    median = {case: statistics.median(times) for case, times in seconds.items()}
    first, *others = CASES
    return {
        case: differences(values[first], values[case], offsets)
        | {"speed_ratio": round(median[first] / median[case], 3)}
        for case in others
    }


def measure(
    history: str, current: str, sequences: list[Any], masks: list[Any], dtype: str,
    batch_tokens: int | None, device: str,
) -> tuple[float, Values]:  # fmt: skip
    """Both checkpoints through the transformers backend: seconds, and the signals."""
    from sstoken.stages.backends import BackendOptions, hf

    values: Values = {}
    seconds = 0.0
    for role, checkpoint in (("history", history), ("current", current)):
        backend = hf.HFBackend(
            BackendOptions(
                checkpoint=checkpoint, signals=("loss", "attention")[: 1 + (role == "current")], layer=-1,
                dtype=dtype, device=device, batch_tokens=batch_tokens, trust_remote_code=False,
            )
        )  # fmt: skip
        list(backend.measure(sequences[:2], masks[:2]))
        start = time.perf_counter()
        found = dict(backend.measure(sequences, masks))
        seconds += time.perf_counter() - start
        in_order = [found[i] for i in range(len(masks))]
        values[f"{role}.loss"] = np.concatenate([signals["loss"] for signals in in_order])
        if role == "current":
            values["current.attention"] = np.concatenate([signals["attention"] for signals in in_order])
    return seconds, {name: array.astype(np.float64) for name, array in values.items()}


def differences(expected: Values, found: Values, offsets: "np.ndarray[Any, Any]") -> dict[str, float]:
    """Largest and mean difference of each signal, and the share of tokens whose keep mask differs."""
    from sstoken.methods import decide

    def rel(side: Values) -> "np.ndarray[Any, Any]":
        return side["history.loss"] - side["current.loss"]

    facts = {}
    for name, apart in (
        ("loss", np.abs(expected["current.loss"] - found["current.loss"])),
        ("rel", np.abs(rel(expected) - rel(found))),
        ("attention", np.abs(expected["current.attention"] - found["current.attention"])),
    ):
        facts |= {f"{name}_max": float(apart.max()), f"{name}_mean": float(apart.mean())}
    for name, params in METHODS.items():
        masks = [decide(name, offsets, side, **params).keep for side in (expected, found)]
        facts[f"mask_{name}"] = float((masks[0] != masks[1]).mean())
    return facts


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before any library reads it
    set_up_libraries()
    main()
