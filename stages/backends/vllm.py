"""The vLLM backend: losses and attention importance from the engine that people serve with.

What it takes stands in `vllm_limits`; what vLLM is told in `vllm_engine`, which runs in a process of its own
(`vllm_process`); how attention is captured in `vllm_attention`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.stages.backends import Backend, BackendOptions, FloatArray, Latest, TokenSignals, read_settings
from sstoken.stages.backends import vllm_limits as limits
from sstoken.stages.backends.vllm_engine import EngineSpec, Request
from sstoken.stages.backends.vllm_process import Engine
from sstoken.stages.checkpoints import adapter_base, local_folder, stamp
from sstoken.stages.hub_models import split_revision

_BATCH_TOKENS = 8192
"""Where none are given."""
_CALL_BATCHES = 16
"""Batches in one call of vLLM: its last one is seldom full."""
_SMALLEST_ROOM = 1024
_SMALLEST_CACHE = 1 << 30


class VllmBackend(Backend):
    """Signals from vLLM."""

    settings = limits.VllmSettings
    several_workers = False

    @classmethod
    def refusal(cls, options: BackendOptions) -> str | None:
        """See `Backend.refusal`."""
        return limits.refusal(options, _settings(options))

    def __init__(self, options: BackendOptions) -> None:
        """vLLM starts with the first sequences: how long they are decides what it makes room for."""
        settings = _settings(options)
        base = adapter_base(options.checkpoint)
        full = base or options.checkpoint
        self._config = limits.load_config(full, options.trust_remote_code)
        self._options = options
        self._batch_tokens = options.batch_tokens or _BATCH_TOKENS
        captured = options.attention and settings.attention == "vllm"
        folder = local_folder(full)
        model, revision = split_revision(full) if folder is None else (str(folder), None)
        spec = EngineSpec(
            model=model,
            revision=revision,
            layer=limits.attention_layer(options, self._config) if captured else None,
            dtype=limits.dtype_name(options, self._config),
            longest=0,
            batch_tokens=self._batch_tokens,
            lora_rank=None if base is None else limits.lora_rank(options.checkpoint),
            lora_modules=() if base is None else limits.lora_modules(options.checkpoint),
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            quantization=settings.quantization,
            trust_remote_code=options.trust_remote_code,
            cpu_cache_bytes=max(
                _SMALLEST_CACHE,
                limits.cache_bytes(self._config, 2 * max(self._batch_tokens, self.max_length or 0)),
            ),
        )
        log = None if options.log_folder is None else options.log_folder / "vllm.log"
        self._engine = _engine(spec, options.device, log, stamp(full))
        self._adapter = None if base is None else (next(_adapters), str(local_folder(options.checkpoint)))
        self._other: Backend | None = None
        if options.attention and not captured:
            from sstoken.stages.backends.hf import HFBackend

            self._other = HFBackend(replace(options, settings=(), loss=False))

    @property
    def vocab_size(self) -> int:
        """As the model's configuration says."""
        return int(self._config.vocab_size)

    @property
    def max_length(self) -> int | None:
        """Positions that the model was made for."""
        length: int | None = getattr(self._config, "max_position_embeddings", None)
        return length

    @property
    def attention_layer(self) -> int | None:
        """See `Backend.attention_layer`."""
        if self._other is not None:
            return self._other.attention_layer
        return limits.attention_layer(self._options, self._config) if self._options.attention else None

    def measure(
        self, sequences: Sequence[NDArray[np.int32]], response_masks: Sequence[NDArray[np.bool_]]
    ) -> Iterator[tuple[int, TokenSignals]]:
        """See `Backend.measure`."""
        if self._other is None:
            yield from self._measure(sequences, response_masks)
            return
        losses = {index: signals.loss for index, signals in self._measure(sequences, response_masks)}
        for index, signals in self._other.measure(sequences, response_masks):
            yield index, TokenSignals(losses.pop(index), signals.attention)

    def _measure(
        self, sequences: Sequence[NDArray[np.int32]], response_masks: Sequence[NDArray[np.bool_]]
    ) -> Iterator[tuple[int, TokenSignals]]:
        captured = self._options.attention and self._other is None
        for i, mask in enumerate(response_masks):
            if not mask.any():
                nothing = np.full(mask.size, np.nan, np.float32)
                yield i, TokenSignals(nothing, nothing if captured else None)
        room = self._room(max((ids.size for ids in sequences), default=0))
        for indices in self._calls(sequences, response_masks):
            masks = [response_masks[i] for i in indices]
            request = Request([sequences[i] for i in indices], masks, self._adapter, self._options.loss)
            reply = self._engine.score(request, room)
            for row, (i, mask) in enumerate(zip(indices, masks, strict=True)):
                loss = np.full(mask.size, np.nan, np.float32)
                if reply.losses is not None:
                    loss = _scatter(reply.losses[row], mask)
                attention = None if reply.importance is None else _scatter(reply.importance[row], mask)
                yield i, TokenSignals(loss, attention)

    def _calls(
        self, sequences: Sequence[NDArray[np.int32]], response_masks: Sequence[NDArray[np.bool_]]
    ) -> Iterator[list[int]]:
        """The sequences in which there is something to measure, in calls of bounded size."""
        call: list[int] = []
        tokens = 0
        for i, ids in enumerate(sequences):
            if not response_masks[i].any():
                continue
            if call and tokens + ids.size > _CALL_BATCHES * self._batch_tokens:
                yield call
                call, tokens = [], 0
            call.append(i)
            tokens += ids.size
        if call:
            yield call

    def _room(self, longest: int) -> int:
        """A length to start vLLM for which sequences to come will seldom exceed."""
        room = max(_SMALLEST_ROOM, 1 << (longest - 1).bit_length())
        return room if self.max_length is None else min(room, self.max_length)


def preferred(options: BackendOptions) -> bool:
    """Whether `auto` means vLLM: on a GPU, for an architecture that it was compared with transformers on."""
    if find_spec("vllm") is None or options.device.partition(":")[0] not in ("auto", "cuda"):
        return False
    import torch

    if not torch.cuda.is_available() or VllmBackend.refusal(options) is not None:
        return False
    full = adapter_base(options.checkpoint) or options.checkpoint
    config = limits.load_config(full, options.trust_remote_code)
    return not limits.TESTED_ARCHITECTURES.isdisjoint(config.architectures or ())


@Latest
def _engine(spec: EngineSpec, device: str, log: Path | None, stamp: tuple[Any, ...]) -> Engine:
    """One engine per process; the adapters of a base share it. `stamp` tells when the base's files have changed."""
    return Engine(spec, device, log)


_adapters = count(1)
"""vLLM knows adapters by number."""


def _settings(options: BackendOptions) -> limits.VllmSettings:
    settings = read_settings("vllm", options)
    assert isinstance(settings, limits.VllmSettings)
    return settings


def _scatter(values: FloatArray, mask: NDArray[np.bool_]) -> FloatArray:
    scattered = np.full(mask.size, np.nan, dtype=np.float32)
    scattered[mask] = values
    return scattered
