"""Peak memory of both sides, each measurement in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.rounds import middle
from benchmarks.scoring_parts.inputs import VOCABULARY, make_model, real_examples, write_tokens
from benchmarks.scoring_parts.sides import plain_model, plain_script, score_stage

BATCH_TOKENS = 2048
LARGE_VOCABULARY = 128_000


def compare_memory(
    work: Path, model: str, rows: int, copies: Sequence[int], sides: Sequence[str], vocabularies: bool
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Peaks as the data grows, at a budget of 2,048 tokens; and ours with the large vocabulary, if asked.

    1x is `rows` examples, and a quarter of them for the plain script, which is slow.

    Yields:
        A side, the size of its data (`1x`) or `128k`, and MB of 2**20 bytes: `before` the first shard is read
        (libraries and model are in memory), the `peak` from there on, `above`: the difference, of which `library_code`
        is code that is read from disk when it is first called, and `beyond_weights`: the peak less the weights.
    """
    vocabulary = {"model": VOCABULARY} | ({"model-128k": LARGE_VOCABULARY} if vocabularies else {})
    for name, size in vocabulary.items():
        make_model(work / name, model, size)
    examples = real_examples(rows, "short")
    cases: list[tuple[str, str, str, str]] = []
    for times in copies:
        for side in sides:
            some = examples if side == "sstoken" else examples[: len(examples) // 4]
            write_tokens(work / f"tokens-{side}-{times}", some * times)
            cases.append((side, f"{times}x", "model", f"tokens-{side}-{times}"))
    if vocabularies:
        cases.append(("sstoken", "128k", "model-128k", f"tokens-sstoken-{copies[0]}"))
    with ThreadPoolExecutor(2) as pool:  # what a process takes does not depend on how fast it runs
        for case, facts in zip(
            cases, pool.map(lambda case: middle(lambda: _in_process(work, *case)), cases), strict=True
        ):
            yield case[0], case[1], facts


def _in_process(work: Path, side: str, label: str, model: str, tokens: str) -> dict[str, float]:
    command = [
        sys.executable, str(Path(__file__).parents[1] / "scoring.py"), "--side", side,
        "--work", str(work), "--inputs", model, tokens,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the side {side!r} failed at {label}")
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return facts


def measure_side(side: str, work: Path, model: str, tokens: str) -> dict[str, float]:
    """Run one side in this process; gives the figures of `compare_memory`."""
    import pyarrow as pa
    import torch

    torch.set_num_threads(1)
    pa.array([0])  # loads pandas, at the first conversion: a library, too
    if side == "sstoken":
        from sstoken.pipeline import api  # noqa: F401 - a library of the stage, to be in memory before
        from sstoken.stages.backends import BackendOptions, hf

        options = BackendOptions(
            checkpoint=str(work / model), signals=("loss", "attention"), layer=-1, dtype="float32", device="cpu",
            batch_tokens=BATCH_TOKENS, trust_remote_code=False,
        )  # fmt: skip
        hf.HFBackend(options)  # loads the model, which the stage then finds in memory
        before = _reset_peak()
        score_stage(work / tokens, work / model, work, BATCH_TOKENS)
    else:
        loaded = plain_model(work / model, side)
        before = _reset_peak()
        plain_script(work / tokens, loaded, side)
    after = _status()
    weights = (work / model / "model.safetensors").stat().st_size / 2**20
    facts = {
        "peak": after["VmHWM"],
        "before": before["VmRSS"],
        "above": after["VmHWM"] - before["VmRSS"],
        "library_code": after["RssFile"] - before["RssFile"],
        "beyond_weights": after["VmHWM"] - weights,
    }
    return {name: round(value, 1) for name, value in facts.items()}


def _reset_peak() -> dict[str, float]:
    """Forget the peak of loading, from here on; the status now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status()


def _status() -> dict[str, float]:
    """The kernel's figures of this process that are sizes, in MB."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0][:-1]: int(words[1]) / 1024 for words in lines if words[-1] == "kB"}
