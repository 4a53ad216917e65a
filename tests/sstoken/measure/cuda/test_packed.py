"""Packed batches through transformers models: as each sequence alone, with no mask of tokens by tokens."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from sstoken.measure.batch import segments_of
from sstoken.measure.capture import IMPLEMENTATION, AttentionCapture
from sstoken.measure.cuda.packed import (
    IMPLEMENTATION_PACKED,
    check_packed,
    describe_packed,
    packed_inputs,
)
from tests.sstoken.measure.architectures import ARCHITECTURES, VOCABULARY, make_model

LENGTHS = [40, 7, 1, 61, 23, 2]  # longer and shorter than the window of 16


def random_batch(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) < 0.5 for n in lengths]
    return sequences, masks


@torch.no_grad()
def losses_and_attention(model, inputs, response_mask, segments, layer):
    capture = AttentionCapture(model, layer)
    capture.expect(response_mask, segments)
    logits = model(**inputs).logits[0]
    attention = capture.take()[0]
    capture.detach()
    return logits, attention


def eager_alone(name, ids, mask, layer):
    """One sequence from the definition, in float64."""
    model = make_model(name).double()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=ids[None], output_attentions=True, use_cache=False)
    prompt = torch.where(mask[None, :], 0.0, 1.0).double()
    mass = (out.attentions[layer][0] * prompt).sum(-1).mean(0) * mask
    return out.logits[0], mass


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layer", [-1, 1])
def test_a_packed_batch_gives_what_each_sequence_gives_alone(name, layer):
    model = make_model(name)
    model.set_attn_implementation(IMPLEMENTATION_PACKED)
    sequences, masks = random_batch()
    logits, attention = losses_and_attention(
        model, packed_inputs(sequences, "cpu"), torch.cat(masks)[None], segments_of(LENGTHS), layer
    )
    log_p = logits.log_softmax(-1)
    for ids, mask, (_, start, stop) in zip(sequences, masks, segments_of(LENGTHS), strict=True):
        expected_logits, expected_mass = eager_alone(name, ids, mask, layer)
        expected = expected_logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])
        found = log_p[start : stop - 1].gather(1, ids[1:, None])
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(attention[start:stop].double(), expected_mass, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_passes_the_check_and_is_left_as_it_was(name):
    model = make_model(name)
    model.set_attn_implementation(IMPLEMENTATION)
    assert check_packed(model) is None
    assert model.config._attn_implementation == IMPLEMENTATION
    assert {choice.name for choice in describe_packed(model)} == {"loop"}


def test_no_mask_is_made():
    mask_function = AttentionMaskInterface()[IMPLEMENTATION_PACKED]
    assert mask_function(use_vmap=False, attention_mask=None, q_length=10, kv_length=10) is None


def test_rows_of_a_padded_batch_are_sequences_of_their_own():
    model = make_model("mistral-window")
    sequences, _ = random_batch([40, 33])
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    with torch.no_grad():
        expected = model(padded, use_cache=False).logits
        model.set_attn_implementation(IMPLEMENTATION_PACKED)
        found = model(padded, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def forgets_bounds(model):
    """An architecture that does not hand the bounds of the sequences to its attention."""
    for layer in model.model.layers:
        forward = layer.self_attn.forward

        def without(*args, forward=forward, **kwargs):
            kwargs.pop("cu_seq_lens_q", None)
            return forward(*args, **kwargs)

        layer.self_attn.forward = without
    return model


def test_what_cannot_be_packed_is_refused_with_the_reason():
    assert "apart from single sequences" in check_packed(forgets_bounds(make_model("llama")))
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    assert check_packed(bloom) is not None
    assert check_packed(MambaForCausalLM(MambaConfig(**small))) is not None
    chunked = make_model("llama")
    chunked.config.attention_chunk_size = 8
    assert check_packed(chunked) == "its attention works in chunks"
    hybrid = make_model("qwen3")
    hybrid.config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    assert check_packed(hybrid) == "it has layers of the kind linear_attention"
