"""The two sides: the `score` stage, and the plain script, which does what one writes first."""

import time
from pathlib import Path
from typing import Any

from benchmarks.scoring_parts.inputs import read_rows

PLAIN_BATCH = {"short": 8, "mixed": 8, "long": 1}
"""At 4,000 tokens, eager attention of all layers would take 24 GB for 8 rows."""
Kept = list[tuple[list[float], list[float]]]
"""For each row, losses [T - 1] of the tokens from the second on, and prompt attention [T]."""


def score_stage(
    tokens: Path, model: Path, work: Path, batch_tokens: int | None = None, *, compiled: bool = False
) -> Path:
    """The real stage, disk to disk, through the function that the command calls; gives its folder."""
    from sstoken.pipeline import api

    out = work / f"scores-{time.time_ns()}"
    api.score(
        tokens=tokens, checkpoints=[f"model={model}"], out=out, device="cpu", backend="hf",
        backend_options={"compile": compiled}, batch_tokens=batch_tokens,
    )  # fmt: skip
    return out / "model"


def plain_model(folder: Path, attention: str) -> Any:
    """The checkpoint as the plain script loads it."""
    from transformers import AutoModelForCausalLM

    implementation = "eager" if attention == "eager" else "sdpa"
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()


def plain_script(tokens: Path, model: Any, attention: str, batch_size: int = PLAIN_BATCH["short"]) -> Kept:
    """Batches in the order of the data, padded, all logits, everything kept.

    `attention`: `eager` takes the last layer's weights from eager attention of all layers, `one-layer` computes them
    again beside sdpa.
    """
    import torch

    rows = read_rows(tokens)
    kept: Kept = []
    with torch.no_grad():
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
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
                prompt_attention = (weights[i, :, :n, :n].mean(0) * prompt).sum(-1)
                kept.append((losses[i, : n - 1].tolist(), prompt_attention.tolist()))
    return kept


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
