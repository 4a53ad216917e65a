"""Counts what a job costs: FLOPs and bytes, from config.json and token counts.

FLOPs count the unavoidable matrix products (a multiplication and an addition are two): per token, twice the weights of
the linear layers that it passes; per example of n tokens, causal attention over n^2 / 2 pairs; the output head where a
loss is needed. Training costs three times the forward pass.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError, in_one_line
from sstoken.pipeline.job import Job
from sstoken.stages import tables
from sstoken.stages.anchor import Anchor
from sstoken.stages.critical import Critical
from sstoken.stages.score import Score
from sstoken.stages.select import Select

_BYTES = {"ids": 0.92, "labels": 0.54, "mask": 0.1, "value": 2.5}
"""Bytes per token in Parquet with zstd, measured on GSM8K."""
_TRAINING = 3
"""Cost of a training step in forward passes; LoRA saves the products for the weights' gradients."""


@dataclass(frozen=True)
class Sizes:
    """Size of a tokens folder."""

    examples: float
    tokens: float
    response_tokens: float
    squares: float
    """Sum of the examples' squared lengths."""
    guessed: bool = False
    """Whether it was estimated from a sample."""

    def times(self, factor: float, guessed: bool) -> "Sizes":
        """Return the size of a folder `factor` times as large."""
        examples, tokens = factor * self.examples, factor * self.tokens
        return Sizes(examples, tokens, factor * self.response_tokens, factor * self.squares, guessed)


@dataclass(frozen=True)
class Weights:
    """Size of a model."""

    layers: int
    """Weights of the linear layers that one token passes, without the output head."""
    head: int
    width: int
    """Sum over layers of heads times head size."""
    stored: int
    """All weights."""

    def forward(self, tokens: float, with_loss: float, squares: float) -> float:
        """FLOPs of a forward pass in which `with_loss` tokens need the output head."""
        return 2 * self.layers * tokens + 2 * self.head * with_loss + 2 * self.width * squares


def measured(folder: Path) -> Sizes:
    """Return the size of a tokens folder."""
    examples = tokens = response = squares = 0
    for part in tables.parts(folder):
        stats = tables.read_metadata(part)["stats"]
        examples += stats["examples"]
        tokens += stats["tokens"]
        response += stats["response_tokens"]
        squares += sum(int(length) ** 2 * count for length, count in stats["lengths"].items())
    return Sizes(examples, tokens, response, squares)


def estimate(job: Job, size: Sizes) -> tuple[float, float]:
    """Return the FLOPs and the bytes of a step."""
    stage, per = job.stage, _BYTES
    rows = size.tokens * (per["ids"] + per["mask"])
    if isinstance(stage, Score):
        refs = (stage.checkpoint, *stage.references.values())
        flops = sum(weights(r).forward(size.tokens, size.response_tokens, size.squares) for r in refs)
        return flops, size.response_tokens * per["value"] * len(stage.measured)
    if isinstance(stage, Critical):
        return _generating(stage, size), size.response_tokens * per["value"]
    if isinstance(stage, Anchor):
        model = weights(stage.model)
        passes = stage.epochs
        if stage.max_steps is not None:
            seen = stage.max_steps * stage.batch_size * stage.gradient_accumulation
            passes = seen / max(1.0, size.examples)
        share = (_TRAINING - 1) if stage.lora_rank else _TRAINING
        flops = share * passes * model.forward(size.tokens, size.tokens, size.squares)
        kept = (stage.snapshots or 4) * (1 if stage.ema_decay is None else 2)  # step-0 is a reference
        return flops, 0.0 if stage.lora_rank else 4.0 * model.stored * kept
    if isinstance(stage, Select):
        values = 0 if stage.lean else 3 * size.response_tokens * per["value"]
        return 0.0, rows + size.tokens * (per["labels"] + per["mask"]) + values
    return 0.0, rows


def _generating(stage: Critical, size: Sizes) -> float:
    """FLOPs of `critical` if every problem is answered right, with responses as long as the dataset's."""
    mean = size.response_tokens / max(1.0, size.examples)
    tried = min(stage.max_positions or mean, mean)
    each = min(mean, stage.max_new_tokens) + tried * stage.alternatives * min(mean / 2, stage.max_new_tokens)
    generated = size.examples * each
    return weights(stage.checkpoint).forward(size.tokens + generated, generated, size.squares)


@cache
def weights(checkpoint: str) -> Weights:
    """Count the weights that a checkpoint's config.json describes, without loading any.

    Raises:
        SstokenError: there is no configuration that transformers knows.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from sstoken.stages import checkpoints

    if "://" in checkpoint:
        raise SstokenError(
            f"{checkpoint}: its weights cannot be counted from afar; name a local folder or a Hub id"
        )
    base = checkpoints.adapter_base(checkpoint) or checkpoint
    base = str(Path(base).expanduser()) if Path(base).expanduser().is_dir() else base
    try:
        config = AutoConfig.from_pretrained(base)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    except Exception as error:  # each model's configuration class can fail in its own way
        line = in_one_line(error, 200)
        raise SstokenError(f"{checkpoint}: config.json does not describe a known model ({line})") from error
    text = config.get_text_config()
    head = model.get_output_embeddings()
    embedded = {id(p) for m in (model.get_input_embeddings(), head) if m is not None for p in m.parameters()}
    layers = 0.0
    for name, weight in model.named_parameters():
        if id(weight) not in embedded and weight.ndim > 1:
            layers += weight.numel() * (_active(text) if ".experts." in name else 1)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Weights(
        layers=int(layers),
        head=0 if head is None else head.weight.numel(),
        width=text.num_hidden_layers * text.num_attention_heads * size,
        stored=sum(p.numel() for p in model.parameters()),
    )


def _active(config: Any) -> float:
    """Share of a mixture's experts that a token passes; 1 without experts."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    taken = getattr(config, "num_experts_per_tok", None)
    return taken / experts if experts and taken else 1.0
