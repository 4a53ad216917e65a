"""The last decoder layer's MLP for the rows that are read afterwards: no other position sees the rest.

Shapes: B batch, T positions, D hidden size, N rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sstoken.errors import UsageError
from sstoken.measure.token_loss import intercept_head

_NAMES = ("mlp", "feed_forward", "block_sparse_moe")


@dataclass
class WantedRows:
    """Which rows the next forward pass computes; None: all."""

    index: Tensor | None = None
    """[N] positions of the batch laid flat, b * T + t."""


@contextmanager
def wanted_rows(mlp: nn.Module | None) -> Iterator[WantedRows]:
    """Within this context the module computes the wanted rows of its input [B, T, D] and gives 0 for the others."""
    wanted = WantedRows()
    if mlp is None:
        yield wanted
        return

    shape = torch.Size()

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal shape
        if wanted.index is None:
            return None
        shape = args[0].shape
        return (args[0].flatten(0, 1).index_select(0, wanted.index)[None], *args[1:])

    def spread(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        if wanted.index is None:
            return None
        rows = output[0] if isinstance(output, tuple) else output
        full = rows.new_zeros(shape[0] * shape[1], rows.shape[-1])
        full = full.index_copy_(0, wanted.index, rows.flatten(0, -2)).view(*shape[:2], -1)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    handles = [mlp.register_forward_pre_hook(select), mlp.register_forward_hook(spread)]
    try:
        yield wanted
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a transformers model, in order; none where it is laid out otherwise."""
    lists = [m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList)]
    return list(lists[0]) if lists else []


def check_layer(layer: int, num_layers: int) -> None:
    """Refuse a decoder layer that the model does not have; negative counts from the end.

    Raises:
        UsageError: the layer, and what is legal.
    """
    if not -num_layers <= layer < num_layers:
        raise UsageError(
            f"layer {layer}: the model has {num_layers} layers; legal is {-num_layers} to {num_layers - 1}"
        )


@torch.no_grad()
def last_mlp(model: Any) -> nn.Module | None:
    """The last decoder layer's MLP, if the model's states at the wanted rows are the same without the others.

    Tried on a short sequence; an architecture that is laid out otherwise gives None.
    """
    layers = decoder_layers(model)
    found = [getattr(layers[-1], name, None) for name in _NAMES] if layers else []
    mlp = next((m for m in found if isinstance(m, nn.Module)), None)
    if mlp is None:
        return None
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(8, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    index = torch.tensor([1, 4, 6], device=device)
    states = []
    try:
        for rows in (None, index):
            with intercept_head(model) as head_input, wanted_rows(mlp) as wanted:
                wanted.index = rows
                model(input_ids=ids, use_cache=False)
            assert head_input.hidden is not None
            states.append(head_input.hidden[0, index].float())
    except Exception:  # an MLP that takes or gives something else may fail in any way
        return None
    close = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    return mlp if torch.allclose(states[0], states[1], rtol=close, atol=close) else None
