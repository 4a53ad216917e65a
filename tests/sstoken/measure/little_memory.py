"""Run as a program: scores with a budget that does not fit in the memory that is left; prints what became of it."""

import resource

import numpy as np
import torch

from sstoken.measure.scorer import Scorer
from tests.factories import tiny_llama


def main() -> None:
    torch.set_num_threads(1)
    model = tiny_llama(
        vocab_size=500,
        hidden_size=256,
        intermediate_size=8192,
        num_hidden_layers=1,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    scorer = Scorer(model.eval(), signals=["loss", "attention"], batch_tokens=8192)
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 500, 256).astype(np.int32) for _ in range(40)]
    masks = [np.arange(256) > 100 for _ in sequences]
    list(scorer.measure(sequences[:1], masks[:1]))  # what libraries map on first use is mapped
    with open("/proc/self/statm") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (300 << 20), resource.RLIM_INFINITY))
    found = dict(scorer.measure(sequences, masks))
    assert found.keys() == set(range(len(sequences)))
    assert all(np.isfinite(signals["loss"]).all() for signals in found.values())
    print(scorer.batch_tokens)


if __name__ == "__main__":
    main()
