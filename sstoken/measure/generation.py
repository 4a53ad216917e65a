"""Greedy generation with a transformers model: many branches of a few sequences, whose shared prefixes run once.

Shapes: B rows of a batch, N cached positions, H key-value heads, D head size, V vocabulary.
"""

import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sstoken.errors import SstokenError
from sstoken.measure import rope
from sstoken.measure.architecture import examine
from sstoken.measure.branches import Branch, Continuation, IdArray
from sstoken.measure.memory import free_memory, is_out_of_memory

_TIES = 16
"""Extra candidates to sort, so that lower ids win among equally likely ones."""
_MOST_ROWS = {"cpu": 64}
_MOST_ROWS_ELSEWHERE = 512
_KEPT_ROWS = 0.75
"""Finished rows are removed from a batch once at most this share of rows is unfinished."""


class _ReservedLayer(DynamicLayer):
    """Keys and values in a preallocated buffer; `DynamicLayer` would copy everything at each token."""

    def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
        """Take buffers [B, H, room, D] whose first `used` positions are filled."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._keys, self._values, self._used = keys, values, used
        self.keys, self.values = keys[:, :, :used], values[:, :, :used]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all."""
        end = self._used + key_states.shape[-2]
        self._keys[:, :, self._used : end] = key_states
        self._values[:, :, self._used : end] = value_states
        self._used = end
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self._keys, self._values = self._keys[rows], self._values[rows]
        self.keys, self.values = self._keys[:, :, : self._used], self._values[:, :, : self._used]


class GreedyDecoder:
    """Continues sequences greedily with a causal language model in evaluation mode."""

    def __init__(self, model: Any, *, max_length: int | None, batch_tokens: int | None) -> None:
        """Examine the model as scoring does: transformers' own attention may leave out soft-capping.

        Args:
            model: a transformers model in evaluation mode, on its device; its attention implementation is changed.
            max_length: the model's longest sequence, in tokens; None: no limit.
            batch_tokens: positions in a batch, prefixes plus continuations; None: from the free memory.

        Raises:
            SstokenError: it cannot run on token ids alone, or is not causal.
        """
        self._model, self._max_length, self._batch_tokens = model, max_length, batch_tokens
        rope.reset(model)
        examine(model)
        self._device = model.get_input_embeddings().weight.device
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._checked = False

    @torch.inference_mode()
    def candidates(self, ids: IdArray, positions: IdArray, count: int) -> IdArray:
        """Find the likeliest tokens at some positions [P] of a sequence [T], each at least 1, given what precedes them.

        Returns:
            [P, count] ids, likeliest first; equally likely ones by ascending id.
        """
        last = int(positions.max())
        inputs = self._row(ids[:last])
        keep = torch.as_tensor(positions - 1, dtype=torch.long, device=self._device)
        logits = self._logits(keep, input_ids=inputs, use_cache=False)[0]
        self._check_finite(logits)
        values, tokens = logits.topk(min(count + _TIES, logits.shape[-1]))
        order = np.lexsort((tokens.cpu().numpy(), -values.float().cpu().numpy()))[:, :count]
        return np.take_along_axis(tokens.cpu().numpy(), order, 1).astype(np.int32)

    def continue_greedily(
        self,
        sequences: Sequence[IdArray],
        branches: Sequence[Branch],
        stop: Collection[int],
        max_new_tokens: int,
    ) -> Iterator[tuple[int, Continuation]]:
        """Yield `(index, continuation)` for every branch, in any order.

        A sequence's keys and values are computed once for all its branches in a batch. Batches take branches in the
        order of their sequences, and are halved if they do not fit into memory.

        Args:
            sequences: token ids, [T] each.
            branches: what to continue.
            stop: ids that end a continuation and are not part of it; a branch whose own token is one ends at once.
            max_new_tokens: longest continuation; the model's longest sequence is a limit, too.
        """
        self._check_rope(branches, max_new_tokens)
        order = sorted(range(len(branches)), key=lambda i: (branches[i].sequence, branches[i].length))
        todo: list[int] = []
        for i in order:
            if branches[i].token is not None and branches[i].token in stop:
                yield i, Continuation(np.zeros(0, np.int32), True)
            elif self._room(branches[i], max_new_tokens) < 1:
                yield i, Continuation(np.zeros(0, np.int32), False)
            else:
                todo.append(i)
        most = len(todo)
        while todo:
            count = min(most, self._batch_rows(sequences, [branches[i] for i in todo], max_new_tokens))
            batch = todo[:count]
            try:
                found = self._decode(sequences, [branches[i] for i in batch], stop, max_new_tokens)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                most = count // 2
                continue
            yield from zip(batch, found, strict=True)
            todo = todo[count:]

    def _room(self, branch: Branch, max_new_tokens: int) -> int:
        """How many tokens may follow the branch."""
        length = branch.length + (branch.token is not None)
        return max_new_tokens if self._max_length is None else min(max_new_tokens, self._max_length - length)

    def _batch_rows(self, sequences: Sequence[IdArray], branches: Sequence[Branch], new: int) -> int:
        """How many branches, from the first on, fit a batch."""
        most = _MOST_ROWS.get(self._device.type, _MOST_ROWS_ELSEWHERE)
        room = self._batch_tokens
        if room is None:
            first = branches[0]
            cache = self._prefill(sequences[first.sequence][: first.length])
            cached_bytes = sum(t.nbytes for layer in cache for t in layer or ())
            bytes_per_position = max(1, cached_bytes // first.length)
            room = self._batch_tokens = max(1, free_memory(self._device) // 3 // bytes_per_position)
        longest = 0
        for count, branch in enumerate(branches[:most]):
            longest = max(longest, branch.length + 1 + new)
            if count and (count + 1) * longest > room:
                return count
        return min(most, len(branches))

    @torch.inference_mode()
    def _prefill(self, ids: IdArray) -> list[tuple[Tensor, Tensor] | None]:
        """Compute the keys and values [1, H, N, D] of each layer; None for a layer that shares another's."""
        cache = DynamicCache()
        inputs = self._row(ids)
        try:
            self._logits(inputs.new_tensor([ids.size - 1]), input_ids=inputs, past_key_values=cache)
            layers = [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]
            shapes = [layer[0].shape[-2] for layer in layers if layer is not None]
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            raise self._without_cache() from error
        if not shapes or set(shapes) != {ids.size}:
            raise self._without_cache()
        return layers

    def _without_cache(self) -> SstokenError:
        return SstokenError(
            f"{type(self._model).__name__}: generation needs a model whose every layer caches keys and values for all "
            "tokens, which this one's do not; use --backend vllm"
        )

    @torch.inference_mode()
    def _decode(
        self, sequences: Sequence[IdArray], branches: Sequence[Branch], stop: Collection[int], new: int
    ) -> list[Continuation]:
        """Continue one batch; rows are padded on the left, so that all have their next token at the same position."""
        # The model gets each branch's last token; everything before it is cached.
        cached = np.array([b.length - (b.token is None) for b in branches])
        feed = [sequences[b.sequence][b.length - 1] if b.token is None else b.token for b in branches]
        rooms = [self._room(b, new) for b in branches]
        width = int(cached.max())
        cache = self._branch_cache(sequences, branches, cached, width, width + max(rooms))
        mask = torch.zeros(len(branches), width + max(rooms), dtype=torch.long, device=self._device)
        for row, length in enumerate(cached):
            mask[row, width - length :] = 1
        positions = torch.as_tensor(cached, dtype=torch.long, device=self._device)[:, None]
        # Finished rows stay in the batch for a while, so their positions could exceed the model's.
        top = None if self._max_length is None else self._max_length - 1
        tokens = torch.as_tensor(np.array(feed), dtype=torch.long, device=self._device)[:, None]
        said: list[list[int]] = [[] for _ in branches]
        ended = [False] * len(branches)
        rows = list(range(len(branches)))  # the branch of each row
        for step in range(max(rooms)):
            logits = self._logits(
                tokens.new_tensor([0]),
                input_ids=tokens,
                position_ids=positions + step if top is None else (positions + step).clamp(max=top),
                attention_mask=mask[:, : width + step + 1],
                past_key_values=cache,
            )
            self._check_finite(logits)
            if not self._checked:
                self._check(sequences[branches[0].sequence], branches[0], logits[0, 0])
            tokens = logits.argmax(-1)  # the lowest id of equally likely ones
            unfinished = []
            for place, (row, token) in enumerate(zip(rows, tokens[:, 0].tolist(), strict=True)):
                if ended[row] or len(said[row]) == rooms[row]:
                    continue
                if token in stop:
                    ended[row] = True
                    continue
                said[row].append(token)
                if len(said[row]) < rooms[row]:
                    unfinished.append(place)
            if not unfinished:
                break
            if len(unfinished) <= _KEPT_ROWS * len(rows):
                kept = torch.as_tensor(unfinished, device=self._device)
                tokens, mask, positions = tokens[kept], mask[kept], positions[kept]
                rows = [rows[place] for place in unfinished]
                for layer in cache.layers:
                    if isinstance(layer, _ReservedLayer):
                        layer.keep_rows(kept)
        return [Continuation(np.array(ids, np.int32), end) for ids, end in zip(said, ended, strict=True)]

    def _branch_cache(
        self,
        sequences: Sequence[IdArray],
        branches: Sequence[Branch],
        cached: NDArray[np.int64],
        width: int,
        room: int,
    ) -> DynamicCache:
        """Build a batch's cache: each row holds its sequence's prefix, right-aligned in `width` positions."""
        buffers: list[Any] = []  # keys and values of each layer; None for a layer that shares another's
        last = -1
        computed: list[tuple[Tensor, Tensor] | None] = []
        for row, branch in enumerate(branches):
            if branch.sequence != last:
                last = branch.sequence
                of_sequence = [n for n, b in zip(cached, branches, strict=True) if b.sequence == last]
                computed = self._prefill(sequences[last][: max(1, *of_sequence, 1)])
            if not buffers:
                buffers = [
                    layer and [t.new_zeros(len(branches), t.shape[1], room, t.shape[3]) for t in layer]
                    for layer in computed
                ]
            length = int(cached[row])
            for buffer, layer in zip(buffers, computed, strict=True):
                for held, states in zip(buffer or (), layer or (), strict=True):
                    held[row, :, width - length : width] = states[0, :, :length]
        cache = DynamicCache()
        cache.layers = [DynamicLayer() if b is None else _ReservedLayer(b[0], b[1], width) for b in buffers]
        return cache

    def _check(self, ids: IdArray, branch: Branch, found: Tensor) -> None:
        """Compare a row of the first batch with the same tokens alone, without any cache.

        Raises:
            SstokenError: padding or the cache changes this model's logits.
        """
        own = [] if branch.token is None else [branch.token]
        alone = torch.as_tensor([[*ids[: branch.length].tolist(), *own]], device=self._device)
        last = alone.new_tensor([alone.shape[1] - 1])
        expected = self._logits(last, input_ids=alone, use_cache=False)[0, 0].float()
        difference = (expected - found.float()).abs().max()
        scale = expected.abs().max().clamp(min=1)
        limit = 1e-3 if self._model.dtype in (torch.float32, torch.float64) else 5e-2
        if not difference <= limit * scale:
            raise SstokenError(
                f"{type(self._model).__name__}: its logits in a padded batch with cached keys and values differ from "
                f"those of the same tokens alone (by {float(difference):.3g}); use --backend vllm"
            )
        self._checked = True

    def _check_finite(self, logits: Tensor) -> None:
        if logits.amax(-1).isnan().any():
            raise SstokenError(
                f"{type(self._model).__name__}: NaN logits; the checkpoint or its dtype ({self._model.dtype}) is broken"
            )

    def _check_rope(self, branches: Sequence[Branch], new: int) -> None:
        """Refuse continuations during which the rotary embedding would change: the cached keys would be stale."""
        kind = rope.length_class(self._model)
        if kind is None:
            return
        rope.reset(self._model)
        longest = max((b.length + 1 + self._room(b, new) for b in branches), default=1)
        if kind(1) != kind(longest):
            raise SstokenError(
                f"{type(self._model).__name__}: its rotary embedding changes before {longest} tokens, within the "
                "answers; lower max_new_tokens, or leave out the longest examples"
            )

    def _row(self, ids: IdArray) -> Tensor:
        """[1, T]."""
        return torch.as_tensor(ids.astype(np.int64), device=self._device)[None]

    def _logits(self, positions: Tensor, **inputs: Any) -> Tensor:
        """[B, len(positions), V]."""
        if self._keeps:
            logits: Tensor = self._model(**inputs, logits_to_keep=positions).logits
            return logits
        every: Tensor = self._model(**inputs).logits
        return every[:, positions]
