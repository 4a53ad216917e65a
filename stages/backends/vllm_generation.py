"""Generation with vLLM: prefix caching keeps the keys and values that branches of one sequence share."""

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from sstoken.errors import UsageError
from sstoken.measure.branches import Branch, Continuation, IdArray
from sstoken.stages.backends import BackendOptions
from sstoken.stages.backends import vllm_limits as limits
from sstoken.stages.backends.generation import Generator
from sstoken.stages.backends.vllm import SMALLEST_ROOM, engine_spec, make_engine, numbered_adapter, room_for
from sstoken.stages.backends.vllm_generating import MOST_CANDIDATES, Generated, Prefixes
from sstoken.stages.checkpoints import adapter_base

_ROWS_IN_CACHE = 64
"""Sequences of the smallest room that the key-value cache holds at a time, on a CPU."""
_CALL_TOKENS = 1 << 20
"""Most tokens of prefixes in one call of vLLM."""


class VllmGenerator(Generator):
    """Greedy generation from vLLM."""

    def __init__(self, options: BackendOptions) -> None:
        """Prepare the engine; vLLM starts with the first prefixes."""
        full = adapter_base(options.checkpoint) or options.checkpoint
        self._config = limits.load_config(full, options.trust_remote_code)
        spec = engine_spec(
            options,
            self._config,
            limits.read(options),
            layer=None,
            cache_tokens=_ROWS_IN_CACHE * min(SMALLEST_ROOM, self.max_length or SMALLEST_ROOM),
            prefix_caching=True,
        )
        self._engine = make_engine(spec, options)
        self._adapter = numbered_adapter(options)
        self.reused = self.asked = 0
        """Tokens of prefixes found in the cache, and in total."""

    @property
    def vocab_size(self) -> int:
        """See `Generator.vocab_size`."""
        return int(self._config.vocab_size)

    @property
    def max_length(self) -> int | None:
        """See `Generator.max_length`."""
        return limits.max_length(self._config)

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
        room = room_for(longest, self.max_length)
        start = 0
        while start < len(prefixes):
            end, tokens = start, 0
            while end < len(prefixes) and (end == start or tokens + prefixes[end].size <= _CALL_TOKENS):
                tokens += prefixes[end].size
                end += 1
            request = Prefixes(prefixes[start:end], stop, tuple(rooms[start:end]), candidates, self._adapter)
            generated = self._engine.ask(request, room).generated
            assert generated is not None
            self.reused += sum(g.reused for g in generated)
            self.asked += tokens
            yield from enumerate(generated, start)
            start = end
