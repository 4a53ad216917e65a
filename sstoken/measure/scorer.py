"""Signals of many sequences, from a model in memory: planned batches, one forward pass each.

Batches are padded on the right, which needs no mask in a causal model. On CUDA, on request, they are packed without
padding instead, with the kernels of `sstoken.measure.cuda`.

Shapes: B rows, T positions, N response tokens of a batch, R positions that are read, D hidden size.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sstoken.errors import SstokenError, UsageError
from sstoken.measure.architecture import Findings, examine
from sstoken.measure.batch import Batch, Ids, Mask, Reading, lay_out, read_positions
from sstoken.measure.batching import by_class, plan_packed, plan_padded
from sstoken.measure.capture import AttentionCapture, ForwardStopped, check_layer
from sstoken.measure.memory import is_out_of_memory
from sstoken.measure.noise import Noise, noisy_embeddings
from sstoken.measure.readout import READABLE, Readout
from sstoken.measure.rope import length_class, reset
from sstoken.measure.token_loss import ROWS_PER_TILE
from sstoken.signals import get_signals

Measured = dict[str, NDArray[np.float32] | NDArray[np.int32]]
"""Signals of one sequence by name, one value per response token."""

_ROW_BEFORE = "attention_predicting"
MEASURABLE = READABLE | {"attention", _ROW_BEFORE}
"""What a `Scorer` measures, by name without argument."""

_MOST_PASSED = 16
"""Limit on the batches whose signals are computed together."""


class Scorer:
    """Measures signals of sequences under one model.

    Example:
        >>> scorer = Scorer(model, signals=["loss", "attention@-1"])
        >>> for index, signals in scorer.measure(sequences, response_masks):
        ...     signals["loss"]  # one value per response token
    """

    def __init__(
        self,
        model: Any,
        *,
        signals: Iterable[str] = ("loss",),
        layer: int | None = None,
        batch_tokens: int = 2048,
        layout: Literal["padded", "packed"] | None = None,
        compiled: bool = False,
        cuda_kernels: bool = False,
        references: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare a causal transformers language model; its attention implementation is changed.

        Args:
            model: in eval mode, on its device.
            signals: names of the signals to measure (`sstoken.signals`). If only attention is wanted, the forward pass
                ends at the last layer that is measured.
            layer: decoder layer of the signal `attention`, negative from the end; None: the last with softmax
                attention.
            batch_tokens: limit on the positions in a batch; halved whenever a batch does not fit in memory.
            layout: how sequences share a batch; None: padded, or packed with `cuda_kernels` if the model supports it.
            compiled: compile the decoder layers, except those whose attention is captured.
            cuda_kernels: on CUDA, use packed batches and the Triton kernels of `sstoken.measure.cuda`, each only if a
                trial shows it accurate. They have never run on a GPU yet.
            references: the other models that signals such as `kl@NAME` name, in eval mode, on the same device.

        Raises:
            UsageError: no such signal or layer, or its attention cannot be measured.
            SstokenError: the model is not causal, its output head is not supported, or `layout` is packed and the
                model cannot be.
        """
        self._model, self.batch_tokens = model, batch_tokens
        self._wanted = get_signals(signals)
        if unknown := [s.name for s in self._wanted if s.base not in MEASURABLE]:
            raise UsageError(f"a forward pass does not give {', '.join(unknown)}")
        self._device: torch.device = model.get_input_embeddings().weight.device
        lists = [m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList)]
        blocks: list[Any] = list(lists[0]) if lists else []  # the decoder layers
        for block in blocks:
            block._compiled_call_impl = None  # undo another scorer's compilation; torch has no other way
        self._kernels = cuda_kernels and self._device.type == "cuda"
        self._readout = Readout(model, references or {}, self._wanted, kernels=self._kernels)
        models = self._readout.models
        self._length_classes = [f for f in map(length_class, models) if f is not None]
        for m in models:
            reset(m)
        found, *others = map(examine, models)
        self.layers = {
            s.name: _measurable(model, layer if s.layer is None else s.layer, found)
            for s in self._wanted
            if s.needs == "attention"
        }
        """The decoder layer of each attention signal, counted from 0."""
        self._together = all(f.rows_agree for f in (found, *others))
        self.layout, self.remark = self._choose_layout(layout, found)
        if cuda_kernels and not self._kernels:
            self.remark += f"; no CUDA kernels on {self._device.type}"
        if self.layout == "packed":
            from sstoken.measure.cuda.packed import IMPLEMENTATION_PACKED

            for m in models:
                m.set_attn_implementation(IMPLEMENTATION_PACKED)
        self._readout.prepare()
        self._captures = {
            n: AttentionCapture(model, n, kernels=self._kernels) for n in sorted(set(self.layers.values()))
        }
        if compiled:
            for index, block in enumerate(blocks):
                if index not in self._captures:
                    block.compile(dynamic=True)

    def _choose_layout(self, layout: str | None, found: Findings) -> tuple[str, str]:
        """Choose the layout; return it with a remark for the user."""
        if not found.rows_agree and layout != "packed":
            return (
                "padded",
                "one sequence at a time: in this architecture, those of a batch change each other",
            )
        if not found.softmax_layers and layout != "packed":
            return "padded", "padded batches, the architecture's own attention"
        if layout == "padded":
            return "padded", "padded batches, as asked for"
        if layout is None and not self._kernels:
            return "padded", "padded batches, sdpa"
        from sstoken.measure.cuda.packed import check_packed, describe_packed

        reason = check_packed(self._model)
        if reason is None:
            choices = describe_packed(self._model)
            return "packed", "packed batches, attention by " + " and ".join(c.name for c in choices)
        if layout == "packed":
            raise SstokenError(f"{type(self._model).__name__}: cannot take packed batches ({reason})")
        return "padded", f"padded batches ({reason})"

    @torch.inference_mode()
    def measure(
        self, sequences: Sequence[Ids], response_masks: Sequence[Mask], *, noise: Noise | None = None
    ) -> Iterator[tuple[int, Measured]]:
        """Yield `(index, signals)` for every sequence, in any order.

        Args:
            sequences: token ids, [T] each.
            response_masks: [T] each; token 0 is never a response token, as nothing predicts it.
            noise: added to each sequence's embeddings; None: no noise.

        Raises:
            SstokenError: a single sequence does not fit in memory, or torch.compile fails.
        """
        passed: list[_Passed] = []
        rows = 0
        under_way: deque[_Measured] = deque()
        behind = 1 if self._device.type == "cuda" else 0  # lets the GPU compute while the host reads results
        for batch in self._pass_all(sequences, response_masks, noise):
            passed.append(batch)
            rows += batch.reading.positions.numel()
            if rows >= ROWS_PER_TILE or len(passed) == _MOST_PASSED:
                under_way.append(self._finish(passed))
                passed, rows = [], 0
            if len(under_way) > behind:
                yield from under_way.popleft().signals()
        if passed:
            under_way.append(self._finish(passed))
        for measured in under_way:
            yield from measured.signals()

    def _pass_all(
        self, sequences: Sequence[Ids], response_masks: Sequence[Mask], noise: Noise | None
    ) -> Iterator["_Passed"]:
        """Run every sequence through the model; batches shrink once one does not fit in memory."""
        lengths = [len(ids) for ids in sequences]
        waiting = deque(self._plan(range(len(sequences)), lengths))
        while waiting:
            indices = waiting.popleft()
            try:
                batch = lay_out(indices, sequences, response_masks, self.layout)
                with noisy_embeddings(self._model, batch, noise):
                    passed = self._forward(batch)
            except RuntimeError as error:
                if _of_compiler(error):
                    reason = " ".join(str(error).partition("\n\n")[0].split())
                    raise SstokenError(
                        f"the model's layers do not compile ({reason}); score without compiling"
                    ) from error
                if not is_out_of_memory(error):
                    raise
                self._shrink(indices, lengths)
                left = [i for batch in (indices, *waiting) for i in batch]
                waiting = deque(self._plan(left, lengths))
                continue
            yield passed

    def _plan(self, indices: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        plan = plan_packed if self.layout == "packed" else plan_padded
        budget = self.batch_tokens if self._together else 1
        groups = [list(indices)]
        if self._length_classes:
            groups = by_class(indices, [tuple(f(lengths[i]) for f in self._length_classes) for i in indices])
        return [
            [group[i] for i in batch]
            for group in groups
            for batch in plan([lengths[i] for i in group], budget)
        ]

    def _shrink(self, indices: list[int], lengths: Sequence[int]) -> None:
        """Halve the budget after a batch did not fit."""
        if len(indices) == 1:
            raise SstokenError(
                f"a sequence of {lengths[indices[0]]} tokens does not fit in memory beside the model; encode with a "
                "smaller --max-length, or score with a smaller dtype or on a device with more memory"
            ) from None
        self.batch_tokens = min(self.batch_tokens, sum(lengths[i] for i in indices)) // 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _forward(self, batch: Batch) -> "_Passed":
        reading = read_positions(batch, at=self._readout.at)
        tokens, positions = self._to_device(batch.tokens), self._to_device(reading.positions)
        before = any(s.base == _ROW_BEFORE for s in self._wanted)
        for number, capture in self._captures.items():
            stop = not self._readout.needed and number == max(self._captures)
            rows = self._to_device(batch.response | batch.predicting) if before else None
            capture.expect(self._to_device(batch.response), batch.segments, stop=stop, rows=rows)
        if self.layout == "packed":
            from sstoken.measure.cuda.packed import packed_inputs

            inputs = packed_inputs([batch.ids[r, a:b] for r, a, b in batch.segments], self._device)
        else:
            inputs = {"input_ids": self._to_device(batch.ids), "use_cache": False}
        hidden = []
        if self._readout.needed:
            hidden = self._readout.read(inputs, positions, by_length=bool(self._length_classes))
        else:
            with contextlib.suppress(ForwardStopped):
                self._model(**inputs)
        attention = {number: capture.take().flatten() for number, capture in self._captures.items()}
        by_name = {
            s.name: attention[self.layers[s.name]].index_select(0, tokens - int(s.base == _ROW_BEFORE))
            for s in self._wanted
            if s.needs == "attention"
        }
        return _Passed(batch, reading, hidden, by_name)

    def _finish(self, passed: list["_Passed"]) -> "_Measured":
        """Compute the signals of several batches together: few rows make slow products."""
        attention = {name: torch.cat([p.attention[name] for p in passed]) for name in self.layers}
        signals = {name: _to_host(values) for name, values in attention.items()}
        if self._readout.needed:
            found = self._readout.signals([(p.reading, p.hidden) for p in passed], self._to_device)
            signals |= {name: _to_host(values) for name, values in found.items()}
        copied = None
        if self._device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        return _Measured([p.batch for p in passed], signals, copied)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)


def _measurable(model: Any, layer: int | None, found: Findings) -> int:
    """Return the layer to capture, counted from 0; None stands for the last with softmax attention."""
    name, layers = type(model).__name__, found.softmax_layers
    if not layers:
        raise UsageError(
            f"{name}: its attention cannot be measured, as it does not go through transformers' attention interface; "
            "score its losses only (--attention-from none), or use another checkpoint's attention"
        )
    if layer is None:
        return layers[-1]
    number = int(model.config.get_text_config().num_hidden_layers)
    check_layer(layer, number)
    if layer % number not in layers:
        raise UsageError(
            f"layer {layer}: layer {layer % number} of {name} has no softmax attention; legal is "
            f"{', '.join(map(str, layers))}"
        )
    return layer % number


@dataclass(frozen=True)
class _Passed:
    """A batch after its forward pass."""

    batch: Batch
    reading: Reading
    hidden: list[Tensor]
    """[R, D] at the positions read, for the model and each reference; empty if only attention is wanted."""
    attention: dict[str, Tensor]
    """[N], by signal."""


@dataclass(frozen=True)
class _Measured:
    """Signals that are being copied to the host."""

    batches: list[Batch]
    by_name: dict[str, Tensor]
    """[N] each, of the response tokens of all batches together."""
    copied: "torch.cuda.Event | None"

    def signals(self) -> Iterator[tuple[int, Measured]]:
        """Yield `(index, signals)` for each sequence."""
        if self.copied is not None:
            self.copied.synchronize()
        at = 0
        arrays = {name: values.numpy() for name, values in self.by_name.items()}
        for batch in self.batches:
            for index, (row, start, stop) in zip(batch.indices, batch.segments, strict=True):
                until = at + int(batch.response[row, start:stop].sum())
                yield index, {name: values[at:until] for name, values in arrays.items()}
                at = until


def _to_host(tensor: Tensor) -> Tensor:
    # Non-blocking only on CUDA, where `_Measured.copied` waits for it.
    dtype = tensor.dtype if tensor.dtype == torch.int32 else torch.float32
    return tensor.to(dtype).to("cpu", non_blocking=tensor.is_cuda)


def _of_compiler(error: RuntimeError) -> bool:
    return any(kind.__module__.startswith("torch._dynamo") for kind in type(error).__mro__)
