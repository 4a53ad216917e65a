"""Batches without padding: several sequences, one after the other, through a transformers model.

The attention function registered here keeps sequences apart by where they start, and the mask function beside it
builds no mask. transformers passes the sequence starts and a layer's window, soft-cap and sinks to the attention
function as arguments, as it does for flash attention.

`check_packed` refuses, with the reason: architectures that transformers does not run with flash attention either,
chunked attention, layers other than attention (they carry their state from one sequence into the next), masks of an
architecture's own, and any model whose hidden states change. These take padded batches.

Shapes: B batch, H heads, K key-value heads, T positions, N positions of a packed batch, D head size, S sequences.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sstoken.errors import SstokenError
from sstoken.measure.capture import IMPLEMENTATION
from sstoken.measure.cuda.agreement import Choice
from sstoken.measure.cuda.varlen import choose_varlen, varlen_attention
from sstoken.measure.rope import length_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION_PACKED = "sstoken_packed"
"""Its name, for `attn_implementation`: packed batches, and right-padded ones, without any mask."""
_KINDS = {"full_attention", "sliding_attention"}
_CHECKED_LENGTHS = (11, 1, 23, 5)


def packed_inputs(sequences: Sequence[Tensor], device: torch.device | str) -> dict[str, Any]:
    """Return the arguments with which a model runs on sequences of token ids [T], none of them empty.

    `input_ids` and `position_ids` [1, N], `cu_seq_lens_q` and `cu_seq_lens_k` [S + 1] int32, `max_length_q` and
    `max_length_k`, `use_cache`.
    """
    lengths = [len(ids) for ids in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    return {
        "input_ids": torch.cat([ids.long() for ids in sequences])[None].to(device, non_blocking=True),
        "position_ids": positions[None].to(device, non_blocking=True),
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered as `IMPLEMENTATION_PACKED`. Without sequence starts, each row is one sequence.

    Raises:
        SstokenError: the model brought a mask or a bias of its own, or attends to something else than itself.
    """
    batch, _, length, head_size = query.shape
    if attention_mask is not None or kwargs.get("position_bias") is not None or key.shape[2] != length:
        raise SstokenError(
            f"{type(module).__name__}: its attention needs a mask of its own; it cannot be packed"
        )
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise SstokenError(f"{type(module).__name__}: its attention is not causal; it cannot be packed")
    offsets, max_length = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q", length)
    if offsets is None:
        offsets = torch.arange(batch + 1, device=query.device, dtype=torch.int32) * length
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    output = varlen_attention(
        query,
        key,
        value,
        offsets,
        max_length,
        scaling=head_size**-0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return output.unflatten(0, (batch, length)), None


def _no_mask(**how: Any) -> None:
    """The mask function registered as `IMPLEMENTATION_PACKED`.

    Raises:
        SstokenError: there is more to the mask than causality, sequences and a window.
    """
    if how.get("use_vmap") or how.get("attention_mask") is not None:
        raise SstokenError("its attention needs a mask of its own; it cannot be packed")


def describe_packed(model: "PreTrainedModel") -> list[Choice]:
    """Return the attention implementations that a packed batch would use on the model's device."""
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) is not None
    windows = {kind == "sliding_attention" for kind in kinds} if kinds else {window}
    return [
        choose_varlen(
            model.device, model.dtype, heads, key_heads, head_size, window=window,
            softcap=getattr(config, "attn_logit_softcapping", None),
            sinks=any(hasattr(module, "sinks") for module in model.modules()),
        )
        for window in sorted(windows)
    ]  # fmt: skip


@torch.inference_mode()
def check_packed(model: "PreTrainedModel") -> str | None:
    """Return why the model cannot take packed batches; None: it can.

    Runs a short packed batch, and its sequences one by one with the masks that the architecture asks for. Leaves the
    model's attention implementation as it was.
    """
    config: Any = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds))}"
    if getattr(config, "attention_chunk_size", None):
        return "its attention works in chunks"
    if not getattr(model, "_supports_flash_attn", False):
        return f"transformers does not run {type(model).__name__} without masks"
    before = config._attn_implementation
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    kind = length_class(model) or (lambda length: ())
    lengths = [n for n in _CHECKED_LENGTHS if kind(n) == kind(_CHECKED_LENGTHS[0])]
    sequences = [torch.randint(int(vocabulary), (n,), generator=generator) for n in lengths]
    body: Any = model.get_decoder()
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        alone = [body(ids[None].to(model.device), use_cache=False)[0][0] for ids in sequences]
        model.set_attn_implementation(IMPLEMENTATION_PACKED)
        packed = body(**packed_inputs(sequences, model.device))[0][0]
    except Exception as error:  # an architecture that was not made for this may fail in any way
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0]
    finally:
        model.set_attn_implementation(before)
    expected = torch.cat(alone).float()
    apart = float((packed.float() - expected).abs().mean() / expected.abs().mean())
    allowed = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    if not apart <= allowed:
        return f"a packed batch gives hidden states that are {apart:.2g} of their size apart from single sequences"
    return None


AttentionInterface.register(IMPLEMENTATION_PACKED, packed_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION_PACKED, _no_mask)
