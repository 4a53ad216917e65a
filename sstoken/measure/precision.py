"""Autocast is for training: measurements are computed in the dtype of their input."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function without gradients and with autocast off; its first argument is a tensor on the device to use.

    Autocast would round products to half precision, whatever dtype their factors were cast to.
    """

    @wraps(function)
    def measured(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        assert isinstance(first, Tensor)
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return measured


def cast_as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast floating tensors to the dtype in which autocast computes products; unchanged if autocast is off."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype != torch.float64 else t for t in tensors)
