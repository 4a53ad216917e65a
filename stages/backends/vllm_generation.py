"""Generate with vLLM after given prefixes, in the engine's process."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sstoken.measure.branches import IdArray

MOST_CANDIDATES = 16
_TIES = 4
"""Extra candidates to request, so that ties go to the lower ids. vLLM returns at most 20."""


@dataclass(frozen=True)
class Prefixes:
    """A request to generate."""

    prefixes: list[IdArray]
    """Token ids, [T] each."""
    stop: tuple[int, ...]
    max_new_tokens: tuple[int, ...]
    """Most tokens to generate after each prefix."""
    candidates: int
    """Return this many candidates for the next token of each prefix; 0: continue the prefixes."""
    adapter: tuple[int, str] | None
    """The adapter's unique number and its folder."""


@dataclass(frozen=True)
class Generated:
    """The result for one prefix."""

    ids: IdArray
    """The continuation without its stop token, or the candidates, likeliest first."""
    ended: bool
    """Whether it ended on a stop token."""
    reused: int
    """Number of the prefix's tokens that were in the cache."""


def generate(llm: Any, asked: Prefixes, lora: Any) -> list[Generated]:
    """Continue each prefix, or return its candidates.

    The longest prefixes go first, so that the others find their keys and values in the cache.
    """
    from vllm import SamplingParams, TokensPrompt

    order = sorted(range(len(asked.prefixes)), key=lambda i: -asked.prefixes[i].size)
    more = {"logprobs": asked.candidates + _TIES} if asked.candidates else {}
    params = [
        SamplingParams(
            max_tokens=1 if asked.candidates else asked.max_new_tokens[i],
            temperature=0.0,
            stop_token_ids=list(asked.stop),
            ignore_eos=True,  # only the given ids stop it
            detokenize=False,
            **more,
        )
        for i in order
    ]
    prompts = [TokensPrompt(prompt_token_ids=asked.prefixes[i].tolist()) for i in order]
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
    generated = {i: _generated(output, asked.candidates) for i, output in zip(order, outputs, strict=True)}
    return [generated[i] for i in range(len(order))]


def _generated(output: Any, candidates: int) -> Generated:
    (completion,) = output.outputs
    reused = output.num_cached_tokens or 0
    if candidates:
        ranked = sorted((-found.logprob, token) for token, found in completion.logprobs[0].items())
        return Generated(np.array([token for _, token in ranked[:candidates]], np.int32), True, reused)
    ended = completion.finish_reason == "stop"
    ids = list(completion.token_ids)
    return Generated(np.array(ids[:-1] if ended else ids, np.int32), ended, reused)
