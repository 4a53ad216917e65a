"""The vLLM backend: losses, prompt attention and generation.

`vllm_limits` says which checkpoints it supports, `vllm_engine` drives vLLM in a process of its own (`vllm_process`),
and `vllm_attention` captures attention.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sstoken.errors import UsageError
from sstoken.measure.batching import plan_packed
from sstoken.measure.branches import Branch, Continuation, IdArray
from sstoken.signals import ATTENTION, LOSS, get_signals
from sstoken.stages.backends import Backend, BackendOptions, Measured
from sstoken.stages.backends import vllm_limits as limits
from sstoken.stages.backends.generation import Generator
from sstoken.stages.backends.vllm_engine import MOST_TOP, Request
from sstoken.stages.backends.vllm_generation import MOST_CANDIDATES, Generated, Prefixes
from sstoken.stages.backends.vllm_process import VllmModel
from sstoken.stages.checkpoints import adapter_base

_CALL_BATCHES = 16
"""Batches in one call of vLLM: many, since the last one is seldom full."""
_CALL_TOKENS = 1 << 20
"""Most tokens of prefixes in one call of vLLM."""
_ALONE = "loss_unconditional"
_TOP = {"max_prob": 1, "entropy_top20": MOST_TOP}
"""Signals that come from the likeliest tokens, and how many each needs."""


class VllmBackend(VllmModel, Backend):
    """Signals from vLLM."""

    settings = limits.VllmSettings
    several_workers = False
    signals = frozenset({LOSS, ATTENTION, _ALONE, *_TOP})

    @classmethod
    def refusal(cls, options: BackendOptions) -> str | None:
        """See `Backend.refusal`."""
        return limits.refusal(options, limits.read(options))

    @classmethod
    def preferred(cls, options: BackendOptions) -> bool:
        """See `Backend.preferred`: on a GPU, for signals that it measures and an architecture it was tested on."""
        if options.device.partition(":")[0] not in ("auto", "cuda"):
            return False
        if not {signal.base for signal in get_signals(options.signals)} <= {LOSS, ATTENTION}:
            return False
        import torch

        if not torch.cuda.is_available() or cls.refusal(options) is not None:
            return False
        full = adapter_base(options.checkpoint) or options.checkpoint
        config = limits.load_config(full, options.trust_remote_code)
        return not limits.TESTED_ARCHITECTURES.isdisjoint(config.architectures or ())

    def __init__(self, options: BackendOptions) -> None:
        """Prepare the engine, and load transformers' model too if that measures attention."""
        self._attention = [signal.name for signal in options.attention_signals]
        captures = bool(self._attention) and limits.read(options).attention == "vllm"
        super().__init__(options, captures=captures)
        self._other: Backend | None = None
        if self._attention and not captures:
            from sstoken.stages.backends.hf import HFBackend

            self._other = HFBackend(replace(options, settings=(), signals=tuple(self._attention)))

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
        if _ALONE in self._options.signals:
            from sstoken.measure.second_pass import losses_alone  # loads torch

            alone = losses_alone(
                sequences, response_masks, lambda responses, masks, _: self._measure(responses, masks, [LOSS])
            )
            rest = [{_ALONE: losses} for losses in alone]
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
        """Yield the index and the named signals of every sequence."""
        top = max((_TOP[name] for name in names if name in _TOP), default=0)
        room = self._room_for(max((ids.size for ids in sequences), default=0))
        responding = [i for i, mask in enumerate(response_masks) if mask.any()]
        for i, mask in enumerate(response_masks):
            if not mask.any():
                yield i, {name: np.zeros(0, np.float32) for name in names}
        for call in plan_packed([sequences[i].size for i in responding], _CALL_BATCHES * self._batch_tokens):
            indices = [responding[i] for i in call]
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


class VllmGenerator(VllmModel, Generator):
    """Greedy generation from vLLM."""

    def __init__(self, options: BackendOptions) -> None:
        """Prepare the engine."""
        super().__init__(options, generates=True)
        self.reused = self.asked = 0
        """Tokens of prefixes found in the cache, and in total."""

    @property
    def remark(self) -> str:
        """The version of vLLM."""
        return f"vLLM {limits.installed_version()}, prefix caching"

    def candidates(
        self, sequences: Sequence[IdArray], positions: Sequence[IdArray], count: int
    ) -> list[IdArray]:
        """See `Generator.candidates`. Makes a request per position, most of whose prefix is in the cache."""
        if count > MOST_CANDIDATES:
            raise UsageError(f"{count} candidates for a position; vLLM returns at most {MOST_CANDIDATES}")
        prefixes = [ids[:at] for ids, some in zip(sequences, positions, strict=True) for at in some]
        found = iter(list(self._generate(prefixes, [1] * len(prefixes), (), candidates=count)))
        return [
            np.array([next(found)[1].ids for _ in some], np.int32).reshape(-1, count) for some in positions
        ]

    def continue_greedily(
        self,
        sequences: Sequence[IdArray],
        branches: Sequence[Branch],
        stop: Collection[int],
        max_new_tokens: int,
    ) -> Iterator[tuple[int, Continuation]]:
        """See `Generator.continue_greedily`."""
        prefixes, rooms, indices = [], [], []
        for index, branch in enumerate(branches):
            own = [] if branch.token is None else [branch.token]
            prefix = np.array([*sequences[branch.sequence][: branch.length], *own], np.int32)
            room = max_new_tokens
            if self.max_length is not None:
                room = min(room, self.max_length - prefix.size)
            if branch.token in stop or room < 1:
                yield index, Continuation(np.zeros(0, np.int32), branch.token in stop)
                continue
            prefixes.append(prefix)
            rooms.append(room)
            indices.append(index)
        for place, generated in self._generate(prefixes, rooms, tuple(sorted(stop)), candidates=0):
            yield indices[place], Continuation(generated.ids, generated.ended)

    def _generate(
        self, prefixes: list[IdArray], rooms: list[int], stop: tuple[int, ...], *, candidates: int
    ) -> Iterator[tuple[int, Generated]]:
        longest = max((p.size + room for p, room in zip(prefixes, rooms, strict=True)), default=0)
        for call in plan_packed([prefix.size for prefix in prefixes], _CALL_TOKENS):
            some = [prefixes[i] for i in call]
            request = Prefixes(some, stop, tuple(rooms[i] for i in call), candidates, self._adapter)
            generated = self._engine.ask(request, self._room_for(longest)).generated
            assert generated is not None
            self.reused += sum(g.reused for g in generated)
            self.asked += sum(prefix.size for prefix in some)
            yield from zip(call, generated, strict=True)


def _of_top(log_p: NDArray[np.float32]) -> Measured:
    """Return the signals that follow from the likeliest tokens' log-probabilities [n, K]; the entropy needs K = 20."""
    among = log_p - np.logaddexp.reduce(log_p.astype(np.float64), axis=1, keepdims=True)
    entropy = -(np.exp(among) * among.clip(min=-1000)).sum(1).clip(max=0)  # 0 * -inf would be NaN
    return {"max_prob": np.exp(log_p[:, 0]).clip(max=1), "entropy_top20": entropy.astype(np.float32)}
