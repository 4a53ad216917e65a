"""Rotary embeddings that depend on a batch's longest row: a row's losses are those of the row alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from sstoken.measure.rope import length_class, longest
from sstoken.measure.scorer import Scorer
from tests.sstoken.measure import architectures
from tests.support import slow_but

ORIGINAL = 16
SIZES = {name: size for name, size in architectures.SIZES.items() if name != "head_dim"}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 6,
    "long_factor": [1.5, 2.0, 4.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": ORIGINAL,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


def dynamic_sizes():
    return SIZES | {"max_position_embeddings": ORIGINAL}


MODELS = {
    "longrope": lambda: Phi3ForCausalLM(
        Phi3Config(**SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL)
    ),
    "dynamic": lambda: LlamaForCausalLM(LlamaConfig(**dynamic_sizes(), rope_parameters=DYNAMIC)),
    "dynamic in one kind of layer": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **dynamic_sizes(),
            head_dim=12,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            rope_parameters={
                "full_attention": DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        )
    ),
}


def make(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def alone(kind, ids):
    """By a model that has seen nothing else."""
    with torch.no_grad():
        log_p = make(kind)(torch.tensor(ids[None]).long()).logits[0].log_softmax(-1)
    return -log_p[torch.arange(ids.size - 1), torch.tensor(ids[1:]).long()].numpy()


def rows(lengths):
    random = np.random.default_rng(0)
    return [random.integers(3, SIZES["vocab_size"], n).astype(np.int32) for n in lengths]


@pytest.mark.parametrize("layout", slow_but(("packed",), ("padded", "packed")))
@pytest.mark.parametrize("kind", MODELS)
@settings(deadline=None, max_examples=8)
@given(lengths=st.lists(st.integers(2, 3 * ORIGINAL), min_size=2, max_size=6))
def test_losses_are_those_of_the_row_alone(kind, layout, lengths):
    lengths = [*lengths, ORIGINAL, ORIGINAL + 1]
    sequences = rows(lengths)
    masks = [np.arange(n) > 0 for n in lengths]
    scorer = Scorer(make(kind), signals=["loss", "attention"], batch_tokens=1000, layout=layout)
    for _ in range(2):  # the second time, long rows have been seen
        for index, signals in scorer.measure(sequences, masks):
            np.testing.assert_allclose(signals["loss"], alone(kind, sequences[index]), atol=2e-5)
            assert np.isfinite(signals["attention"]).all()


@pytest.mark.parametrize("kind", MODELS)
def test_the_right_factors_matter_here(kind):
    """A batch without regard to length would be wrong, so that the test above can fail."""
    short, long = rows([12, 40])
    model = make(kind)
    with torch.no_grad():
        model(torch.tensor(long[None]).long())
        batch = torch.zeros(2, 40, dtype=torch.long)
        batch[0, :12], batch[1] = torch.tensor(short), torch.tensor(long)
        log_p = model(batch).logits[0].log_softmax(-1)
    together = -log_p[torch.arange(11), torch.tensor(short[1:]).long()].numpy()
    assert np.abs(together - alone(kind, short)).max() > 1e-3


def test_rows_on_one_side_share_a_batch():
    kinds = length_class(make("longrope"))
    assert kinds(3) == kinds(ORIGINAL) != kinds(ORIGINAL + 1) == kinds(200)
    kinds = length_class(make("dynamic"))
    assert kinds(3) == kinds(ORIGINAL) != kinds(ORIGINAL + 1) != kinds(ORIGINAL + 2)


def test_of_other_models_the_length_does_not_matter():
    assert length_class(LlamaForCausalLM(LlamaConfig(**SIZES))) is None
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    }
    assert length_class(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=yarn))) is None


@pytest.mark.parametrize(
    ("positions", "rope", "expected"),
    [
        (64, {"rope_type": "default"}, 64),
        (64, {"rope_type": "dynamic", "factor": 4.0}, 256),
        (64, {"rope_type": "linear", "factor": 4.0}, 256),
        (64, {"rope_type": "yarn", "factor": 4.0}, 256),
        (64, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (256, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        (256, LLAMA3, 256),
    ],
)
def test_a_stretched_model_takes_longer_rows(positions, rope, expected):
    config = LlamaConfig(
        **SIZES | {"max_position_embeddings": positions}, rope_parameters={"rope_theta": 1e4} | rope
    )
    assert longest(config) == expected
