"""What the capture inside vLLM makes of a step: whole sequences, each measured once a mask, checked against the output.

The layer stands in for vLLM's; it computes attention the plain way. That vLLM's own is read right: tests/vllm.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sstoken.stages.backends.vllm_attention import LayerCapture, digest

HEADS, KV_HEADS, SIZE = 4, 2, 8


class PlainBackend:
    """softmax(scale * q k) v over the flat tokens of a step, each sequence by itself."""

    def __init__(self, scale, softcap=0.0, sinks=None):
        self.scale, self.logits_soft_cap, self.sinks = scale, softcap, sinks
        self.true = {"scale": scale, "window": None, "softcap": softcap}

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        for start, stop in attn_metadata.pieces:
            q, k, v = (
                x[start:stop].view(stop - start, -1, SIZE).transpose(0, 1) for x in (query, key, value)
            )
            k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
            scores = q @ k.transpose(1, 2) * self.true["scale"]
            if self.true["softcap"]:
                scores = self.true["softcap"] * torch.tanh(scores / self.true["softcap"])
            behind = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
            hidden = (behind < 0) | (behind >= (self.true["window"] or stop))
            scores = scores.masked_fill(hidden, float("-inf"))
            if self.sinks is not None:
                scores = torch.cat([scores, self.sinks[:, None, None].expand(*scores.shape[:2], 1)], -1)
            weights = scores.softmax(-1)[..., : stop - start]
            output[start:stop] = (weights @ v).transpose(0, 1).flatten(1)
            self.weights = weights
        return output


class Model(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention, self.random = attention, torch.Generator().manual_seed(0)

    def forward(self, input_ids, positions, pieces):
        n = input_ids.shape[0]
        q, k, v = (torch.randn(n, h * SIZE, generator=self.random) for h in (HEADS, KV_HEADS, KV_HEADS))
        metadata = SimpleNamespace(num_actual_tokens=pieces[-1][1], pieces=pieces)
        output = torch.zeros(n, HEADS * SIZE)
        return self.attention.impl.forward(
            self.attention, q, k, v, None, attn_metadata=metadata, output=output
        )


def make(window=None, **settings):
    backend = PlainBackend(SIZE**-0.5, **settings)
    attention = SimpleNamespace(impl=backend, num_heads=HEADS, num_kv_heads=KV_HEADS, sliding_window=window)
    backend.true["window"] = window
    model = Model(attention)
    return LayerCapture(attention, model), model, backend


def step(model, sequences, *, padding=3, first=0):
    """One forward pass over the sequences, with the padding that graphs of fixed sizes bring."""
    ends = np.cumsum([0, *map(len, sequences)]).tolist()
    ids = torch.tensor([*np.concatenate(sequences), *[0] * padding])
    positions = torch.tensor([*(p + first for s in sequences for p in range(len(s))), *[0] * padding])
    model(ids, positions, pieces=list(zip(ends, ends[1:], strict=False)))


def masks_of(length, *firsts):
    return [np.arange(length) >= first for first in firsts]


@pytest.mark.parametrize(
    "settings", [{}, {"softcap": 3.0}, {"window": 6}, {"sinks": torch.tensor([0.5, 2.0, -1.0, 0.1])}]
)
def test_prompt_attention_is_the_mass_on_the_prompt_and_the_check_agrees(settings):
    capture, model, backend = make(**settings)
    ids, (mask,) = np.arange(5, 25), masks_of(20, 8)
    capture.expect({digest(ids): [mask]})
    step(model, [ids])
    taken = capture.take()
    assert taken["problem"] is None
    assert taken["deviation"] < 1e-6
    expected = backend.weights[:, mask][..., ~mask].sum(-1).mean(0).numpy()
    np.testing.assert_allclose(taken["attention"][digest(ids)][0], expected, atol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("scale", 0.2), ("window", 4), ("softcap", 1.0)])
def test_a_layer_that_computes_otherwise_than_it_says_shows(name, value):
    capture, model, backend = make()
    backend.true[name] = value
    ids = np.arange(5, 25)
    capture.expect({digest(ids): masks_of(20, 8)})
    step(model, [ids])
    assert capture.take()["deviation"] > 1e-2


def test_sequences_of_a_step_are_told_apart_and_masks_of_the_same_tokens_too():
    capture, model, _ = make()
    one, two = np.arange(5, 17), np.arange(40, 49)
    wanted = {digest(one): masks_of(12, 3, 7), digest(two): masks_of(9, 4)}
    capture.expect(wanted)
    step(model, [two, one])
    attention = capture.take()["attention"]
    assert [len(x) for x in attention[digest(one)]] == [9, 5]
    assert [len(x) for x in attention[digest(two)]] == [5]
    assert attention[digest(one)][0][-1] < attention[digest(one)][1][-1]  # a longer prompt holds more


def test_steps_before_and_after_are_not_measured():
    capture, model, _ = make()
    ids = np.arange(5, 25)
    step(model, [ids])
    capture.expect({digest(ids): masks_of(20, 8)})
    step(model, [ids])
    assert capture.take()["attention"]
    step(model, [ids])
    assert not capture.take()["attention"]


def test_a_sequence_in_pieces_is_a_problem():
    capture, model, _ = make()
    ids = np.arange(5, 25)
    capture.expect({digest(ids): masks_of(20, 8)})
    step(model, [ids[:12]])
    assert "12 tokens arrived" in capture.take()["problem"]
    capture.expect({digest(ids): masks_of(20, 8)})
    step(model, [ids[12:]], first=12)
    assert "arrived in pieces" in capture.take()["problem"]


def test_a_backend_that_is_called_otherwise_is_refused():
    attention = SimpleNamespace(
        impl=SimpleNamespace(scale=1.0, forward=lambda q, k, v: v),
        num_heads=4,
        num_kv_heads=2,
        sliding_window=None,
    )
    with pytest.raises(
        Exception, match="forward has no attn_metadata, key, output, query, value in this vLLM"
    ):
        LayerCapture(attention, torch.nn.Identity())
