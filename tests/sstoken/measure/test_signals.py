"""Losses and prompt attention against eager attention and full logits, architecture by architecture."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from sstoken.errors import SstokenError, UsageError
from sstoken.measure.capture import IMPLEMENTATION, AttentionCapture, ForwardStopped
from sstoken.measure.scorer import Scorer
from sstoken.measure.token_loss import OutputHead, read_head, token_losses
from tests.sstoken.measure.architectures import ARCHITECTURES, VOCABULARY, make_model
from tests.support import needs_compiler

BOTH = ("loss", "attention")


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


def random_examples(seed, lengths):
    """Token ids and response masks of several turns; token 0 is never a response."""
    random = np.random.default_rng(seed)
    sequences = [random.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]
    masks = [np.repeat(random.random(n // 5 + 1) < 0.6, 5)[:n] for n in lengths]
    for mask in masks:
        mask[0] = False
    return sequences, masks


def check(model, name, layer, sequences, masks, **how):
    """What the scorer measures is what eager attention and full logits give."""
    seen = set()
    for index, signals in Scorer(model, signals=BOTH, layer=layer, **how).measure(sequences, masks):
        seen.add(index)
        expected_loss, expected_attention = eager_signals(
            name, sequences[index].tolist(), masks[index], layer
        )
        mask = masks[index]
        np.testing.assert_allclose(signals["loss"], expected_loss[mask], atol=1e-5, rtol=0)
        np.testing.assert_allclose(signals["attention"], expected_attention[mask], atol=1e-5, rtol=0)
    assert seen == set(range(len(sequences)))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layer", [-1, 1])
def test_every_architecture_agrees_with_eager(name, layer):
    sequences, masks = random_examples(1, [40, 7, 40, 2, 61, 23, 1])
    check(make_model(name), name, layer, sequences, masks, batch_tokens=128)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ["llama", "gemma2-softcap", "mistral-window"])
@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(1, 300), st.integers(0, 99))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_composition_gives_the_same(name, layout, lengths, batch_tokens, seed):
    sequences, masks = random_examples(seed, lengths)
    check(make_model(name), name, -1, sequences, masks, batch_tokens=batch_tokens, layout=layout)


def test_what_cannot_be_packed_is_refused_or_padded():
    model = make_model("gpt2")
    model._supports_flash_attn = False
    with pytest.raises(SstokenError, match=r"GPT2LMHeadModel: cannot take packed batches \("):
        Scorer(model, layout="packed")
    assert Scorer(model).layout == "padded"


def test_cuda_kernels_on_a_cpu_change_nothing_and_it_is_said():
    sequences, masks = random_examples(5, [40, 7, 33])
    plain, asked = (Scorer(make_model("llama"), signals=BOTH, cuda_kernels=on) for on in (False, True))
    assert (plain.layout, asked.layout) == ("padded", "padded")
    assert asked.remark == f"{plain.remark}; no CUDA kernels on cpu"
    expected = dict(plain.measure(sequences, masks))
    for index, signals in asked.measure(sequences, masks):
        for name in BOTH:
            np.testing.assert_array_equal(signals[name], expected[index][name])


def test_attention_alone_equals_attention_beside_the_loss():
    sequences, masks = random_examples(5, [40, 7, 33])
    both = dict(Scorer(make_model("llama"), signals=BOTH, layer=1).measure(sequences, masks))
    alone = dict(Scorer(make_model("llama"), signals=["attention"], layer=1).measure(sequences, masks))
    for index, signals in alone.items():
        assert list(signals) == ["attention"]
        np.testing.assert_array_equal(signals["attention"], both[index]["attention"])


def test_several_layers_in_one_pass():
    sequences, masks = random_examples(5, [40, 7, 33])
    names = ["attention", "attention@0", "attention@-1", "attention@1", "loss"]
    scorer = Scorer(make_model("llama"), signals=names, layer=0)
    together = dict(scorer.measure(sequences, masks))
    last = make_model("llama").config.num_hidden_layers - 1
    assert scorer.layers == {"attention": 0, "attention@0": 0, "attention@-1": last, "attention@1": 1}
    for name, number in scorer.layers.items():
        alone = Scorer(make_model("llama"), signals=["attention"], layer=number)
        for index, signals in alone.measure(sequences, masks):
            np.testing.assert_array_equal(together[index][name], signals["attention"])


def test_a_batch_that_does_not_fit_is_halved_and_a_sequence_that_does_not_is_an_error(monkeypatch):
    sequences, masks = random_examples(7, [40, 30, 20, 10, 40])
    expected = dict(Scorer(make_model("llama"), signals=BOTH).measure(sequences, masks))
    model, most = make_model("llama"), 50
    forward = model.forward

    def small_memory(input_ids=None, **how):
        if input_ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, **how)

    monkeypatch.setattr(model, "forward", small_memory)
    scorer = Scorer(model, signals=BOTH, batch_tokens=256)
    found = dict(scorer.measure(sequences, masks))
    assert scorer.batch_tokens <= most
    assert found.keys() == expected.keys()
    for index, signals in found.items():
        for name in BOTH:
            np.testing.assert_allclose(signals[name], expected[index][name], atol=1e-5, rtol=0)
    most = 30
    with pytest.raises(SstokenError, match="a sequence of 40 tokens does not fit in memory"):
        list(scorer.measure(sequences, masks))


@pytest.mark.slow
def test_too_little_memory_on_the_cpu_is_found_out(tmp_path):
    """A process that may not map more memory than a small batch needs: real refusals of the allocator."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sstoken.measure.little_memory"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8192


@pytest.mark.slow
@needs_compiler
def test_compiled_layers_give_the_same():
    sequences, masks = random_examples(8, [33, 12, 33, 50])
    torch._dynamo.reset()
    counters.clear()
    check(make_model("llama"), "llama", 1, sequences, masks, batch_tokens=100, compiled=True)
    assert not counters["graph_break"]  # a layer in pieces gains half as much


@needs_compiler
def test_a_model_is_compiled_for_those_who_ask_only():
    sequences, masks = random_examples(8, [33, 12])
    model = make_model("llama")
    for compiled in (True, False):
        torch._dynamo.reset()
        counters.clear()
        list(Scorer(model, signals=BOTH, compiled=compiled).measure(sequences, masks))
        assert (counters["stats"]["calls_captured"] > 0) == compiled


def test_bfloat16_stays_close():
    sequences, masks = random_examples(2, [50, 31])
    for index, signals in Scorer(make_model("llama").bfloat16(), signals=BOTH).measure(sequences, masks):
        expected_loss, expected_attention = eager_signals(
            "llama", sequences[index].tolist(), masks[index], -1
        )
        mask = masks[index]
        assert np.abs(signals["loss"] - expected_loss[mask]).mean() < 0.3
        assert np.abs(signals["attention"] - expected_attention[mask]).max() < 0.2


def test_losses_by_tiles_equal_one_softmax():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2500, 8).double(), torch.randn(3000, 8).double()
    head = OutputHead(weight, bias=torch.randn(3000).double(), scale=0.5, softcap=4.0)
    targets = torch.randint(3000, (2500,))
    expected = torch.nn.functional.cross_entropy(head.logits(hidden), targets, reduction="none")
    torch.testing.assert_close(token_losses(hidden, targets, head), expected)
    assert token_losses(hidden[:0], targets[:0], head).shape == (0,)


def test_logits_far_above_those_of_the_first_tile_do_not_overflow():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8), torch.randn(3000, 8)
    weight[2500] = 400 * hidden[1]
    head, targets = OutputHead(weight), torch.tensor([2500, 2500, 7, 2999, 0])
    logits = hidden.double() @ weight.double().T
    assert logits.max() > logits[:, :1024].max() + 1000
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(token_losses(hidden, targets, head).double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("offset", [-300.0, -38.0, 0.0, 38.0, 300.0])
def test_logits_far_from_zero_lose_nothing(offset):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(50, 8), torch.randn(3000, 8), torch.randint(3000, (50,))
    losses = token_losses(hidden, targets, OutputHead(weight, bias=torch.full((3000,), offset)))
    expected = torch.nn.functional.cross_entropy(
        hidden.double() @ weight.double().T, targets, reduction="none"
    )
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=abs(offset) * 2e-7 + 1e-5)


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
