"""Choose one of several implementations of a function by trial: the first that gives right numbers on this machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor]
Trial = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a call."""


@dataclass(frozen=True)
class Choice:
    """The implementation taken."""

    name: str
    """Its name, for the user."""
    reason: str
    """Why it was chosen: that it agrees with the reference, and what was wrong with those before it."""
    call: Function


def first_that_agrees(
    candidates: Mapping[str, Function], reference: tuple[str, Function], trials: Sequence[Trial]
) -> Choice:
    """Try the candidates in turn on small inputs, on the device and in the dtype where they will be used.

    Args:
        candidates: by name, the preferred one first. One that raises anything is passed over.
        reference: name and function; its results in float64 on the CPU are what is expected.
        trials: calls to compare; their results should be of order 1.

    Returns:
        The first candidate that agrees in every trial, else the reference.
    """
    name, function = reference
    expected = [function(*_exact(args), **_exact(named)) for args, named in trials]
    passed_over = []
    for candidate, call in candidates.items():
        try:
            error = max(
                _error(call(*args, **named), right)
                for (args, named), right in zip(trials, expected, strict=True)
            )
        except Exception as failure:  # a kernel that does not run here may fail in any way
            lines = str(failure).strip().splitlines() or [type(failure).__name__]
            passed_over.append(f"{candidate}: {lines[0][:120]}")
            continue
        if error <= 1.0:
            return Choice(candidate, "; ".join([f"agrees with {name} within rounding", *passed_over]), call)
        passed_over.append(f"{candidate}: differs from {name} by {error:.3g} times what rounding explains")
    return Choice(name, "; ".join(passed_over) or "nothing else was tried", function)


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a multiple of the dtype's tolerance; infinite for NaN."""
    found = found.cpu()
    if found.shape != expected.shape:
        raise ValueError(f"gives the shape {list(found.shape)}, not {list(expected.shape)}")
    worst = (found.double() - expected).abs().max().item() if found.numel() else 0.0
    return float("inf") if worst != worst else worst / _TOLERANCE[found.dtype]


_TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def _exact(value: Any) -> Any:
    """Return the same arguments on the CPU, floating point in float64."""
    if isinstance(value, Tensor):
        return value.cpu().double() if value.is_floating_point() else value.cpu()
    if isinstance(value, tuple):
        return tuple(_exact(item) for item in value)
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    return value
