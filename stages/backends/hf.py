"""The transformers backend: `sstoken.measure` runs a checkpoint or an adapter, to measure or to generate."""

from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sstoken.measure.branches import Branch, Continuation, IdArray
from sstoken.measure.generation import GreedyDecoder
from sstoken.measure.memory import free_memory
from sstoken.measure.rope import longest
from sstoken.measure.scorer import MEASURABLE, Scorer
from sstoken.measure.second_pass import SECOND_PASS, measure_second_pass
from sstoken.signals import LOSS, get_signals
from sstoken.stages.backends import Backend, BackendOptions, LoadedModel, Measured
from sstoken.stages.backends.base_models import SharedBase, loaded, pick_device
from sstoken.stages.backends.generation import Generator
from sstoken.stages.checkpoints import adapter_base
from sstoken.stages.stage import SPEED_ONLY, Settings

_ON_CUDA = 16384
"""Positions in a batch, at most: enough work for a GPU."""
_ELSEWHERE = 768
"""Positions in a batch on a CPU, at most: their states have to fit into its cache."""


class HFSettings(Settings):
    """Backend options of `hf`."""

    compile: Annotated[bool, SPEED_ONLY] = False
    """Compile the decoder layers with torch.compile: a few percent faster, half a minute to start."""
    cuda_kernels: Annotated[bool, SPEED_ONLY] = False
    """On CUDA, packed batches and Triton kernels in place of padded batches and plain torch; never run on a GPU yet."""


class _HFModel(LoadedModel):
    """A checkpoint loaded by transformers; an adapter's base stays in memory for the next adapter."""

    _model: Any

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    @property
    def max_length(self) -> int | None:
        """See `LoadedModel.max_length`."""
        return longest(self._model.config)

    @property
    def dtype(self) -> str:
        """See `LoadedModel.dtype`."""
        return str(self._model.dtype).removeprefix("torch.")


class HFBackend(_HFModel, Backend):
    """Signals from a transformers causal language model."""

    signals = MEASURABLE | SECOND_PASS
    settings = HFSettings

    def __init__(self, options: BackendOptions) -> None:
        """Load the checkpoint and its references."""
        self._options = options
        settings = HFSettings.model_validate(dict(options.settings))
        self._kernels = settings.cuda_kernels
        device = pick_device(options.device)
        if torch.device(device).type == "cpu":
            _prepare_heap()
        shared = loaded(options, device)
        self._model, self._unused = shared.model, shared.unused
        wanted = get_signals(options.signals)
        self._again = [s for s in wanted if s.base in SECOND_PASS]
        self._names = [s.name for s in wanted if s.base not in SECOND_PASS]
        self._scorer = Scorer(
            shared.model,
            signals=self._names or [LOSS],
            layer=options.layer,
            references={name: self._reference(ref, device) for name, ref in options.references},
            batch_tokens=options.batch_tokens or _budget(shared.model, device),
            compiled=settings.compile,
            cuda_kernels=settings.cuda_kernels,
        )

    @property
    def vocab_size(self) -> int:
        """Rows of the input or output embedding, whichever has fewer."""
        output = self._model.get_output_embeddings()
        return super().vocab_size if output is None else min(super().vocab_size, len(output.weight))

    @property
    def remark(self) -> str:
        """How sequences share a batch, the attention function, and weights that are not used."""
        if not self._unused:
            return self._scorer.remark
        return f"{self._scorer.remark}; weights that are not used: {len(self._unused)}, such as {self._unused[0]}"

    @property
    def attention_layers(self) -> dict[str, int]:
        """See `Backend.attention_layers`."""
        return self._scorer.layers

    def measure(
        self, sequences: Sequence[NDArray[np.int32]], response_masks: Sequence[NDArray[np.bool_]]
    ) -> Iterator[tuple[int, Measured]]:
        """See `Backend.measure`."""
        again: list[Measured] = [{} for _ in sequences]
        if self._again:
            losses = Scorer(
                self._model,
                signals=[LOSS],
                batch_tokens=self._scorer.batch_tokens,
                cuda_kernels=self._kernels,
            )
            again = measure_second_pass(losses, sequences, response_masks, self._again)
        if not self._names:
            yield from enumerate(again)
            return
        for index, signals in self._scorer.measure(sequences, response_masks):
            yield index, signals | again[index]

    def _reference(self, checkpoint: str, device: str) -> Any:
        """Load another checkpoint's model beside this one."""
        base = adapter_base(checkpoint)
        options = self._options
        other = SharedBase(base or checkpoint, options.dtype, device, options.trust_remote_code)
        other.use(checkpoint if base else None)
        return other.model


class HFGenerator(_HFModel, Generator):
    """Greedy generation from a transformers causal language model."""

    def __init__(self, options: BackendOptions) -> None:
        """Load the checkpoint."""
        self._model = loaded(options, pick_device(options.device)).model
        self._decoder = GreedyDecoder(
            self._model, max_length=self.max_length, batch_tokens=options.batch_tokens
        )

    def candidates(
        self, sequences: Sequence[IdArray], positions: Sequence[IdArray], count: int
    ) -> list[IdArray]:
        """See `Generator.candidates`. Takes one forward pass per sequence."""
        pairs = zip(sequences, positions, strict=True)
        return [self._decoder.candidates(ids, at, count) for ids, at in pairs]

    def continue_greedily(
        self,
        sequences: Sequence[IdArray],
        branches: Sequence[Branch],
        stop: Collection[int],
        max_new_tokens: int,
    ) -> Iterator[tuple[int, Continuation]]:
        """See `Generator.continue_greedily`."""
        yield from self._decoder.continue_greedily(sequences, branches, stop, max_new_tokens)


@cache  # once per process
def _prepare_heap() -> None:
    """Make the C library reuse the memory of one batch for the next instead of returning it to the system.

    Getting it back took up to 7 % of the time. Freeing a block of up to 32 MB raises glibc's threshold for returning
    memory (mallopt(3), M_MMAP_THRESHOLD); the block is never touched. 16 MB is as fast as the maximum and keeps less
    memory. Other C libraries ignore this.

    The matrix product makes the linear algebra library allocate its buffers now: in the middle of a batch, they would
    lie between its tensors and fragment the heap.
    """
    torch.empty(16 << 20, dtype=torch.uint8)
    square = torch.zeros(1024, 1024)
    torch.mm(square, square)


def _budget(model: Any, device: str) -> int:
    """Return the most positions in a batch: enough for full speed, within half of the free memory."""
    config: Any = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    bytes_per_token = model.dtype.itemsize * (8 * config.hidden_size + 4 * inner)
    most = _ON_CUDA if torch.device(device).type == "cuda" else _ELSEWHERE
    return max(1, min(most, free_memory(torch.device(device)) // 2 // bytes_per_token))
