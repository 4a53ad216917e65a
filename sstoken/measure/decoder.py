"""The decoder layers of a transformers model."""

from typing import Any

from torch import nn

from sstoken.errors import UsageError


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a transformers model, in order; none if it has no list of layers."""
    lists = [m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList)]
    return list(lists[0]) if lists else []


def check_layer(layer: int, num_layers: int) -> None:
    """Refuse a decoder layer that the model does not have; negative numbers count from the end.

    Raises:
        UsageError: no such layer; gives the legal range.
    """
    if not -num_layers <= layer < num_layers:
        raise UsageError(
            f"layer {layer}: the model has {num_layers} layers; legal is {-num_layers} to {num_layers - 1}"
        )
