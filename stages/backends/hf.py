"""The transformers backend: padded batches, one forward pass for both signals.

Shapes: B sequences, T positions, N response tokens of the batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sstoken.attention import IMPLEMENTATION, AttentionCapture
from sstoken.batching import plan_batches
from sstoken.errors import SstokenError, UsageError
from sstoken.losses import intercept_head, read_head, token_losses
from stages.backends import Backend, BackendOptions, Latest, TokenSignals
from stages.checkpoints import adapter_base, first_line, load_model, local_folder, stamp

_ADAPTER = "current"


class SharedBase:
    """A base model in memory, on which LoRA adapters are swapped."""

    def __init__(self, ref: str, dtype: str, device: str, trust_remote_code: bool) -> None:
        torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        self.model = load_model(
            ref, dtype=torch_dtype, attention=IMPLEMENTATION, trust_remote_code=trust_remote_code
        )
        self.model.to(device).eval().requires_grad_(False)
        self._adapter: tuple[Any, ...] | None = None
        """The stamp of the adapter that is on: another one may stand in the same folder by now."""

    def use(self, adapter: str | None) -> None:
        """Put the adapter of that folder on the base in place of the last one; None: the bare base."""
        wanted = stamp(adapter) if adapter is not None else None
        if wanted == self._adapter:
            return
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise SstokenError(f"{adapter}: LoRA adapters need peft; pip install 'sstoken[lora]'") from error
        if self._adapter is not None:
            self.model.delete_adapter(_ADAPTER)
        self._adapter = None
        if adapter is not None:
            _load_adapter(self.model, adapter)
            self.model.eval()
        self._adapter = wanted


def _load_adapter(model: Any, adapter: str) -> None:
    try:
        report = model.load_adapter(str(local_folder(adapter) or adapter), adapter_name=_ADAPTER)
        model.set_adapter(_ADAPTER)
    except Exception as error:  # peft, transformers and safetensors raise many kinds
        raise SstokenError(f"{adapter}: the adapter does not load ({first_line(error)})") from error
    missing = getattr(report, "missing_keys", ())
    if missing:  # transformers would go on with an adapter that does nothing
        raise SstokenError(
            f"{adapter}: {len(missing)} of the adapter's weights are missing (first: {min(missing)}); it belongs to "
            "another base model, or has to be copied again"
        )


@Latest
def _shared_base(
    ref: str, dtype: str, device: str, trust_remote_code: bool, stamp: tuple[Any, ...]
) -> SharedBase:
    """One base model per process; `stamp` tells when its files have changed."""
    return SharedBase(ref, dtype, device, trust_remote_code)


def pick_device(device: str) -> str:
    """`auto` as the best device that is there.

    Raises:
        UsageError: there is no such device here.
    """
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UsageError(
                f"device {device!r} cannot be used here ({first_line(error)}); legal: cpu, cuda, cuda:1, mps, auto"
            ) from error
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class HFBackend(Backend):
    """Signals from a transformers causal language model."""

    def __init__(self, options: BackendOptions) -> None:
        """Load the checkpoint; an adapter goes onto its base, which stays in memory for the next one."""
        device = pick_device(options.device)
        base = adapter_base(options.checkpoint)
        full = base or options.checkpoint
        shared = _shared_base(full, options.dtype, device, options.trust_remote_code, stamp(full))
        shared.use(options.checkpoint if base else None)
        self._model, self._device = shared.model, device
        self._batch_tokens = options.batch_tokens
        self._head = read_head(self._model)
        self._capture = AttentionCapture(self._model, options.layer) if options.attention else None

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    @property
    def max_length(self) -> int | None:
        """Positions that the model was made for."""
        config: Any = self._model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

    @torch.inference_mode()
    def measure(
        self, sequences: Sequence[NDArray[np.int32]], response_masks: Sequence[NDArray[np.bool_]]
    ) -> Iterator[tuple[int, TokenSignals]]:
        """See `Backend.measure`."""
        for batch in plan_batches([len(s) for s in sequences], self._batch_tokens):
            yield from self._measure_batch(
                batch, [sequences[i] for i in batch], [response_masks[i] for i in batch]
            )

    def _measure_batch(
        self,
        indices: list[int],
        sequences: list[NDArray[np.int32]],
        response_masks: list[NDArray[np.bool_]],
    ) -> Iterator[tuple[int, TokenSignals]]:
        ids_BT = torch.from_numpy(_pad(sequences, np.int64)).to(self._device)
        response_BT = torch.from_numpy(_pad(response_masks, np.bool_)).to(self._device)
        if self._capture is not None:
            self._capture.expect(response_BT)
        # Padding stands on the right of a causal model: it changes nothing before it and needs no mask.
        with intercept_head(self._model) as head_input:
            self._model(input_ids=ids_BT, use_cache=False)
        assert head_input.hidden is not None
        predicted_BT = response_BT[:, 1:]
        hidden_ND = head_input.hidden[:, :-1][predicted_BT]
        loss_N = token_losses(hidden_ND, ids_BT[:, 1:][predicted_BT], self._head).float().cpu().numpy()
        attention_BT = None
        if self._capture is not None:
            attention_BT = self._capture.take().float().cpu().numpy()
        start = 0
        for row, (index, mask) in enumerate(zip(indices, response_masks, strict=True)):
            stop = start + int(mask[1:].sum())
            attention = None
            if attention_BT is not None:
                attention = np.where(mask, attention_BT[row, : mask.size], np.nan).astype(np.float32)
            yield index, TokenSignals(_scatter(loss_N[start:stop], mask), attention)
            start = stop


def _pad(rows: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    padded: NDArray[Any] = np.zeros((len(rows), max(len(r) for r in rows)), dtype=dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def _scatter(values: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    scattered = np.full(mask.size, np.nan, dtype=np.float32)
    scattered[mask] = values
    return scattered
