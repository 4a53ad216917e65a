"""In-loop selection is offline selection: property tests against numpy, and the loss that comes of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sstoken.errors import SstokenError, UsageError
from sstoken.in_loop.loss import kept_loss, self_modulated_loss, token_loss
from sstoken.in_loop.response_tokens import ResponseTokens, find_response_tokens, find_segments
from sstoken.in_loop.rule import Rule
from sstoken.methods import decide, get_method
from sstoken.selection import (
    keep_per_example,
    keep_top_tensor,
    minmax,
    minmax_tensor,
    num_kept,
)

# Few distinct values, so that ties are common; float32, as losses and attention come.
values = st.sampled_from([0.0, -0.0, 0.1, 0.25, 0.5, 1.0, 2.718281828, 1e-8, 30.0])
examples = st.lists(st.lists(st.tuples(values, values, values), max_size=12), min_size=1, max_size=5)
ratios = st.sampled_from([0.01, 0.3, 0.55, 0.6, 0.999, 1.0])
balances = st.sampled_from([0.0, 0.1, 0.5, 1.0])


def batch_of(rows):
    """A padded batch: a prompt token, then the response; the three signals [B, T] float32 and the mask."""
    length = max(len(row) for row in rows) + 2
    signals = torch.full((3, len(rows), length), 7.0)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for b, row in enumerate(rows):
        for i, triple in enumerate(row):
            signals[:, b, i + 1] = torch.tensor(triple)
            mask[b, i + 1] = True
    return signals, mask


def offline(signals, mask, rho, gamma, scope="sample"):
    """`select` as it runs: numpy, float32 columns read as float64."""
    flat = {
        name: s.numpy()[mask.numpy()].astype(np.float64)
        for name, s in zip(("history.loss", "current.loss", "current.attention"), signals, strict=True)
    }
    offsets = np.concatenate([[0], np.cumsum(mask.numpy().sum(1))])
    kept = np.zeros(mask.shape, dtype=bool)
    together = "global" if scope == "batch" else None
    kept[mask.numpy()] = decide("sstoken", offsets, flat, together, rho=rho, gamma=gamma).keep
    return kept


@given(examples, ratios, balances, st.sampled_from(["sample", "batch"]))
def test_the_mask_is_that_of_offline_selection(rows, rho, gamma, scope):
    (history, current, attention), mask = batch_of(rows)
    expected = offline((history, current, attention), mask, rho, gamma, scope)
    current = current.clone().requires_grad_()
    loss, keep = self_modulated_loss(current, history, attention, mask, rho=rho, gamma=gamma, scope=scope)
    assert keep.numpy().tolist() == expected.tolist()
    reference = current.detach()[torch.from_numpy(expected)].sum() / max(1, expected.sum())
    torch.testing.assert_close(loss.detach(), reference)
    loss.backward()  # the mean over kept tokens, and nothing through the selection
    expected_grad = torch.from_numpy(expected) / max(1, expected.sum())
    torch.testing.assert_close(current.grad, expected_grad.to(current.grad))


@given(examples, ratios)
def test_the_tensor_forms_equal_the_numpy_forms_to_the_last_bit(rows, rho):
    random = np.random.default_rng(len(rows))
    scores = np.concatenate([[v[0] for v in row] for row in rows]).astype(np.float64)
    scores += random.choice([0.0, 1 / 3], scores.size)
    counts = [len(row) for row in rows]
    offsets = np.cumsum([0, *counts])
    example = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
    tensor = torch.from_numpy(scores)
    assert minmax_tensor(tensor, example, len(rows)).numpy().tobytes() == minmax(scores, offsets).tobytes()
    keep = keep_top_tensor(tensor, example, [num_kept(n, rho) for n in counts])
    assert keep.tolist() == keep_per_example(scores, offsets, rho).tolist()


def test_nothing_to_keep_is_a_zero_loss_with_zero_gradients():
    current = torch.full((2, 4), float("nan"), requires_grad=True)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    loss, keep = self_modulated_loss(current, torch.zeros(2, 4), torch.zeros(2, 4), mask)
    loss.backward()
    assert loss == 0
    assert not keep.any()
    assert current.grad.tolist() == [[0.0] * 4] * 2


def test_a_dropped_tokens_nan_reaches_neither_loss_nor_gradient():
    loss = torch.tensor([1.0, float("nan")], requires_grad=True)
    kept_loss(loss, torch.tensor([True, False])).backward()
    assert loss.grad.tolist() == [1.0, 0.0]


def test_the_first_token_of_a_sequence_is_predicted_from_nothing():
    mask = torch.ones(1, 6, dtype=torch.bool)
    tokens = ResponseTokens.of(mask, [(0, 0, 3), (0, 3, 6)])
    assert tokens.response_mask.tolist() == [[False, True, True, False, True, True]]
    assert tokens.offsets == (0, 2, 4)
    assert tokens.places.tolist() == [1, 2, 1, 2]


def test_units_are_examples_turns_or_the_batch():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    tokens = ResponseTokens.of(mask)
    assert tokens.units("sample").tolist() == [0, 4, 8]
    assert tokens.units("token").tolist() == [0, 4, 8]
    assert tokens.units("turn").tolist() == [0, 2, 4, 8]
    assert tokens.units("batch").tolist() == [0, 8]


def rule(name="sstoken", scope="sample", **params):
    method = get_method(name)
    return Rule(method, method.read_params(params), scope)


def test_a_signal_that_gamma_needs_is_asked_for():
    tokens = ResponseTokens.of(torch.ones(1, 3, dtype=torch.bool))
    given = {name: torch.zeros(2) for name in rule().inputs}
    assert given.keys() == {"history.loss", "current.loss", "current.attention"}
    for missing in given:
        with pytest.raises(UsageError, match=missing):
            rule().decide({k: v for k, v in given.items() if k != missing}, tokens)
    assert rule(gamma=0.0).inputs == {"current.attention"}
    assert rule(gamma=1.0).inputs == {"current.loss", "history.loss"}
    assert not rule(rho=1.0).inputs
    with pytest.raises(UsageError, match="rho is"):
        self_modulated_loss(*[torch.zeros(1, 3)] * 3, torch.ones(1, 3, dtype=torch.bool), rho=1.5)
    with pytest.raises(UsageError, match="gamma is -1"):
        self_modulated_loss(*[torch.zeros(1, 3)] * 3, torch.ones(1, 3, dtype=torch.bool), gamma=-1)


def test_token_loss_speaks_of_the_token_itself():
    logits = torch.randn(2, 5, 11)
    labels = torch.randint(0, 11, (2, 5))
    labels[0, 2] = -100
    losses = token_loss(logits, labels)
    expected = -logits.log_softmax(-1)[1, 2, labels[1, 3]]
    torch.testing.assert_close(losses[1, 3], expected)
    assert losses[:, 0].tolist() == [0.0, 0.0]
    assert losses[0, 2] == 0


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({}, [(0, 0, 6), (1, 0, 6)]),
        ({"attention_mask": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]}, [(0, 0, 4), (1, 0, 6)]),
        ({"attention_mask": [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]}, [(0, 2, 6), (1, 1, 6)]),
        ({"position_ids": [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]}, [(0, 0, 3), (0, 3, 6), (1, 0, 6)]),
        ({"position_ids": [[0, 1, 2, 3, 4, 5]]}, [(0, 0, 6), (1, 0, 6)]),
    ],
)
def test_sequences_are_found_where_the_model_sees_them(batch, expected):
    batch = {name: torch.tensor(value) for name, value in batch.items()}
    assert find_segments({"input_ids": torch.zeros(2, 6), **batch}) == expected


def test_sequences_of_a_flattened_batch():
    ids = torch.zeros(1, 6)
    assert find_segments({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 2, 6])}) == [
        (0, 0, 2),
        (0, 2, 6),
    ]
    positions = torch.tensor([[0, 1, 0, 1, 0, 0]])  # padded at the end with position 0
    assert find_segments({"input_ids": ids, "position_ids": positions}) == [
        (0, 0, 2),
        (0, 2, 4),
        (0, 4, 5),
        (0, 5, 6),
    ]


def test_a_batch_that_does_not_say_where_its_sequences_stand_is_refused():
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(SstokenError, match="no labels"):
        find_response_tokens({"input_ids": ids})
    with pytest.raises(SstokenError, match="4 dimensions"):
        find_response_tokens({"input_ids": ids, "labels": ids, "attention_mask": torch.ones(1, 1, 3, 3)})


def test_response_tokens_are_gathered_and_scattered():
    mask = torch.tensor([[False, True, True], [False, False, True]])
    tokens = ResponseTokens.of(mask)
    grid = torch.arange(6.0).view(2, 3)
    assert tokens.gather(grid).tolist() == [1.0, 2.0, 5.0]
    assert tokens.scatter(torch.tensor([9.0, 8.0, 7.0])).tolist() == [[0.0, 9.0, 8.0], [0.0, 0.0, 7.0]]
