"""Rotary embeddings whose factors depend on the longest row of a batch (LongRoPE, dynamic NTK).

Rows may share a batch only if each would have the same factors alone.
"""

from collections.abc import Callable
from typing import Any

_BY_LENGTH = "dynamic"
"""Part of the names of rope types whose factors differ for each length beyond the original one."""
_STRETCHED = ("linear", "yarn")
"""Rope types that scale all positions by one factor."""
_BY_SIDE = ("longrope", "su")
"""Rope types with one set of factors up to the original length and another beyond it."""


def longest(config: Any) -> int | None:
    """The model's longest sequence in tokens, from its configuration; None: not stated.

    Rope types that scale positions are often configured beside the original `max_position_embeddings`.
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return None
    stretched = [positions]
    for kind, part in _parts(config):
        factor, original = part.get("factor"), part.get("original_max_position_embeddings") or positions
        if isinstance(factor, int | float) and (_BY_LENGTH in kind or kind in _STRETCHED):
            stretched.append(int(factor * original))
    return max(stretched)


def length_class(model: Any) -> Callable[[int], tuple[int, ...]] | None:
    """A function from a row's length to a key for its factors; None: they do not depend on the length."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", 0)
    kinds: set[tuple[bool, int]] = set()
    """For each length-dependent embedding: whether it has two sets of factors, and the length at which they change."""
    for kind, part in _parts(config):
        if _BY_LENGTH in kind:
            kinds.add((False, int(positions)))  # where transformers changes the factors
        elif kind in _BY_SIDE:
            original = part.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            kinds.add((True, int(original or positions)))
    if not kinds:
        return None
    ordered = sorted(kinds)
    return lambda length: tuple(
        int(length > original) if side else max(length, original) for side, original in ordered
    )


def reset(model: Any) -> None:
    """Forget the longest row so far; dynamic factors would otherwise remain those of an earlier, longer row."""
    for module in model.modules():
        for prefix, kind in _types(module):
            original = getattr(module, f"{prefix}original_inv_freq", None)
            current = getattr(module, f"{prefix}inv_freq", None)
            if _BY_LENGTH in kind and original is not None and current is not None:
                module.register_buffer(f"{prefix}inv_freq", original.to(current.device), persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _types(module: Any) -> list[tuple[str, str]]:
    """Buffer prefix and rope type, one for the module or one for each type of layer."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        return [("", kinds)]
    return [(f"{layer}_", kind) for layer, kind in kinds.items()] if isinstance(kinds, dict) else []


def _parts(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """Rope type and settings of a text configuration: one, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    kinds = [(part.get("rope_type") or part.get("type"), part) for part in parts]
    return [(kind, part) for kind, part in kinds if isinstance(kind, str)]
