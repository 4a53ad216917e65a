"""Attention by blocks of rows on a CPU, against float64 and all weights at once."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sstoken.measure import cpu_attention
from tests.sstoken.measure.architectures import ARCHITECTURES, make_model
from tests.sstoken.measure.test_signals import check, random_examples
from tests.support import needs_compiler


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of a few rows, for short sequences, whatever the number of threads."""
    monkeypatch.setattr(cpu_attention, "_LENGTHS", range(1, 400))
    monkeypatch.setattr(cpu_attention, "_ROWS", 7)
    monkeypatch.setattr(cpu_attention, "_HEADS_PER_THREAD", 0)


@pytest.fixture
def taken(monkeypatch):
    """The lengths of the batches that were attended to by blocks."""
    lengths, attend = [], cpu_attention.attend_by_blocks

    def counted(query, *args):
        found = attend(query, *args)
        if found is not None:
            lengths.append(query.shape[2])
        return found

    monkeypatch.setattr(cpu_attention, "attend_by_blocks", counted)
    return lengths


def states(batch, heads, kv_heads, length, size, seed=0, dtype=torch.float32):
    """Query, key and value as models hand them over: positions before heads in memory."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, n, size, generator=generator).to(dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads)
    ]


@torch.inference_mode()
def causal_attention(*args):
    """As a scorer calls it: elsewhere it is sdpa's kernel."""
    return cpu_attention.causal_attention(*args)


def expected(query, key, value, scaling, response_mask):
    """All weights at once, in float64."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (s.double() for s in (query, key, value))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = (query @ key.transpose(2, 3) * scaling).masked_fill(future, -torch.inf).softmax(-1)
    on_prompt = (weights * ~response_mask[:, None, None]).sum(-1).mean(1)
    return (weights @ value).transpose(1, 2), on_prompt * response_mask


@given(
    st.integers(1, 3), st.integers(1, 60), st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.sampled_from([1, 8, 12]), st.floats(0.01, 1), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_agrees_with_all_weights_at_once(batch, length, heads, size, scaling, seed):
    inputs = states(batch, *heads, length, size, seed)
    response = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    output, importance = expected(*inputs, scaling, response)
    torch.testing.assert_close(causal_attention(*inputs, scaling).double(), output, atol=1e-5, rtol=1e-5)
    found = cpu_attention.attend_by_blocks(*inputs, scaling, response)
    assert found is not None
    torch.testing.assert_close(found[0].double(), output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1].double(), importance, atol=1e-5, rtol=0)


@pytest.mark.parametrize("offset", [-200.0, 200.0])
def test_scores_beyond_what_exponentials_hold_are_left_to_sdpa(offset):
    query, key, value = states(2, 4, 4, 30, 8)
    query[..., 0], key[..., 0] = 1.0, offset  # every score of a row moves alike: weights stay what they were
    response = torch.zeros(2, 30, dtype=torch.bool)
    assert cpu_attention.attend_by_blocks(query, key, value, 1.0) is None
    output, _ = expected(query, key, value, 1.0, response)
    torch.testing.assert_close(
        causal_attention(query, key, value, 1.0).double(), output, atol=1e-4, rtol=1e-4
    )


def test_a_future_score_beyond_what_exponentials_hold_does_not_matter():
    query, key, value = states(1, 4, 4, 7, 8)
    key[:, :, -1] = 0
    query[..., 0], key[:, :, -1, 0] = 1.0, 300.0
    query[:, :, -1, 0] = 0.0  # the last row alone sees that key
    response = torch.ones(1, 7, dtype=torch.bool)
    found = cpu_attention.attend_by_blocks(query, key, value, 1.0, response)
    assert found is not None
    torch.testing.assert_close(
        found[0].double(), expected(query, key, value, 1.0, response)[0], atol=1e-5, rtol=1e-5
    )


def test_nan_is_passed_on():
    query, key, value = states(1, 4, 4, 20, 8)
    value[0, 0, 3] = torch.nan
    query[0, 1, 5] = torch.nan
    output = causal_attention(query, key, value, 1.0)
    assert output[0, 3:, 0].isnan().all()
    assert output[0, 5, 1].isnan().all()


def test_left_to_sdpa_where_that_is_faster_or_more_exact(monkeypatch):
    assert cpu_attention.attend_by_blocks(*states(1, 4, 4, 400, 8), 1.0) is None
    assert cpu_attention.attend_by_blocks(*states(1, 4, 4, 30, 8, dtype=torch.bfloat16), 1.0) is None
    monkeypatch.setattr(cpu_attention, "_HEADS_PER_THREAD", 5)
    assert cpu_attention.attend_by_blocks(*states(1, 4, 4, 30, 8), 1.0) is None


@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_agrees_with_eager(name, layer, taken):
    sequences, masks = random_examples(1, [40, 7, 40, 2, 61, 23, 1])
    check(make_model(name), name, layer, sequences, masks, batch_tokens=128)
    if name in ("llama", "llama-tied", "qwen3"):
        assert 61 in taken


@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(1, 300), st.integers(0, 99))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_composition_gives_the_same(lengths, batch_tokens, seed):
    sequences, masks = random_examples(seed, lengths)
    check(make_model("llama"), "llama", -1, sequences, masks, batch_tokens=batch_tokens)


@needs_compiler
def test_compiled_layers_give_the_same(taken):
    sequences, masks = random_examples(8, [33, 12, 33, 50])
    check(make_model("llama"), "llama", 1, sequences, masks, batch_tokens=100, compiled=True)
    assert 50 in taken


def test_outside_inference_mode_it_is_left_to_sdpa(taken):
    inputs = states(1, 4, 4, 30, 8)
    causal_attention(*inputs, 1.0)
    assert taken == [30]
    cpu_attention.causal_attention(*inputs, 1.0)
    assert taken == [30]
