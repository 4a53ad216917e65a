"""The signals of seeded random models by plain eager attention, in float64: what ours are compared with.

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


def reference(model: PreTrainedModel, ids: list[int], mask: list[bool]) -> tuple[np.ndarray[Any, Any], ...]:
    """Loss and attention importance of each token, NaN off the response, written down from their definitions.

    Loss: of a token, from the logits one place before it. Attention: last layer, mean over heads, the row of the token,
    summed over the columns before it that are not response tokens.
    """
    model = model.double()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_attentions=True)
    loss, attention = np.full(len(ids), np.nan), np.full(len(ids), np.nan)
    prompt = ~torch.tensor(mask)
    for place in range(1, len(ids)):
        if mask[place]:
            loss[place] = -torch.log_softmax(out.logits[0, place - 1], 0)[ids[place]].item()
            attention[place] = out.attentions[-1][0, :, place, :place][:, prompt[:place]].mean(0).sum().item()
    return loss, attention


def make_table() -> pl.DataFrame:
    """A row for each architecture and example."""
    rows = []
    for architecture in MODELS:
        models = {role: make_model(architecture, role) for role in SEEDS}
        for number, (ids, mask) in enumerate(make_examples()):
            history, _ = reference(models["history"], ids, mask)
            current, attention = reference(models["current"], ids, mask)
            rows.append(
                {
                    "architecture": architecture,
                    "example_id": str(number),
                    "input_ids": ids,
                    "response_mask": mask,
                    "loss_history": history.tolist(),
                    "loss_current": current.tolist(),
                    "attention": attention.tolist(),
                }
            )
    return pl.DataFrame(rows)


if __name__ == "__main__":
    make_table().write_parquet(FILE, compression="zstd", compression_level=19)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")
