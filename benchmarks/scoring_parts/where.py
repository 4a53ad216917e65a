"""Where the time of scoring goes, by kind of operation."""

import time
from pathlib import Path

from benchmarks.rounds import middle
from benchmarks.scoring_parts.inputs import make_inputs, read_rows

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn"),
    "attention kernel": ("flash_attention",),
    "exponentials": ("aten::exp", "aten::silu", "aten::logsumexp"),
    "sums and largest": ("aten::sum", "aten::amax", "aten::mean", "aten::mv", "aten::addmv"),
    "element by element": ("aten::mul", "aten::add", "aten::sub", "aten::rsqrt", "aten::pow", "aten::neg"),
    "copies": ("aten::copy", "aten::cat", "aten::index", "aten::fill", "aten::zero"),
}
"""An operation belongs to the first kind that has a piece of its name."""


def time_by_kind(work: Path, model: str, rows: int) -> dict[str, float]:
    """Medians of shares of the wall clock of the backend, both signals, after a warm-up; `fixed` is in seconds.

    `rest` is Python and everything else; `fixed` is what the stage takes for two short rows, disk to disk.
    """
    import numpy as np
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.scoring_parts.inputs import write_tokens
    from benchmarks.scoring_parts.sides import score_stage
    from sstoken.stages.backends import BackendOptions, hf

    make_inputs(work, model, rows, "short")
    write_tokens(work / "warm-up", [(8, 8), (12, 20)])
    backend = hf.HFBackend(
        BackendOptions(
            checkpoint=str(work / "model"), signals=("loss", "attention"), layer=-1, dtype="float32", device="cpu",
            batch_tokens=None, trust_remote_code=False,
        )
    )  # fmt: skip
    examples = read_rows(work / "tokens")
    sequences = [np.array(row["input_ids"], np.int32) for row in examples]
    masks = [np.array(row["response_mask"]) for row in examples]
    list(backend.measure(sequences[:8], masks[:8]))
    score_stage(work / "warm-up", work / "model", work)

    def once() -> dict[str, float]:
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            start = time.perf_counter()
            list(backend.measure(sequences, masks))
            wall = time.perf_counter() - start
        shares = dict.fromkeys(KINDS, 0.0)
        for event in trace.key_averages():
            kind = next((k for k, pieces in KINDS.items() if any(x in event.key for x in pieces)), None)
            if kind is not None:
                shares[kind] += event.self_cpu_time_total / 1e6 / wall
        shares["rest"] = max(0.0, 1.0 - sum(shares.values()))
        start = time.perf_counter()
        score_stage(work / "warm-up", work / "model", work)
        return shares | {"fixed": time.perf_counter() - start}

    return {kind: round(share, 3) for kind, share in middle(once).items()}
