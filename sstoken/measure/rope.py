"""Rotary embeddings whose factors depend on the longest row of a batch (LongRoPE, dynamic NTK).

Rows share a batch only where each would have the same factors alone.
"""

from collections.abc import Callable
from typing import Any

_BY_LENGTH = "dynamic"
"""Part of the names of kinds with factors of their own for each length beyond the original one."""
_STRETCHED = ("linear", "yarn")
"""Kinds that stretch all positions by a factor."""
_BY_SIDE = ("longrope", "su")
"""Kinds with one set of factors up to the original length, and another beyond."""


def longest(config: Any) -> int | None:
    """How many tokens a model was made for, by its configuration; None: it does not say.

    Kinds that stretch positions by a factor are often configured beside the original `max_position_embeddings`.
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
    """What decides the factors for a row of so many tokens; None: the length does not matter."""
    kinds = sorted(set(_kinds(model)))
    if not kinds:
        return None
    return lambda length: tuple(
        int(length > original) if side else max(length, original) for side, original in kinds
    )


def reset(model: Any) -> None:
    """Forget the longest row so far: dynamic factors would stay those of an earlier, longer one."""
    for module in model.modules():
        for prefix, kind in _types(module):
            original = getattr(module, f"{prefix}original_inv_freq", None)
            current = getattr(module, f"{prefix}inv_freq", None)
            if _BY_LENGTH in kind and original is not None and current is not None:
                module.register_buffer(f"{prefix}inv_freq", original.to(current.device), persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _types(module: Any) -> list[tuple[str, str]]:
    """The prefix of its buffers and the kind, one of the module or one for each kind of layer."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        return [("", kinds)]
    return [(f"{layer}_", kind) for layer, kind in kinds.items()] if isinstance(kinds, dict) else []


def _kinds(model: Any) -> list[tuple[bool, int]]:
    """For each length-dependent embedding, whether it has two sets of factors, and up to which length one holds."""
    config = model.config.get_text_config()
    found = []
    for kind, part in _parts(config):
        if not (kind in _BY_SIDE or _BY_LENGTH in kind):
            continue
        positions = getattr(config, "max_position_embeddings", 0)
        original = part.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if _BY_LENGTH in kind:
            original = positions  # transformers grows the factors from here on
        found.append((kind in _BY_SIDE, int(original or positions)))
    return found


def _parts(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """The kind and settings of a text configuration's rotary embeddings: one, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    kinds = [(part.get("rope_type") or part.get("type"), part) for part in parts]
    return [(kind, part) for kind, part in kinds if isinstance(kind, str)]
