"""Losses and attention importance against eager attention and full logits, architecture by architecture."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sstoken.attention import IMPLEMENTATION, AttentionCapture
from sstoken.errors import SstokenError, UsageError
from sstoken.losses import OutputHead, read_head, token_losses
from stages.backends import BackendOptions, hf
from tests.sstoken.models import ARCHITECTURES, VOCABULARY, make_model


def eager_signals(model, ids, mask, layer):
    """One sequence, straight from the definition: all logits, all attention weights, in float64."""
    twin = make_model(model).double()
    twin.set_attn_implementation("eager")
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")  # the grouped product has no float64
    with torch.no_grad():
        out = twin(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False)
    log_p = out.logits[0].log_softmax(-1)
    weights = out.attentions[layer][0]
    loss, attention = np.full(len(ids), np.nan), np.full(len(ids), np.nan)
    for i in np.flatnonzero(mask):
        loss[i] = -log_p[i - 1, ids[i]]
        prompt = [j for j in range(i) if not mask[j]]
        attention[i] = weights[:, i, prompt].sum(-1).mean()
    return loss, attention


def backend_for(model, layer, batch_tokens):
    """The real backend on a model in memory."""
    backend = object.__new__(hf.HFBackend)
    backend._model, backend._device, backend._batch_tokens = model, "cpu", batch_tokens
    backend._head = read_head(model)
    backend._capture = AttentionCapture(model, layer)
    return backend


def random_examples(seed, lengths):
    """Token ids and response masks of several turns; token 0 is never a response."""
    random = np.random.default_rng(seed)
    sequences = [random.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]
    masks = [np.repeat(random.random(n // 5 + 1) < 0.6, 5)[:n] for n in lengths]
    for mask in masks:
        mask[0] = False
    return sequences, masks


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layer", [-1, 1])
def test_every_architecture_agrees_with_eager(name, layer):
    model = make_model(name)
    model.set_attn_implementation(IMPLEMENTATION)
    sequences, masks = random_examples(1, [40, 7, 40, 2, 61, 23, 1])
    backend = backend_for(model, layer, batch_tokens=128)
    seen = set()
    for index, signals in backend.measure(sequences, masks):
        seen.add(index)
        loss, attention = eager_signals(name, sequences[index].tolist(), masks[index], layer)
        np.testing.assert_allclose(signals.loss, loss, atol=1e-5, rtol=0)
        np.testing.assert_allclose(signals.attention, attention, atol=1e-5, rtol=0)
    assert seen == set(range(7))


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap"])
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(1, 300), st.integers(0, 99))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_composition_gives_the_same(name, lengths, batch_tokens, seed):
    model = make_model(name)
    model.set_attn_implementation(IMPLEMENTATION)
    sequences, masks = random_examples(seed, lengths)
    for index, signals in backend_for(model, -1, batch_tokens).measure(sequences, masks):
        loss, attention = eager_signals(name, sequences[index].tolist(), masks[index], -1)
        np.testing.assert_allclose(signals.loss, loss, atol=1e-5, rtol=0)
        np.testing.assert_allclose(signals.attention, attention, atol=1e-5, rtol=0)


def test_bfloat16_stays_close():
    model = make_model("llama").bfloat16()
    model.set_attn_implementation(IMPLEMENTATION)
    sequences, masks = random_examples(2, [50, 31])
    for index, signals in backend_for(model, -1, 256).measure(sequences, masks):
        loss, attention = eager_signals("llama", sequences[index].tolist(), masks[index], -1)
        assert np.nanmean(np.abs(signals.loss - loss)) < 0.3
        assert np.nanmax(np.abs(signals.attention - attention)) < 0.2


def test_losses_by_tiles_equal_one_softmax():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2500, 8).double(), torch.randn(3000, 8).double()
    head = OutputHead(weight, bias=torch.randn(3000).double(), scale=0.5, softcap=4.0)
    targets = torch.randint(3000, (2500,))
    expected = torch.nn.functional.cross_entropy(head.logits(hidden), targets, reduction="none")
    torch.testing.assert_close(token_losses(hidden, targets, head), expected)
    assert token_losses(hidden[:0], targets[:0], head).shape == (0,)


def test_an_unknown_output_head_is_refused():
    model = make_model("llama")
    forward = model.forward

    def odd(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.abs()
        return output

    model.forward = odd
    with pytest.raises(SstokenError, match="not supported"):
        read_head(model)


def test_a_layer_out_of_range_is_refused():
    with pytest.raises(UsageError, match=r"layer 3: the model has 3 layers; legal is -3 to 2"):
        AttentionCapture(make_model("llama"), layer=3)


def test_attention_that_cannot_be_captured_is_refused():
    model = make_model("llama")
    model.set_attn_implementation("sdpa")
    sequences, masks = random_examples(0, [10])
    with pytest.raises(SstokenError, match="cannot be captured"):
        list(backend_for(model, -1, 256).measure(sequences, masks))


def test_detach_leaves_the_model_as_it_was():
    model = make_model("llama")
    before = {id(m): set(vars(m)) for m in model.modules()}
    capture = AttentionCapture(model)
    assert {id(m): set(vars(m)) for m in model.modules()} != before
    capture.detach()
    assert {id(m): set(vars(m)) for m in model.modules()} == before


def test_options_are_hashable():
    assert hash(BackendOptions("m", True, -1, "float32", "cpu", 1, False))
