"""What vLLM generates after some prefixes; runs in the engine's process."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sstoken.measure.branches import IdArray

MOST_CANDIDATES = 16
_TIES = 4
"""Candidates looked at beyond those asked for, so that of equally likely ones the lower ids are taken. vLLM gives no
more than 20."""


@dataclass(frozen=True)
class Prefixes:
    """What to go on from."""

    prefixes: list[IdArray]
    """Token ids, [T] each."""
    stop: tuple[int, ...]
    max_new_tokens: tuple[int, ...]
    """The most tokens to generate after each prefix."""
    candidates: int
    """Give that many candidates of the next token, and continue no prefix; 0: continue them."""
    adapter: tuple[int, str] | None
    """A number of its own for each adapter, and its folder."""


@dataclass(frozen=True)
class Generated:
    """What comes after one prefix."""

    ids: IdArray
    """The continuation, without the token on which it stopped; or the candidates, likeliest first."""
    ended: bool
    """It stopped by itself."""
    reused: int
    """How many of the prefix's tokens were in the cache."""


def generate(llm: Any, asked: Prefixes, lora: Any) -> list[Generated]:
    """Go on from each prefix, or give its candidates.

    The longest go first: the others find their keys and values in the cache.
    """
    from vllm import SamplingParams, TokensPrompt

    order = sorted(range(len(asked.prefixes)), key=lambda i: -asked.prefixes[i].size)
    more = {"logprobs": asked.candidates + _TIES} if asked.candidates else {}
    params = [
        SamplingParams(
            max_tokens=1 if asked.candidates else asked.max_new_tokens[i],
            temperature=0.0,
            stop_token_ids=list(asked.stop),
            ignore_eos=True,  # the ids given are all that stop it
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
    (said,) = output.outputs
    reused = output.num_cached_tokens or 0
    if candidates:
        ranked = sorted((-found.logprob, token) for token, found in said.logprobs[0].items())
        return Generated(np.array([token for _, token in ranked[:candidates]], np.int32), True, reused)
    ended = said.finish_reason == "stop"
    ids = list(said.token_ids)
    return Generated(np.array(ids[:-1] if ended else ids, np.int32), ended, reused)
