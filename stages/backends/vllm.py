"""The vLLM backend: losses and prompt attention.

`vllm_limits` says which checkpoints it supports, `vllm_engine` drives vLLM in a process of its own (`vllm_process`),
and `vllm_attention` captures attention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.signals import ATTENTION, LOSS, get_signals
from sstoken.stages.backends import Backend, BackendOptions, Latest, Measured
from sstoken.stages.backends import vllm_limits as limits
from sstoken.stages.backends.vllm_engine import MOST_TOP, EngineSpec, Request
from sstoken.stages.backends.vllm_process import Engine
from sstoken.stages.checkpoints import adapter_base, local_folder, place, stamp

_BATCH_TOKENS = 8192
"""Default of `batch_tokens`."""
_CALL_BATCHES = 16
"""Batches in one call of vLLM: many, since the last one is seldom full."""
SMALLEST_ROOM = 1024
"""Shortest sequence length that vLLM is started for."""
_SMALLEST_CACHE = 1 << 30


ALONE = "loss_unconditional"
_TOP = {"max_prob": 1, "entropy_top20": MOST_TOP}
"""Signals that come from the likeliest tokens, and how many each needs."""


class VllmBackend(Backend):
    """Signals from vLLM."""

    settings = limits.VllmSettings
    several_workers = False
    signals = frozenset({LOSS, ATTENTION, ALONE, *_TOP})

    @classmethod
    def refusal(cls, options: BackendOptions) -> str | None:
        """See `Backend.refusal`."""
        return limits.refusal(options, limits.read(options))

    def __init__(self, options: BackendOptions) -> None:
        """Prepare the engine; vLLM starts with the first sequences, whose length decides its memory."""
        settings = limits.read(options)
        full = adapter_base(options.checkpoint) or options.checkpoint
        self._config = limits.load_config(full, options.trust_remote_code)
        self._options = options
        self._batch_tokens = options.batch_tokens or _BATCH_TOKENS
        self._attention = [signal.name for signal in options.attention_signals]
        captured = bool(self._attention) and settings.attention == "vllm"
        spec = engine_spec(
            options,
            self._config,
            settings,
            layer=limits.attention_layer(options, self._config) if captured else None,
            cache_tokens=2 * max(self._batch_tokens, self.max_length or 0),
        )
        self._engine = make_engine(spec, options)
        self._adapter = numbered_adapter(options)
        self._other: Backend | None = None
        if self._attention and not captured:
            from sstoken.stages.backends.hf import HFBackend

            self._other = HFBackend(replace(options, settings=(), signals=tuple(self._attention)))

    @property
    def vocab_size(self) -> int:
        """See `Backend.vocab_size`."""
        return int(self._config.vocab_size)

    @property
    def max_length(self) -> int | None:
        """See `Backend.max_length`."""
        return limits.max_length(self._config)

    @property
    def dtype(self) -> str:
        """See `Backend.dtype`."""
        return limits.dtype_name(self._options, self._config)

    @property
    def attention_layers(self) -> dict[str, int]:
        """See `Backend.attention_layers`."""
        if self._other is not None:
            return self._other.attention_layers
        layer = limits.attention_layer(self._options, self._config) if self._attention else None
        return {} if layer is None else dict.fromkeys(self._attention, layer)

    def measure(
        self, sequences: Sequence[NDArray[np.int32]], response_masks: Sequence[NDArray[np.bool_]]
    ) -> Iterator[tuple[int, Measured]]:
        """See `Backend.measure`."""
        captured = self._attention if self._other is None else []
        names = [name for name in self._options.signals if name in (LOSS, *_TOP, *captured)]
        rest: list[Measured] = [{} for _ in sequences]
        if ALONE in self._options.signals:
            from sstoken.measure.second_pass import losses_alone  # loads torch

            def measure(
                responses: list[NDArray[np.int32]], masks: list[NDArray[np.bool_]], indices: list[int]
            ) -> Iterator[tuple[int, Measured]]:
                return self._measure(responses, masks, [LOSS])

            alone = losses_alone(sequences, response_masks, measure)
            rest = [{ALONE: losses} for losses in alone]
        if self._other is not None:
            for index, signals in self._other.measure(sequences, response_masks):
                rest[index] |= signals
        if not names:
            yield from enumerate(rest)
            return
        for index, signals in self._measure(sequences, response_masks, names):
            yield index, signals | rest[index]

    def _measure(
        self,
        sequences: Sequence[NDArray[np.int32]],
        response_masks: Sequence[NDArray[np.bool_]],
        names: Sequence[str],
    ) -> Iterator[tuple[int, Measured]]:
        """The signals of those names, of every sequence."""
        top = max((_TOP[name] for name in names if name in _TOP), default=0)
        for i, mask in enumerate(response_masks):
            if not mask.any():
                yield i, {name: np.zeros(0, np.float32) for name in names}
        room = room_for(max((ids.size for ids in sequences), default=0), self.max_length)
        for indices in self._calls(sequences, response_masks):
            masks = [response_masks[i] for i in indices]
            reply = self._engine.ask(
                Request([sequences[i] for i in indices], masks, self._adapter, LOSS in names, top), room
            )
            for row, i in enumerate(indices):
                signals: Measured = {} if reply.losses is None else {LOSS: reply.losses[row]}
                if reply.attention is not None:
                    signals |= dict.fromkeys(self._attention, reply.attention[row])
                if reply.top is not None:
                    signals |= _of_top(reply.top[row])
                yield i, {name: signals[name] for name in names}

    def _calls(
        self, sequences: Sequence[NDArray[np.int32]], response_masks: Sequence[NDArray[np.bool_]]
    ) -> Iterator[list[int]]:
        """Yield the indices of sequences with response tokens, in calls of bounded size."""
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


def room_for(longest: int, max_length: int | None) -> int:
    """Return the length to start vLLM for: later sequences should seldom exceed it."""
    room = max(SMALLEST_ROOM, 1 << (longest - 1).bit_length())
    return room if max_length is None else min(room, max_length)


def _of_top(log_p: NDArray[np.float32]) -> Measured:
    """Signals of the likeliest tokens' log-probabilities [n, K]; the entropy is that of 20 only where K is 20."""
    among = log_p - np.logaddexp.reduce(log_p.astype(np.float64), axis=1, keepdims=True)
    entropy = -(np.exp(among) * among).sum(1).clip(max=0)
    return {"max_prob": np.exp(log_p[:, 0]).clip(max=1), "entropy_top20": entropy.astype(np.float32)}


def preferred(options: BackendOptions) -> bool:
    """Return whether `auto` means vLLM: on a GPU, for signals it measures and an architecture it was tested on."""
    if find_spec("vllm") is None or options.device.partition(":")[0] not in ("auto", "cuda"):
        return False
    if not {signal.base for signal in get_signals(options.signals)} <= {LOSS, ATTENTION}:
        return False
    import torch

    if not torch.cuda.is_available() or VllmBackend.refusal(options) is not None:
        return False
    full = adapter_base(options.checkpoint) or options.checkpoint
    config = limits.load_config(full, options.trust_remote_code)
    return not limits.TESTED_ARCHITECTURES.isdisjoint(config.architectures or ())


@Latest
def _engine(spec: EngineSpec, device: str, log: Path | None, stamp: tuple[Any, ...]) -> Engine:
    """Return this process's engine, shared by adapters; a new `stamp` means that the base's files have changed."""
    return Engine(spec, device, log)


_adapters = count(1)
"""vLLM identifies adapters by number."""


def engine_spec(
    options: BackendOptions,
    config: Any,
    settings: limits.VllmSettings,
    *,
    layer: int | None,
    cache_tokens: int,
    prefix_caching: bool = False,
) -> EngineSpec:
    """Return the engine's specification for a checkpoint, with `longest` still 0.

    Args:
        options: the checkpoint, and how to run it.
        config: its configuration.
        settings: the backend's own settings.
        layer: decoder layer to capture attention of; None: capture none.
        cache_tokens: tokens that the key-value cache must hold, on a CPU.
        prefix_caching: see `EngineSpec`.
    """
    base = adapter_base(options.checkpoint)
    model, revision = place(base or options.checkpoint)
    return EngineSpec(
        model=model,
        revision=revision,
        layer=layer,
        dtype=limits.dtype_name(options, config),
        longest=0,
        batch_tokens=options.batch_tokens or _BATCH_TOKENS,
        lora_rank=None if base is None else limits.lora_rank(options.checkpoint),
        lora_modules=() if base is None else limits.lora_modules(options.checkpoint),
        tensor_parallel_size=settings.tensor_parallel_size,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        quantization=settings.quantization,
        trust_remote_code=options.trust_remote_code,
        cpu_cache_bytes=max(_SMALLEST_CACHE, limits.cache_bytes(config, cache_tokens)),
        prefix_caching=prefix_caching,
    )


def make_engine(spec: EngineSpec, options: BackendOptions) -> Engine:
    """Return an engine of that specification: the running one, if it is the same."""
    log = None if options.log_folder is None else options.log_folder / "vllm.log"
    return _engine(spec, options.device, log, stamp(adapter_base(options.checkpoint) or options.checkpoint))


def numbered_adapter(options: BackendOptions) -> tuple[int, str] | None:
    """Return a new number and the folder of an adapter; None for a full checkpoint."""
    if adapter_base(options.checkpoint) is None:
        return None
    return next(_adapters), str(local_folder(options.checkpoint))
