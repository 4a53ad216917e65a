"""The process that runs vLLM: `python -m sstoken.stages.backends.vllm_engine FD`, started by `vllm_process`.

A process of its own isolates vLLM's output, environment and leftovers. It reads an `EngineSpec`, then requests, from
the connection on file descriptor FD, and answers each. It exits when its standard input closes: when its parent ends.
"""

import os
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sstoken.stages.backends.vllm_errors import EngineError, one_line
from sstoken.stages.backends.vllm_generation import Generated, Prefixes, generate

MAX_DEVIATION = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 1e-2}
"""Largest allowed relative difference between vLLM's layer output and ours; 16-bit dtypes round values and output."""
MOST_TOP = 20
"""How many of the likeliest tokens a request may ask for, at most."""


@dataclass(frozen=True)
class EngineSpec:
    """Settings of an engine; another specification needs another process."""

    model: str
    revision: str | None
    layer: int | None
    """Decoder layer to capture attention of; None: capture none."""
    dtype: str
    longest: int
    """Longest sequence in tokens."""
    batch_tokens: int
    lora_rank: int | None
    """None: no adapters."""
    lora_modules: tuple[str, ...]
    """Modules that adapters change. By default vLLM adds the output head, and then fails to score prompts."""
    tensor_parallel_size: int
    gpu_memory_utilization: float
    quantization: str | None
    trust_remote_code: bool
    cpu_cache_bytes: int
    """Size of the key-value cache on a CPU; on a GPU it gets the rest of vLLM's share of memory."""
    prefix_caching: bool = False
    """For generation: reuse keys and values of shared prefixes. Excludes capturing attention."""


@dataclass(frozen=True)
class Request:
    """Sequences to score."""

    sequences: list[NDArray[np.int32]]
    response_masks: list[NDArray[np.bool_]]
    """[T] each, with at least one response token; token 0 is never one."""
    adapter: tuple[int, str] | None
    """The adapter's unique number and its folder."""
    loss: bool = True
    top: int = 0
    """How many of the likeliest tokens' log-probabilities are wanted, at each response token."""


@dataclass(frozen=True)
class Reply:
    """The answer to a spec or a request."""

    problem: str | None = None
    """The error, in one line."""
    losses: list[NDArray[np.float32]] | None = None
    """Losses of each sequence's response tokens, in nats; None if not requested."""
    attention: list[NDArray[np.float32]] | None = None
    """Prompt attention of each sequence's response tokens; None if not requested."""
    top: list[NDArray[np.float32]] | None = None
    """Log-probabilities of the likeliest tokens, [n, `Request.top`] for each sequence, the highest first; None if not
    requested."""
    generated: list[Generated] | None = None
    """What was generated after each prefix; None if not requested."""


class Vllm:
    """vLLM with one model."""

    def __init__(self, spec: EngineSpec) -> None:
        """Load the model."""
        from vllm import LLM
        from vllm.platforms import current_platform

        self._spec = spec
        settings: dict[str, Any] = {
            "max_model_len": spec.longest + 1,  # a request has to leave room for one new token
            "max_num_batched_tokens": max(spec.batch_tokens, spec.longest + 1),
            "enable_chunked_prefill": spec.prefix_caching,  # attention is captured on whole sequences
            "enable_prefix_caching": spec.prefix_caching,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "logprobs_mode": "raw_logprobs",
            "max_logprobs": MOST_TOP,
            "disable_log_stats": True,
            "load_format": "safetensors",
            "distributed_executor_backend": "uni" if spec.tensor_parallel_size == 1 else "mp",
        }
        if spec.layer is not None:
            settings["worker_extension_cls"] = "sstoken.stages.backends.vllm_attention.AttentionExtension"
        if spec.lora_rank is not None:
            settings |= {"enable_lora": True, "max_lora_rank": spec.lora_rank, "max_loras": 1}
            settings["lora_target_modules"] = list(spec.lora_modules)
        if current_platform.is_cpu():  # else a share of all memory
            settings["kv_cache_memory_bytes"] = spec.cpu_cache_bytes
        self._llm = LLM(
            spec.model,
            revision=spec.revision,
            dtype=spec.dtype,
            tensor_parallel_size=spec.tensor_parallel_size,
            gpu_memory_utilization=spec.gpu_memory_utilization,
            quantization=spec.quantization,
            trust_remote_code=spec.trust_remote_code,
            **settings,
        )
        self._config = self._llm.llm_engine.vllm_config
        if spec.layer is not None:
            self._attach(spec.layer)

    def _attach(self, layer: int) -> None:
        if (
            self._config.scheduler_config.enable_chunked_prefill
            or self._config.cache_config.enable_prefix_caching
        ):
            raise EngineError("vLLM keeps chunked prefill or prefix caching on for this model")
        attached = self._llm.collective_rpc("sstoken_attach", args=(layer,))
        for worker in attached:
            if "problem" in worker:
                raise EngineError(worker["problem"])
        heads = [worker["heads"] for worker in attached]
        total = self._config.model_config.hf_text_config.num_attention_heads
        if sum(heads) != total or len(set(heads)) != 1:
            raise EngineError(
                f"the {total} heads are spread as {heads} over the workers; legal is an equal share each"
            )

    def generate(self, prefixes: Prefixes) -> Reply:
        """Return continuations or candidates."""
        return Reply(generated=generate(self._llm, prefixes, _lora(prefixes.adapter)))

    def score(self, request: Request) -> Reply:
        """Return losses, and attention if a layer is captured."""
        from vllm import TokensPrompt

        names = self._expect(request) if self._spec.layer is not None else []
        pairs = list(zip(request.sequences, request.response_masks, strict=True))
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=ids.tolist()) for ids in request.sequences],
            [self._sampling(ids, mask, request) for ids, mask in pairs],
            use_tqdm=False,
            lora_request=_lora(request.adapter),
        )
        scored = [(output, *pair) for output, pair in zip(outputs, pairs, strict=True)]
        flat = request.top > 0
        return Reply(
            losses=[self._loss(*each, flat=flat) for each in scored] if request.loss else None,
            attention=self._take(names) if self._spec.layer is not None else None,
            top=[_top(*each, request.top) for each in scored] if request.top else None,
        )

    def _sampling(self, ids: NDArray[np.int32], mask: NDArray[np.bool_], request: Request) -> Any:
        from vllm import SamplingParams

        wanted: dict[str, Any] = {}
        if request.top:
            wanted = {"prompt_logprobs": request.top, "flat_logprobs": True}
        elif request.loss and self._config.use_v2_model_runner:  # it can skip the prompt's logits
            first = int(mask.argmax())
            wanted = {
                "prompt_logprob_token_ids": ids[first:, None].astype(np.int64),
                "prompt_logprob_start": first - 1,
            }
        elif request.loss:
            wanted = {"prompt_logprobs": 0, "flat_logprobs": True}
        return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **wanted)

    def _loss(
        self, output: Any, ids: NDArray[np.int32], mask: NDArray[np.bool_], *, flat: bool
    ) -> NDArray[np.float32]:
        """Return the losses of the response tokens, in nats; `flat`: they are among the prompt's log-probabilities."""
        if self._config.use_v2_model_runner and not flat:
            scored = output.prompt_token_id_logprobs
            first = int(mask.argmax())
            if scored is None or scored.shape != (ids.size - first, 1):
                raise EngineError(
                    f"vLLM scored {None if scored is None else scored.shape} of {ids.size - first} tokens"
                )
            return -scored[:, 0][mask[first:]].astype(np.float32)
        entries, values = _entries(output, ids, mask)
        return -values[entries]

    def _expect(self, request: Request) -> list[tuple[bytes, int]]:
        """Announce the sequences to the workers; return what identifies each: digest and index of its mask."""
        from sstoken.stages.backends.vllm_attention import digest

        wanted: dict[bytes, list[NDArray[np.bool_]]] = {}
        names = []
        for ids, mask in zip(request.sequences, request.response_masks, strict=True):
            name = digest(ids)
            masks = wanted.setdefault(name, [])
            known = [i for i, other in enumerate(masks) if np.array_equal(other, mask)]
            names.append((name, known[0] if known else len(masks)))
            if not known:
                masks.append(mask)
        self._llm.collective_rpc("sstoken_expect", args=(wanted,))
        return names

    def _take(self, names: list[tuple[bytes, int]]) -> list[NDArray[np.float32]]:
        """Return the mean over the workers, which have equal numbers of heads."""
        taken = self._llm.collective_rpc("sstoken_take")
        for worker in taken:
            if worker["problem"] is not None:
                raise EngineError(worker["problem"])
            limit = MAX_DEVIATION[str(self._config.model_config.dtype).removeprefix("torch.")]
            if worker["deviation"] is None or worker["deviation"] > limit:  # NaN passes: the loss reports it
                raise EngineError(
                    "recomputing attention from vLLM's queries and keys does not reproduce the layer's output: "
                    f"relative error {worker['deviation']}"
                )
        shares = [[worker["attention"][name][variant] for name, variant in names] for worker in taken]
        return [np.mean(of_one, axis=0, dtype=np.float32) for of_one in zip(*shares, strict=True)]


def _entries(
    output: Any, ids: NDArray[np.int32], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return where each response token stands among the prompt's log-probabilities, and all of these in one array.

    The first entry of a position is the prompt's own token; the likeliest tokens follow, its own among them again.
    """
    flat = output.prompt_logprobs
    if flat is None or len(flat) != ids.size:
        raise EngineError(f"vLLM scored {None if flat is None else len(flat)} of {ids.size} tokens")
    entries = np.asarray(flat.start_indices, dtype=np.int64)[mask]
    if not np.array_equal(np.asarray(flat.token_ids)[entries], ids[mask]):
        raise EngineError("vLLM's log-probabilities are of other tokens than the sequence's")
    return entries, np.asarray(flat.logprobs, dtype=np.float32)


def _top(output: Any, ids: NDArray[np.int32], mask: NDArray[np.bool_], number: int) -> NDArray[np.float32]:
    """Return log-probabilities of the likeliest tokens at each response token, [n, number], the highest first."""
    entries, values = _entries(output, ids, mask)
    counts = np.asarray(output.prompt_logprobs.end_indices)[mask] - entries
    if (counts != 1 + number).any():
        raise EngineError(f"vLLM gave {counts.min() - 1} of the {number} likeliest tokens")
    return -np.sort(-values[entries[:, None] + np.arange(1, number + 1)], axis=1)


def _lora(adapter: tuple[int, str] | None) -> Any:
    """Return vLLM's request object for an adapter."""
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter-{adapter[0]}", *adapter)


def _answer(connection: Connection) -> None:
    vllm: Vllm | None = None
    while True:
        asked = connection.recv()
        try:
            if vllm is None:
                vllm = Vllm(asked)
                reply = Reply()
            elif isinstance(asked, Request):
                reply = vllm.score(asked)
            else:
                reply = vllm.generate(asked)
        except Exception as error:  # vLLM raises anything
            import traceback

            traceback.print_exc()
            reply = Reply(problem=one_line(error))
        connection.send(reply)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Entry point of the process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _answer(Connection(int(sys.argv[1])))
    except (EOFError, ConnectionError):
        os._exit(0)


if __name__ == "__main__":
    # so that replies are pickled as this module's, not __main__'s
    from sstoken.stages.backends import vllm_engine

    vllm_engine.main()
