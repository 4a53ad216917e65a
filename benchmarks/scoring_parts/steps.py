"""What each step towards the stage gives: the plain script, changed one thing at a time.

Everything here is plain torch, except the last three rows of the table, which are the product's own pieces.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scoring_parts.inputs import make_inputs, read_rows, write_tokens
from benchmarks.scoring_parts.sides import last_layer_weights, plain_model, plain_script, score_stage
from benchmarks.scoring_parts.speed import timed, work_of

BATCH_TOKENS = 768
TILE_WIDTH = 1000


@dataclass(frozen=True)
class How:
    """Which steps are taken."""

    mask: bool = True
    """Give the model the attention mask of the padding."""
    loss: str = "all"
    """`all` logits at once, those of the `response`, or `tiles` of them, or tiles `in place`."""
    capture: bool = False
    """Prompt attention from inside the forward pass, by the log-sum-exp of its attention kernel."""


_SORTED = How()
_NO_MASK = replace(_SORTED, mask=False)
_RESPONSE = replace(_NO_MASK, loss="response")
_TILES = replace(_RESPONSE, loss="tiles")
_IN_PLACE = replace(_TILES, loss="in place")
_CAPTURE = replace(_IN_PLACE, capture=True)
STEPS = {
    "sorted batches of a token budget": _SORTED,
    "no attention mask": _NO_MASK,
    "logits of response rows only": _RESPONSE,
    "loss by tiles": _TILES,
    "tiles in place": _IN_PLACE,
    "prompt attention from inside the forward pass": _CAPTURE,
}


def compare_steps(work: Path, model: str, rows: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time every step in turns. All give the signals of the first: `apart` is the largest difference."""
    make_inputs(work, model, rows, "short")
    write_tokens(work / "warm-up", [(8, 8), (12, 20)])
    folder = work / "model"
    loaded = {attention: plain_model(folder, attention) for attention in ("eager", "one-layer", "sdpa")}
    sides: dict[str, Callable[[Path], Any]] = {
        "plain script, eager": lambda tokens: plain_script(tokens, loaded["eager"], "eager"),
        "sdpa, one layer again": lambda tokens: plain_script(tokens, loaded["one-layer"], "one-layer"),
        **{
            name: lambda tokens, how=how: stepwise(tokens, loaded["sdpa"], how) for name, how in STEPS.items()
        },
        "the stage, disk to disk": lambda tokens: read_rows(score_stage(tokens, folder, work)),
    }
    for run in sides.values():
        run(work / "warm-up")
    _, flops = work_of(work / "tokens", folder)
    masks = [np.array(row["response_mask"]) for row in read_rows(work / "tokens", ["response_mask"])]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    shares: dict[str, list[float]] = {name: [] for name in sides}
    apart: dict[str, float] = {}
    expected = None
    for _ in range(rounds):
        for name, run in sides.items():
            result: list[Any] = []
            took, share = timed(lambda run=run, result=result: result.append(run(work / "tokens")), flops)
            seconds[name].append(took)
            shares[name].append(share)
            found = on_responses(result[0], masks)
            expected = found if expected is None else expected
            apart[name] = float(np.abs(found - expected).max())
    median = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(median.values()))
    return {
        name: {
            "ratio": round(first / median[name], 2),
            "share_of_limit": round(statistics.median(shares[name]), 3),
            "apart": apart[name],
        }
        for name in sides
    }


def on_responses(kept: list[Any], masks: list[Any]) -> "np.ndarray[Any, Any]":
    """Loss and prompt attention of all response tokens, [2, N], of what either side gave."""
    losses, prompt_attention = [], []
    for row, mask in zip(kept, masks, strict=True):
        of_row = (row["loss"], row["attention"]) if isinstance(row, dict) else ([0.0, *row[0]], row[1])
        values = np.array(of_row, np.float64)[:, mask]
        losses.append(values[0])
        prompt_attention.append(values[1])
    return np.stack([np.concatenate(losses), np.concatenate(prompt_attention)])


def stepwise(tokens: Path, model: Any, how: How) -> list[Any]:
    """The plain script with the steps of `how`, in batches sorted by length."""
    import torch

    from sstoken.measure.capture import IMPLEMENTATION, AttentionCapture

    rows = read_rows(tokens)
    model.set_attn_implementation(IMPLEMENTATION if how.capture else "sdpa")
    capture = AttentionCapture(model, -1) if how.capture else None
    kept: list[Any] = [None] * len(rows)
    with torch.no_grad():
        for indices in sorted_batches([len(row["input_ids"]) for row in rows]):
            longest = len(rows[indices[0]]["input_ids"])
            ids = torch.zeros(len(indices), longest, dtype=torch.long)
            seen, response = torch.zeros_like(ids), torch.zeros(len(indices), longest, dtype=torch.bool)
            for i, index in enumerate(indices):
                n = len(rows[index]["input_ids"])
                ids[i, :n] = torch.tensor(rows[index]["input_ids"])
                response[i, :n] = torch.tensor(rows[index]["response_mask"])
                seen[i, :n] = 1
            wanted = response.flatten().nonzero()[:, 0] - 1
            if capture is not None:
                capture.expect(response)
            out = model.model(
                input_ids=ids, attention_mask=seen if how.mask else None, use_cache=False,
                output_hidden_states=not how.capture,
            )  # fmt: skip
            losses = torch.zeros(ids.shape)
            losses.view(-1)[wanted + 1] = losses_of(out.last_hidden_state, wanted, ids, model, how.loss)
            if capture is not None:
                prompt_attention = capture.take()
            else:
                weights = last_layer_weights(model, out.hidden_states[-2], longest)
                prompt_attention = (weights.mean(1) * (~response)[:, None]).sum(-1)
            for i, index in enumerate(indices):
                n = len(rows[index]["input_ids"])
                kept[index] = (losses[i, 1:n].tolist(), prompt_attention[i, :n].tolist())
    if capture is not None:
        capture.detach()
    return kept


def sorted_batches(lengths: list[int]) -> list[list[int]]:
    """Indices of rows, longest first, in batches whose padded size is within the budget."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def losses_of(hidden: Any, wanted: Any, ids: Any, model: Any, loss: str) -> Any:
    """Losses [N] of the tokens that the states [B, T, D] at the `wanted` places [N] predict."""
    import torch

    from sstoken.measure.token_loss import OutputHead, token_losses

    weight, targets = model.lm_head.weight, ids.flatten()[wanted + 1]
    if loss == "all":
        log_p = (hidden @ weight.T).log_softmax(-1).flatten(0, 1)
        return -log_p[wanted, targets]
    rows = hidden.flatten(0, 1)[wanted]
    if loss == "response":
        return -(rows @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    if loss == "in place":
        return token_losses(rows, targets, OutputHead(weight))
    total = torch.full(targets.shape, float("-inf"))
    for start in range(0, len(weight), TILE_WIDTH):
        total = torch.logaddexp(total, (rows @ weight[start : start + TILE_WIDTH].T).logsumexp(1))
    return total - (rows * weight[targets]).sum(1)
