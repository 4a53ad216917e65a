"""Capture prompt attention inside vLLM's workers.

`AttentionExtension` is mixed into vLLM's worker class. It wraps the attention backend of one layer, which receives the
queries and keys after rotary embedding of all sequences of a step, one after the other. Sequences are identified by a
digest of their token ids, since request ids and batch order are internal to vLLM. On the first sequence of a request
it recomputes the layer's output and compares it with vLLM's, to detect a scale, mask, window, soft-cap or layout that
is not as expected.

Shapes: N tokens of a step, H heads, K key-value heads, D head size, T tokens of a sequence, R rows checked.
"""

import hashlib
import inspect
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sstoken.measure.prompt_attention import prompt_attention
from sstoken.stages.backends.vllm_errors import EngineError, one_line

CHECKED_ROWS = 64
_NEEDED = {"query", "key", "value", "attn_metadata", "output"}


def digest(ids: NDArray[Any]) -> bytes:
    """Return the digest that identifies a sequence of token ids."""
    return hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=16).digest()


class AttentionExtension:
    """Methods added to vLLM's worker, for `LLM.collective_rpc`. They return errors as one-line values."""

    def sstoken_attach(self, layer: int) -> dict[str, Any]:
        """Attach to a decoder layer (negative: from the end); return `problem` or `heads`."""
        try:
            attention = _find_attention(self, layer)
            self._sstoken = LayerCapture(attention, self.get_model())  # type: ignore[attr-defined]
        except Exception as error:  # an unknown version of vLLM may raise anything
            return {"problem": one_line(error)}
        return {"heads": self._sstoken.num_heads}

    def sstoken_expect(self, wanted: dict[bytes, list[NDArray[np.bool_]]]) -> None:
        """Measure these sequences in the next steps: response masks, [T] each, by the digest of the token ids."""
        self._sstoken.expect(wanted)

    def sstoken_take(self) -> dict[str, Any]:
        """Return what was measured since: `problem`, `attention` by digest and mask, and the check's `deviation`."""
        return self._sstoken.take()


class LayerCapture:
    """Observes one attention layer of a worker's model."""

    def __init__(self, attention: Any, model: torch.nn.Module) -> None:
        """Attach to a layer.

        Args:
            attention: the layer's `Attention` module of vLLM.
            model: the loaded model that contains it.

        Raises:
            EngineError: the layer's backend has an unknown signature.
        """
        backend = attention.impl
        self.num_heads: int = attention.num_heads
        self._num_kv_heads: int = attention.num_kv_heads
        self._how: dict[str, Any] = {
            "scaling": float(backend.scale),
            "window": attention.sliding_window,
            "softcap": getattr(backend, "logits_soft_cap", None) or None,
            "sinks": getattr(backend, "sinks", None),
        }
        self._forward = backend.forward
        self._signature = inspect.signature(self._forward)
        if missing := _NEEDED - set(self._signature.parameters):
            raise EngineError(
                f"{type(backend).__name__}.forward has no {', '.join(sorted(missing))} in this vLLM"
            )
        self._step: tuple[Any, Any] = (None, None)
        self.expect({})
        model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        backend.forward = self._observed

    def expect(self, wanted: dict[bytes, list[NDArray[np.bool_]]]) -> None:
        """See `AttentionExtension.sstoken_expect`."""
        self._wanted = wanted
        self._attention: dict[bytes, list[NDArray[np.float32]]] = {}
        self._problem: str | None = None
        self._deviation: float | None = None

    def take(self) -> dict[str, Any]:
        """See `AttentionExtension.sstoken_take`."""
        taken = {"problem": self._problem, "attention": self._attention, "deviation": self._deviation}
        self.expect({})
        return taken

    def _before_model(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("input_ids", "positions"), args, strict=False)) | kwargs
        self._step = (given.get("input_ids"), given.get("positions"))

    def _observed(self, *args: Any, **kwargs: Any) -> Any:
        result = self._forward(*args, **kwargs)
        if self._wanted and self._problem is None:
            try:
                call = self._signature.bind(*args, **kwargs).arguments
                if call["attn_metadata"] is not None:
                    self._measure(call)
            except Exception as error:  # raising here would end the worker and bury the message in its log
                self._problem = one_line(error)
        return result

    def _measure(self, call: dict[str, Any]) -> None:
        query, key = call["query"], call["key"]
        if key is None or query.element_size() < 2:
            raise EngineError("the layer does not pass plain queries and keys to its backend")
        ids, offsets = self._sequences(call["attn_metadata"])
        num_tokens = offsets[-1]
        queries_HND = query[:num_tokens].view(num_tokens, self.num_heads, -1).transpose(0, 1)
        keys_KND = key[:num_tokens].view(num_tokens, self._num_kv_heads, -1).transpose(0, 1)
        pieces = [(digest(ids[start:stop]), start, stop) for start, stop in pairwise(offsets)]
        if unknown := [stop - start for name, start, stop in pieces if name not in self._wanted]:
            raise EngineError(f"{unknown[0]} tokens arrived that are not one of the sequences")
        for variant in range(max(len(self._wanted[name]) for name, _, _ in pieces)):
            asked = [piece for piece in pieces if variant < len(self._wanted[piece[0]])]
            response_N = np.zeros(num_tokens, dtype=np.bool_)
            for name, start, stop in asked:
                response_N[start:stop] = self._wanted[name][variant]
            attention_N = prompt_attention(
                queries_HND[None],
                keys_KND[None],
                torch.from_numpy(response_N)[None].to(query.device),
                segments=[(0, start, stop) for _, start, stop in asked],
                **self._how,
            )[0]
            values_N = attention_N.float().cpu().numpy()
            for name, start, stop in asked:
                of_response = values_N[start:stop][self._wanted[name][variant]]
                self._attention.setdefault(name, [])[variant:] = [of_response]
        if self._deviation is None:
            _, start, stop = pieces[0]
            values = call["value"][start:stop].view(stop - start, self._num_kv_heads, -1).transpose(0, 1)
            expected_RX = self._output(queries_HND[:, start:stop], keys_KND[:, start:stop], values)
            got_RX = call["output"][start:stop].reshape(stop - start, -1)[-CHECKED_ROWS:].float()
            self._deviation = float((expected_RX - got_RX).norm() / expected_RX.norm().clamp_min(1e-12))

    def _sequences(self, metadata: Any) -> tuple[NDArray[np.int64], list[int]]:
        """Return the step's token ids [N] and the offsets of its sequences [S + 1]."""
        ids, positions = self._step
        if ids is None or positions is None:
            raise EngineError("the model was called without token ids and positions (a multimodal model?)")
        if positions.ndim == 2:  # multimodal rotary embedding: text has the same position in each row
            positions = positions[0]
        num_tokens = int(metadata.num_actual_tokens)
        ids_N, positions_N = (
            torch.stack([ids[:num_tokens].long(), positions[:num_tokens].long()]).cpu().numpy()
        )
        starts = [0, *(np.flatnonzero(np.diff(positions_N) != 1) + 1).tolist()]
        if any(positions_N[start] != 0 for start in starts):
            raise EngineError("a sequence arrived in pieces (chunked prefill, prefix caching or preemption)")
        return ids_N, [*starts, num_tokens]

    def _output(self, queries_HTD: Tensor, keys_KTD: Tensor, values_KTD: Tensor) -> Tensor:
        """Compute the layer's output for the last rows, [R, H * D], in plain torch."""
        rows_R = torch.arange(queries_HTD.shape[1], device=queries_HTD.device)[-CHECKED_ROWS:]
        groups = queries_HTD.shape[0] // keys_KTD.shape[0]
        keys, values = (x.float().repeat_interleave(groups, 0) for x in (keys_KTD, values_KTD))
        scores_HRT = queries_HTD[:, rows_R].float() @ keys.transpose(1, 2) * self._how["scaling"]
        if (softcap := self._how["softcap"]) is not None:
            scores_HRT = softcap * torch.tanh(scores_HRT / softcap)
        behind_RT = rows_R[:, None] - torch.arange(keys.shape[1], device=rows_R.device)
        window = self._how["window"] or keys.shape[1]
        scores_HRT = scores_HRT.masked_fill((behind_RT < 0) | (behind_RT >= window), float("-inf"))
        if (sinks := self._how["sinks"]) is not None:
            sink_HR1 = sinks.float()[:, None, None].expand(*scores_HRT.shape[:2], 1)
            weights = torch.cat([scores_HRT, sink_HR1], -1).softmax(-1)[..., :-1]
        else:
            weights = scores_HRT.softmax(-1)
        return (weights @ values).transpose(0, 1).flatten(1)


def _find_attention(worker: Any, layer: int) -> Any:
    """Return the attention module of a decoder layer.

    Raises:
        EngineError: the layer's attention weights are not a softmax over its own keys.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    by_number: dict[int, Any] = {}
    for name, module in get_layers_from_vllm_config(worker.vllm_config, Attention).items():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if len(numbers) != 1:
            raise EngineError(f"cannot tell the layer of {name!r}")
        by_number[numbers[0]] = module
    wanted = layer if layer >= 0 else layer + worker.model_config.hf_text_config.num_hidden_layers
    if wanted not in by_number:
        there = ", ".join(map(str, sorted(by_number))) or "none"
        raise EngineError(f"layer {wanted} has no softmax attention in vLLM; layers that have: {there}")
    attention = by_number[wanted]
    if getattr(attention, "kv_sharing_target_layer_name", None):
        raise EngineError(f"layer {wanted} uses the keys of another layer")
    if getattr(attention.impl, "alibi_slopes", None) is not None:
        raise EngineError(f"layer {wanted} has ALiBi biases")
    if getattr(attention, "query_quant", None) is not None:
        raise EngineError(f"layer {wanted} quantises its queries")
    return attention
