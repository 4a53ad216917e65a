"""Find out by short forward passes what can be measured of a model of any architecture."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sstoken.errors import SstokenError, UsageError, first_line
from sstoken.measure.capture import IMPLEMENTATION, attention_calls

_LENGTH = 11
_SHARED = 5
"""Length of the prefix that both trial rows share."""


@dataclass(frozen=True)
class Findings:
    """Results of the trial."""

    softmax_layers: tuple[int, ...]
    """Decoder layers whose attention goes through transformers' attention interface, ascending."""
    rows_agree: bool
    """Whether a row has the same logits in a padded batch as alone."""


@torch.inference_mode()
def examine(model: Any) -> Findings:
    """Run a model on a few tokens, and set its attention to `IMPLEMENTATION` if its logits stay the same.

    Raises:
        SstokenError: it cannot run on token ids alone, or a token's states depend on later tokens.
    """
    name = type(model).__name__
    ids, other = _trial_rows(model)
    try:
        alone = _logits(model, ids[None])[0]
        layers = _softmax_layers(model, ids, alone)
        batch = _logits(model, torch.stack([ids, other]))
        agree = _agree(batch[0], alone, model.dtype) and _agree(
            batch[1, :_SHARED], alone[:_SHARED], model.dtype
        )
        causal = agree or _agree(_logits(model, other[None])[0, :_SHARED], alone[:_SHARED], model.dtype)
    except Exception as error:  # an unknown architecture can fail in any way
        raise SstokenError(
            f"{name}: cannot run on token ids alone ({first_line(error)}); it is not supported"
        ) from error
    if not causal:
        raise _not_causal(name)
    return Findings(layers, agree)


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Compare the logits of two sequences with the same beginning; the model is in evaluation mode.

    Raises:
        SstokenError: a token's states depend on later tokens.
    """
    first, second = (_logits(model, row[None])[0, :_SHARED] for row in _trial_rows(model))
    dtype = torch.bfloat16 if torch.is_autocast_enabled(model.device.type) else model.dtype
    if not _agree(first, second, dtype):
        raise _not_causal(type(model).__name__)


def _not_causal(name: str) -> SstokenError:
    return SstokenError(
        f"{name}: a token's prediction depends on the tokens after it; only causal language models work (an encoder "
        "needs is_decoder in its config.json)"
    )


@torch.no_grad()
def last_softmax_layer(model: Any) -> int:
    """Find the last decoder layer whose attention can be captured, by a short forward pass; leaves the model unchanged.

    Raises:
        UsageError: no layer's attention can be captured, or not with the model's present implementation.
    """
    now = model.config.get_text_config()._attn_implementation
    tried = IMPLEMENTATION if now == "eager" and model._can_set_attn_implementation() else now
    layers: tuple[int, ...] = ()
    if tried != "eager":
        ids = torch.arange(2, device=model.get_input_embeddings().weight.device)[None]
        training = model.training
        model.eval()
        try:
            if tried != now:
                model.set_attn_implementation(tried)
            with attention_calls(tried) as modules:
                model(input_ids=ids, use_cache=False)
        finally:
            if tried != now:
                model.set_attn_implementation(now)
            model.train(training)
        layers = _indices(modules)
    if not layers:
        raise UsageError(
            f"{type(model).__name__}: its attention cannot be captured, as it does not go through transformers' "
            "attention interface (linear attention or a custom model); set gamma=1, which needs none"
        )
    with attention_calls(now):  # refuses an implementation that cannot be observed
        return layers[-1]


def _indices(modules: list[nn.Module]) -> tuple[int, ...]:
    """The decoder layers that these modules belong to, ascending."""
    indices = [getattr(module, "layer_idx", None) for module in modules]
    return tuple(sorted({index for index in indices if isinstance(index, int)}))


def _softmax_layers(model: Any, ids: Tensor, expected: Tensor) -> tuple[int, ...]:
    """The layers whose attention can be observed; none if observing them would change the model's logits."""
    before = model.config._attn_implementation
    if not model._can_set_attn_implementation():
        return ()
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        with attention_calls() as modules:
            logits = _logits(model, ids[None])[0]
        layers = _indices(modules)
        if layers and _agree(logits, expected, model.dtype):
            return layers
    except Exception:  # a model not made for the interface can fail in any way
        pass
    model.set_attn_implementation(before)
    return ()


def _trial_rows(model: Any) -> tuple[Tensor, Tensor]:
    """Two rows of token ids with the same beginning, spread over the lower half of the vocabulary.

    The lowest ids are often special tokens that were never trained, on which bfloat16 rounds by more than half.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(1, _LENGTH + 1) * max(1, vocabulary // (2 * _LENGTH)) % vocabulary
    return ids, torch.cat([ids[:_SHARED], ids[_SHARED:].flip(0)])


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(
        input_ids=ids.to(model.get_input_embeddings().weight.device), use_cache=False
    ).logits
    return logits.float()


def _agree(values: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether they agree up to rounding; NaN passes here and is reported later, with its example."""
    apart = (values - expected).abs().mean() / expected.abs().mean()
    return bool(apart.isnan()) or float(apart) <= (1e-3 if dtype in (torch.float32, torch.float64) else 0.1)
