"""The transformers backend: a checkpoint or an adapter, measured by `sstoken.measure.scorer`."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sstoken.measure.memory import free_memory
from sstoken.measure.rope import longest
from sstoken.measure.scorer import MEASURABLE, Scorer
from sstoken.measure.second_pass import SECOND_PASS, measure_second_pass
from sstoken.signals import LOSS, get_signals
from sstoken.stages.backends import Backend, BackendOptions, Measured
from sstoken.stages.backends.base_models import SharedBase, pick_device, shared_base
from sstoken.stages.checkpoints import adapter_base, stamp
from sstoken.stages.stage import SPEED_ONLY, Settings

_ON_CUDA = 16384
"""Positions in a batch, at most: enough work for a GPU."""
_ELSEWHERE = 768
"""On a CPU, whose cache has to hold their states."""


class HFSettings(Settings):
    """Backend options of `hf`."""

    compile: Annotated[bool, SPEED_ONLY] = False
    """Compile the decoder layers with torch.compile: some percent faster, half a minute to start."""
    cuda_kernels: Annotated[bool, SPEED_ONLY] = False
    """On CUDA, packed batches and Triton kernels in place of padded batches and plain torch; never run on a GPU yet."""


class HFBackend(Backend):
    """Signals from a transformers causal language model."""

    signals = MEASURABLE | SECOND_PASS
    settings = HFSettings

    def __init__(self, options: BackendOptions) -> None:
        """Load the checkpoint; an adapter goes onto its base, which stays in memory for the next one."""
        self._options = options
        settings = HFSettings.model_validate(dict(options.settings))
        self._kernels = settings.cuda_kernels
        device = pick_device(options.device)
        if torch.device(device).type == "cpu":
            _prepare_heap()
        base = adapter_base(options.checkpoint)
        full = base or options.checkpoint
        shared = shared_base(full, options.dtype, device, options.trust_remote_code, stamp(full))
        shared.use(options.checkpoint if base else None)
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
        """Rows of the input embedding, or of the output embedding where it has fewer."""
        embeddings = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        return min(int(module.weight.shape[0]) for module in embeddings if module is not None)

    @property
    def max_length(self) -> int | None:
        """Positions that the model was made for."""
        return longest(self._model.config)

    @property
    def remark(self) -> str:
        """How sequences share a batch, and what attends to them."""
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
        """Another checkpoint's model, beside this one in memory."""
        base = adapter_base(checkpoint)
        options = self._options
        other = SharedBase(base or checkpoint, options.dtype, device, options.trust_remote_code)
        other.use(checkpoint if base else None)
        return other.model


@cache  # once a process
def _prepare_heap() -> None:
    """Have the C library hand the memory of one batch on to the next, in place of giving it back to the system.

    Fetching it again took up to 7 % of the time. glibc raises its limit for what it keeps when a block of up to 32 MB
    is freed (mallopt(3), M_MMAP_THRESHOLD); the block is never touched. Elsewhere this does nothing. A limit of 16 MB
    is as fast as the most, and leaves less memory lying around.

    The product has the library of linear algebra take its buffers now: taken in the middle of a batch, they would lie
    among its tensors and keep what these leave from being one piece.
    """
    torch.empty(16 << 20, dtype=torch.uint8)
    square = torch.zeros(1024, 1024)
    torch.mm(square, square)


def _budget(model: Any, device: str) -> int:
    """Positions in a batch: what makes it fast, or as many as half of the free memory holds."""
    config: Any = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    bytes_per_token = model.dtype.itemsize * (8 * config.hidden_size + 4 * inner)
    most = _ON_CUDA if torch.device(device).type == "cuda" else _ELSEWHERE
    return max(1, min(most, free_memory(torch.device(device)) // 2 // bytes_per_token))
