"""The signals of seeded random models by eager attention and full logits, in float64: ours are compared with them.

`python -m tests.golden.signals` writes `signals.parquet` anew. Weights and tokens come from numpy's generator, whose
stream does not change between versions.
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

FILE = Path(__file__).with_name("signals.parquet")
VOCABULARY, POSITIONS, EXAMPLES = 128, 64, 24
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": None,
    "eos_token_id": 0,
}
MODELS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}
SEEDS = {"history": 1, "current": 2}
SIGNALS = (
    "loss", "entropy", "entropy_top20", "rank", "ties", "mass_above", "max_prob", "sum_p2", "expected_rank",
    "entropy_at", "attention", "attention_predicting", "loss_unconditional", "kl@history", "reverse_kl@history",
    "kl_at@history",
)  # fmt: skip
"""Signals of the current model. The history model gives its loss alone, as `loss_history`."""


def make_model(architecture: str, role: str) -> PreTrainedModel:
    """A random model in float32; those of two roles differ as two checkpoints of one training do."""
    kind, config = MODELS[architecture]
    model = kind(config(**SHAPE)).eval()
    shared, own = np.random.default_rng(0), np.random.default_rng(SEEDS[role])
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            scale = 1.0 if weight.ndim == 1 else 2 / np.sqrt(weight.shape[-1])
            values = shared.uniform(-1, 1, weight.shape) + 0.2 * own.uniform(-1, 1, weight.shape)
            weight.copy_(torch.from_numpy(scale * values + (weight.ndim == 1)))
    return model


def make_examples() -> list[tuple[list[int], list[bool]]]:
    """Token ids and response masks: one or two turns, of all lengths that the models take."""
    random = np.random.default_rng(3)
    examples = []
    for number in range(EXAMPLES):
        length = POSITIONS if number == 0 else int(random.integers(3, POSITIONS))
        mask = np.arange(length) >= random.integers(1, length)
        if number % 3 == 0:
            mask[1 : random.integers(2, length)] = True
        examples.append((random.integers(1, VOCABULARY, length).tolist(), mask.tolist()))
    return examples


def reference(
    model: PreTrainedModel, other: PreTrainedModel, ids: list[int], mask: list[bool]
) -> dict[str, np.ndarray[Any, Any]]:
    """The signals of each token by name, NaN off the response, written down from their definitions.

    Attention: last layer, mean over heads, a row summed over the columns up to it that are not response tokens. `other`
    is what `kl` compares with.
    """
    out = _forward(model, ids)
    log_p, log_q = (torch.log_softmax(o.logits[0], 1) for o in (out, _forward(other, ids)))
    alone = [token for token, response in zip(ids, mask, strict=True) if response]
    log_p_alone = torch.log_softmax(_forward(model, alone).logits[0], 1) if alone else None
    weights = out.attentions[-1][0].mean(0)
    prompt = ~torch.tensor(mask)
    found = {name: np.full(len(ids), np.nan) for name in SIGNALS}
    response = [place for place in range(1, len(ids)) if mask[place]]
    for number, place in enumerate(response):
        token, lp, lq = ids[place], log_p[place - 1], log_q[place - 1]
        p, own = lp.exp(), lp[ids[place]]
        order = sorted(range(len(lp)), key=lambda v: -float(lp[v]))
        top = torch.log_softmax(lp[order[:20]], 0)
        values = {
            "loss": -own,
            "entropy": -(p * lp).sum(),
            "entropy_top20": -(top.exp() * top).sum(),
            "rank": (lp > own).sum(),
            "ties": (lp == own).sum() - 1,
            "mass_above": p[lp > own].sum(),
            "max_prob": p.max(),
            "sum_p2": (p * p).sum(),
            "expected_rank": sum(rank * p[v] for rank, v in enumerate(order, 1)),
            "entropy_at": -(log_p[place].exp() * log_p[place]).sum(),
            "attention": weights[place, : place + 1][prompt[: place + 1]].sum(),
            "attention_predicting": weights[place - 1, :place][prompt[:place]].sum(),
            "kl@history": (p * (lp - lq)).sum(),
            "reverse_kl@history": (lq.exp() * (lq - lp)).sum(),
            "kl_at@history": (log_p[place].exp() * (log_p[place] - log_q[place])).sum(),
        }
        if number and log_p_alone is not None:
            values["loss_unconditional"] = -log_p_alone[number - 1, token]
        for name, value in values.items():
            found[name][place] = float(value)
    return found


def _forward(model: PreTrainedModel, ids: list[int]) -> Any:
    with torch.no_grad():
        return model(torch.tensor([ids]), output_attentions=True)


def make_table() -> pl.DataFrame:
    """A row for each architecture and example."""
    rows = []
    for architecture in MODELS:
        models = {role: make_model(architecture, role).double() for role in SEEDS}
        for model in models.values():
            model.set_attn_implementation("eager")
        for number, (ids, mask) in enumerate(make_examples()):
            facts = {
                "architecture": architecture,
                "example_id": str(number),
                "input_ids": ids,
                "response_mask": mask,
            }
            history = reference(models["history"], models["history"], ids, mask)
            current = reference(models["current"], models["history"], ids, mask)
            values = {"loss_history": history["loss"]} | current
            rows.append(facts | {name: column.tolist() for name, column in values.items()})
    return pl.DataFrame(rows)


if __name__ == "__main__":
    make_table().write_parquet(FILE, compression="zstd", compression_level=19)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")
