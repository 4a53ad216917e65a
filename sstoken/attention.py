"""Attention importance, captured inside the model's own forward pass.

An attention function is registered with transformers' attention interface. In every layer it computes the
output as usual; in the chosen one it also sums, for each response token, the attention that it pays to the
prompt. No layer's weights are ever held as a whole.

Shapes: B batch, H heads, T positions, D head size, R rows of a block.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sstoken.errors import SstokenError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "sstoken"
"""The name to load a model with: `attn_implementation=IMPLEMENTATION`."""
_SLOT = "_sstoken_capture"
BLOCK_ELEMENTS = 1 << 20
"""Attention weights alive at once, at most (4 MB in fp32), unless a single row has more."""


class AttentionCapture:
    """Captures the attention importance of one decoder layer.

    Example:
        >>> capture = AttentionCapture(model, layer=-1)
        >>> capture.expect(response_mask)
        >>> model(input_ids=input_ids)
        >>> importance = capture.take()
    """

    def __init__(self, model: "PreTrainedModel", layer: int = -1) -> None:
        """Attach to a model loaded with `attn_implementation=IMPLEMENTATION`.

        Args:
            model: a decoder model that uses transformers' attention interface.
            layer: index of the decoder layer, negative from the end.

        Raises:
            UsageError: there is no such layer.
        """
        num_layers = model.config.get_text_config().num_hidden_layers
        if not -num_layers <= layer < num_layers:
            raise UsageError(
                f"layer {layer}: the model has {num_layers} layers; legal is {-num_layers} to {num_layers - 1}"
            )
        self.layer = layer % num_layers
        self._modules = [m for m in model.modules() if getattr(m, "layer_idx", None) == self.layer]
        for module in self._modules:
            setattr(module, _SLOT, self)
        self._response_mask: Tensor | None = None
        self._importance: Tensor | None = None

    def expect(self, response_mask: Tensor) -> None:
        """Say which positions the next forward pass has to measure.

        Args:
            response_mask: [B, T] bool. Padding, if any, stands on the right.
        """
        self._response_mask, self._importance = response_mask, None

    def take(self) -> Tensor:
        """The importance measured by the last forward pass, [B, T] fp32, 0 off the response.

        Raises:
            SstokenError: the layer did not go through the attention interface.
        """
        importance, self._importance, self._response_mask = self._importance, None, None
        if importance is None:
            raise SstokenError(
                f"the attention of layer {self.layer} cannot be captured: it does not go through transformers' "
                "attention interface (linear attention or a custom model); choose another layer"
            )
        return importance

    def detach(self) -> None:
        """Leave the model as it was."""
        for module in self._modules:
            delattr(module, _SLOT)

    def measure(self, query: Tensor, key: Tensor, mask: Tensor | None, **how: Any) -> None:
        """Called by the attention function of the chosen layer."""
        if self._response_mask is not None:
            self._importance = prompt_attention(query, key, self._response_mask, mask, **how)


@torch.no_grad()
def prompt_attention(
    query: Tensor,
    key: Tensor,
    response_mask: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The attention mass of each response token on the prompt before it, mean over heads (paper, equation 5).

    The prompt of token i: the positions before i that are not response tokens.

    Args:
        query: [B, H, T, D], after rotary embedding.
        key: [B, H or fewer, T, D].
        response_mask: [B, T] bool.
        mask: [B or 1, 1 or H, T, T], True (or 0 if additive) where attended; None: causal.
        scaling: factor of the scores.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: [H], logits that take part in the softmax and attend to nothing.

    Returns:
        [B, T] in [0, 1], 0 off the response; fp32 (float64 where the model is).
    """
    num_heads, length = query.shape[1], query.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    importance = torch.zeros(response_mask.shape, dtype=dtype, device=query.device)
    block = max(1, BLOCK_ELEMENTS // (num_heads * length))
    for b in range(query.shape[0]):
        rows = response_mask[b].nonzero()[:, 0]
        if rows.numel() == 0:
            continue
        end = int(rows[-1]) + 1  # nothing after the last response token is attended to
        keys_HDT = repeat_kv(key[b : b + 1, :, :end].to(dtype), num_heads // key.shape[1])[0].transpose(1, 2)
        prompt_T = (~response_mask[b, :end]).to(dtype)
        for rows_R in rows.split(block):
            scores_HRT = query[b, :, rows_R].to(dtype) @ keys_HDT
            weights_HRT = _weights(
                scores_HRT, rows_R, None if mask is None else mask[b % mask.shape[0]], scaling, softcap, sinks
            )
            importance[b, rows_R] = (weights_HRT @ prompt_T).mean(0)
    return importance


def _weights(
    scores: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention weights [..., H, R, T] of the query rows [R], from raw products of the same shape."""
    length = scores.shape[-1]
    scores = scores * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        columns = torch.arange(length, device=scores.device)
        scores = scores.masked_fill(columns > rows[:, None], float("-inf"))
    else:
        seen = mask[..., rows, :length]
        scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def _attend_by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention output [B, T, H, D] where sdpa has no such option (soft-capping, sinks), block by block."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    rows = torch.arange(query.shape[2], device=query.device)
    block = max(1, BLOCK_ELEMENTS // (query.shape[0] * query.shape[1] * key.shape[2]))
    outputs = []
    for rows_R in rows.split(block):
        scores = (query[:, :, rows_R] @ key.transpose(2, 3)).to(
            torch.promote_types(query.dtype, torch.float32)
        )
        outputs.append(_weights(scores, rows_R, mask, scaling, softcap, sinks).to(value.dtype) @ value)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: sdpa's output, and the capture where one is attached."""
    softcap, sinks = kwargs.pop("softcap", None), kwargs.get("s_aux")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    capture: AttentionCapture | None = getattr(module, _SLOT, None)
    if capture is not None:
        capture.measure(query, key, attention_mask, scaling=scale, softcap=softcap, sinks=sinks)
    if softcap is not None or sinks is not None:
        return _attend_by_blocks(query, key, value, attention_mask, scale, softcap, sinks), None
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output, None


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
