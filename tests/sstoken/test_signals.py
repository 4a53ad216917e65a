"""Losses and attention importance against eager attention and full logits, architecture by architecture."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sstoken.attention import IMPLEMENTATION, AttentionCapture, ForwardStopped
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
    model.set_attn_implementation("eager")
    with pytest.raises(UsageError, match=r"attn_implementation='eager'.* cannot be captured; load .*'sdpa'"):
        AttentionCapture(model)
    model.set_attn_implementation("sdpa")
    capture = AttentionCapture(model)
    model.set_attn_implementation("eager")  # its layers no longer go through the interface
    capture.expect(torch.ones(1, 4, dtype=torch.bool))
    model(input_ids=torch.arange(4)[None])
    with pytest.raises(SstokenError, match="cannot be captured"):
        capture.take()


@pytest.mark.parametrize("implementation", ["sdpa", IMPLEMENTATION])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@pytest.mark.parametrize("layout", ["left", "packed"])
def test_sequences_are_found_wherever_they_stand(name, implementation, layout):
    model = make_model(name)
    model.set_attn_implementation(implementation)
    lengths = [31, 9, 24]
    sequences, masks = random_examples(3, lengths)
    if layout == "packed":
        stops = np.cumsum(lengths)
        segments = [(0, int(stop - n), int(stop)) for n, stop in zip(lengths, stops, strict=True)]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        inputs = {"position_ids": positions}
        shape = (1, sum(lengths))
    else:
        shape = (3, max(lengths))
        segments = [(row, shape[1] - n, shape[1]) for row, n in enumerate(lengths)]
        inputs = {"attention_mask": torch.zeros(shape, dtype=torch.long)}
        for row, start, stop in segments:
            inputs["attention_mask"][row, start:stop] = 1
    ids, response = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for (row, start, stop), sequence, mask in zip(segments, sequences, masks, strict=True):
        ids[row, start:stop] = torch.tensor(sequence)
        response[row, start:stop] = torch.tensor(mask)
    capture = AttentionCapture(model)
    capture.expect(response, segments)
    model(input_ids=ids, use_cache=False, **inputs)
    found = capture.take()
    for (row, start, stop), sequence, mask in zip(segments, sequences, masks, strict=True):
        _, attention = eager_signals(name, sequence.tolist(), mask, -1)
        np.testing.assert_allclose(
            found[row, start:stop].detach(), np.nan_to_num(attention), atol=1e-5, rtol=0
        )


def test_a_forward_for_attention_alone_stops_at_its_layer():
    model = make_model("llama")
    model.set_attn_implementation(IMPLEMENTATION)
    capture = AttentionCapture(model, layer=1)
    ids, response = torch.arange(20)[None], torch.arange(20)[None] > 8
    capture.expect(response)
    model(input_ids=ids)
    expected = capture.take()
    capture.expect(response, stop=True)
    reached: list[int] = []
    model.model.layers[2].register_forward_pre_hook(lambda *_: reached.append(2))
    with pytest.raises(ForwardStopped):
        model(input_ids=ids)
    assert not reached
    torch.testing.assert_close(capture.take(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_capture_under_gradient_checkpointing_happens_once(use_reentrant):
    ids, response = torch.arange(30)[None], torch.arange(30)[None] > 11
    gradients, captured = [], []
    for checkpointing in (False, True):
        model = make_model("llama").train()
        model.set_attn_implementation("sdpa")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        capture = AttentionCapture(model)
        measured: list[int] = []
        measure = capture.measure
        capture.measure = lambda *a, m=measure, n=measured, **k: (n.append(1), m(*a, **k))
        capture.expect(response)
        padded = torch.ones_like(ids)
        padded[0, :3] = 0  # so that there is a mask
        loss = model(input_ids=ids, attention_mask=padded, labels=ids, use_cache=False).loss
        captured.append(capture.take())
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert measured == [1]
    torch.testing.assert_close(captured[0], captured[1])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_detach_leaves_the_model_as_it_was():
    model = make_model("llama")
    before = {id(m): set(vars(m)) for m in model.modules()}
    capture = AttentionCapture(model)
    assert {id(m): set(vars(m)) for m in model.modules()} != before
    capture.detach()
    assert {id(m): set(vars(m)) for m in model.modules()} == before


def test_options_are_hashable():
    assert hash(BackendOptions("m", True, -1, "float32", "cpu", 1, False))
