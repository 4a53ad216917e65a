"""Scoring speed and memory: the `score` stage, disk to disk, against a plain script.

Both sides give both signals (loss of every response token, prompt attention of the last layer), in turns in
one process, on one thread. The plain script does what one writes first: batches of 8 in the order of the data, padded
(single rows at the long lengths), all logits, everything kept in memory; its attention comes from eager attention of
all layers (`eager`), or from sdpa and a recomputation of the last layer's weights (`one-layer`).

The limit is the time that the arithmetic needed takes at the rate of this machine's matrix product: every real token
through the layers once, causal attention, the output embedding for response tokens. The rate is that of two products
of 1,024 x 1,024 matrices before each batch of the run itself, whose time is taken off: a shared machine is half as fast
in one second as in the next. Shares are of CPU time, speeds and ratios of the clock on the wall. `limit_to_eager` is
the ratio that a side at the limit would have.

Parts: `speed`, `memory` (peaks as the data grows 1x, 4x, 16x, and with a vocabulary of 128 thousand, each in a process
of its own), `steps` (the plain script, changed one thing at a time until it is as fast as the stage) and `where` (the
share of the stage's time that each kind of operation takes; its fixed costs).

    python benchmarks/scoring.py --quick
    python benchmarks/scoring.py --json
    python benchmarks/scoring.py --parts speed --models 8x512 --lengths long
    python benchmarks/scoring.py --parts speed --lengths mixed --compile
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.rounds import at_least
from sstoken.pipeline.cli import set_up_libraries

ROWS = {"6x256": 384, "8x512": 192, "tiny": 16}
"""Examples of the short set, by model: enough for loading and hashing not to count, few enough for three rounds."""
LENGTHS = ("short", "mixed", "long")
PARTS = ("speed", "memory", "steps", "where")


def main() -> None:
    """Parse the options; run the parts, or one side for the part `memory`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute: one model, few examples")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all; quick: speed memory")
    parser.add_argument("--models", nargs="+", choices=tuple(ROWS), help="default: 6x256 8x512; quick: 6x256")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, help="default: short long; quick: short")
    parser.add_argument("--rows", type=int, help="examples; the long set has one in 32")
    parser.add_argument("--rounds", type=int, default=3, help="times that each side runs, at least 3")
    parser.add_argument(
        "--compile", action="store_true", help="part speed: the stage with compiled layers beside the others"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--inputs", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        from benchmarks.scoring_parts.memory import measure_side

        print(json.dumps(measure_side(options.side, options.work, *options.inputs)))
        return
    options.models = options.models or (["6x256"] if options.quick else ["6x256", "8x512"])
    options.lengths = options.lengths or (["short"] if options.quick else ["short", "long"])
    options.rounds = at_least(options.rounds)
    parts = options.parts or (["speed", "memory"] if options.quick else PARTS)
    run = {"speed": run_speed, "memory": run_memory, "steps": run_steps, "where": run_where}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            figures |= run[part](Path(folder) / part, options)
    if options.json:
        print(json.dumps(figures))


def run_speed(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every model with every set of lengths."""
    from benchmarks.scoring_parts.speed import compare_speed

    figures = {}
    for model in options.models:
        short = options.rows or (8 if options.quick else ROWS[model])
        for lengths in options.lengths:
            rows = max(2, short // 32) if lengths == "long" else short
            folder = work / f"{model}-{lengths}"
            facts = compare_speed(folder, model, lengths, rows, options.rounds, options.compile)
            figures[f"{model} {lengths}"] = facts
            print(f"{model} {lengths:5}  " + "  ".join(f"{k} {v:,.2f}" for k, v in facts.items()), flush=True)
    return figures


def run_memory(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The first model, at the short lengths."""
    from benchmarks.scoring_parts.memory import compare_memory

    rows = options.rows or (16 if options.quick else 64)
    figures: dict[str, Any] = {}
    for side, case, facts in compare_memory(
        work, options.models[0], rows,
        copies=(1, 4) if options.quick else (1, 4, 16),
        sides=("sstoken",) if options.quick else ("sstoken", "eager"),
        vocabularies=not options.quick,
    ):  # fmt: skip
        figures.setdefault(side, {})[case] = facts
        print(f"MB {side:7} {case:4}  " + "  ".join(f"{k} {v:,.0f}" for k, v in facts.items()), flush=True)
    return {"memory_mb": figures}


def run_steps(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The first model, at the short lengths."""
    from benchmarks.scoring_parts.steps import compare_steps

    rows = options.rows or (16 if options.quick else 32)
    figures = compare_steps(work, options.models[0], rows, options.rounds)
    for name, facts in figures.items():
        print(f"step {name:42}" + "  ".join(f"{k} {v:8.3g}" for k, v in facts.items()), flush=True)
    return {"steps": figures}


def run_where(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every model, at the short lengths."""
    from benchmarks.scoring_parts.where import time_by_kind

    figures = {}
    for model in options.models:
        rows = options.rows or (16 if options.quick else 64)
        figures[model] = time_by_kind(work / model, model, rows)
        shares = "  ".join(f"{kind} {share:.3f}" for kind, share in figures[model].items())
        print(f"where {model}  {shares}", flush=True)
    return {"where": figures}


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before any library reads it
    set_up_libraries()
    main()
