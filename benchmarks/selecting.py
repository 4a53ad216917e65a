"""`select` with every method over GSM8K: seconds, CPU seconds and peak memory of the whole command.

The tokens are GSM8K's, the signals random: what a method makes of them takes as long as with measured ones.

    python benchmarks/selecting.py [--quick] [--json] [--data FILE --model FOLDER]
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.commands import run
from benchmarks.rounds import middle
from sstoken import curate
from sstoken.methods import METHODS, Input
from sstoken.signals import get_signal
from sstoken.stages import joins, tables
from sstoken.stages.manifest import Manifest, list_files, write_manifest
from sstoken.stages.scores_file import measured_tokens, write_scores

SHARED = Path(__file__).parents[2] / "shared"
ROLES = ("history", "current")
OTHERS = {
    "sstoken, scope global": ["--method", "sstoken", "--scope", "global"],
    "sstoken, protect": ["--method", "sstoken", "--protect", "end_of_turn", "--protect", "code"],
    "sstoken, pool sentence": ["--method", "sstoken", "--pool", "sentence"],
    "full, examples by t-shirt": ["--method", "full", "--example", "keep=0.05"],
}
"""Selections beside one of each method with its defaults."""


def main() -> None:
    """Parse the options; measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="500 examples")
    parser.add_argument("--only", nargs="+", help="these selections alone")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    parser.add_argument("--data", default=str(SHARED / "data/gsm8k/train.jsonl"))
    parser.add_argument("--model", default=str(SHARED / "models/base"), help="whose tokenizer encodes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = folder / "data.jsonl"
        lines = Path(options.data).read_text().splitlines()[: 500 if options.quick else None]
        data.write_text("\n".join(lines) + "\n")
        curate.encode(data=str(data), model=options.model, out=folder / "tokens", workers=1)
        for role in ROLES:
            write_random_scores(folder / "tokens", folder / "scores" / role)
        figures = {}
        selections = {name: ["--method", name] for name in METHODS} | OTHERS
        for name, asked in selections.items():
            if options.only and name not in options.only:
                continue
            figures[name] = middle(partial(measure, folder, asked))
            print(
                f"{name:28} {figures[name]['seconds']:6.2f} s {figures[name]['cpu_seconds']:6.2f} s of CPU "
                f"{figures[name]['peak_mib']:6.0f} MiB",
                flush=True,
            )
    worst = {key: max(f[key] for f in figures.values()) for key in ("seconds", "cpu_seconds", "peak_mib")}
    print(
        f"{len(lines):,} examples; at most {worst['seconds']:.2f} s, {worst['cpu_seconds']:.2f} s of CPU and "
        f"{worst['peak_mib']:.0f} MiB"
    )
    if options.json:
        print(json.dumps({"examples": len(lines), "worst": worst, "selections": figures}))


def write_random_scores(tokens: Path, out: Path) -> None:
    """All signals that a method reads, of one checkpoint."""
    out.mkdir(parents=True)
    wanted = {Input(i).signal for method in METHODS.values() for i in method.inputs} | {"loss_unconditional"}
    names = sorted(wanted)
    random = np.random.default_rng(len(out.name))
    for part in tables.parts(tokens):
        table = tables.read_table(part)
        response, offsets = tables.flatten(table["response_mask"])
        response = response.astype(bool)
        signals = {}
        for name in names:
            signal = get_signal(name)
            size = int(measured_tokens(signal, response, offsets).sum())
            high = 8.0 if np.isinf(signal.high) else signal.high
            signals[name] = (random.random(size) * (high - signal.low) + signal.low).astype(signal.dtype)
        about = {"checkpoint": out.name, "layer": -1, "dtype": "float32", joins.RUN: "benchmark"}
        about[joins.TOKENS] = joins.tokens_fingerprint(table)
        write_scores(out / part.name, table["example_id"].to_pylist(), offsets, response, signals, about)
    facts: dict[str, Any] = {"settings": {"signals": names}, "inputs": {}, "sources": {}, "metrics": {}}
    write_manifest(
        out,
        Manifest(
            stage="score",
            fingerprint="benchmark",
            seed=0,
            version="0",
            seconds=0,
            files=list_files(out),
            **facts,
        ),
    )


def measure(folder: Path, asked: list[str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak MiB of `sstoken-curate select` as a process of its own."""
    out = folder / "masked"
    arguments = ["select", "--tokens", str(folder / "tokens"), "--scores", str(folder / "scores"), *asked]
    arguments += ["--role", "history=history", "--role", "current=current", "--out", str(out), "--force"]
    return run(*arguments).figures()


if __name__ == "__main__":
    main()
