"""Batches of branches with shared keys and values say what the model says of each branch alone, token by token."""

import numpy as np
import pytest
import torch

from sstoken.errors import SstokenError
from sstoken.measure.branches import Branch
from sstoken.measure.generation import GreedyDecoder
from tests.sstoken.measure.architectures import ARCHITECTURES, VOCABULARY, make_model
from tests.sstoken.measure.continuations import TIE, check_continuation, logits
from tests.sstoken.measure.test_rope import MODELS as BY_LENGTH


@pytest.mark.parametrize("name", [*ARCHITECTURES])
def test_it_is_what_the_model_says_alone(name):
    model = make_model(name)
    random = np.random.default_rng(0)
    sequences = [random.integers(3, VOCABULARY, n).astype(np.int32) for n in (5, 40, 2)]
    branches = [
        Branch(s, length, token)
        for s, ids in enumerate(sequences)
        for length in range(1, ids.size + 1, 6)
        for token in (None, 3, 200)
    ]
    decoder = GreedyDecoder(model, max_length=None, batch_tokens=300)
    stop = frozenset()
    for _ in range(2):
        found = dict(decoder.continue_greedily(sequences, branches, stop, 12))
        assert sorted(found) == list(range(len(branches)))
        for index, branch in enumerate(branches):
            start = sequences[branch.sequence][: branch.length].tolist()
            start += [] if branch.token is None else [branch.token]
            at_its_end = branch.token in stop
            check_continuation(model, start, found[index], at_its_end=at_its_end, stop=stop, limit=12)
        if not stop:  # then tokens that come up, so that some end early
            stop = frozenset([3, *(int(found[i].ids[i % 12]) for i in range(0, len(branches), 3))])
    assert any(said.ended and branches[i].token != 3 for i, said in found.items())


def test_it_stops_at_the_longest_sequence():
    model = make_model("llama")
    ids = np.arange(3, 33, dtype=np.int32)
    decoder = GreedyDecoder(model, max_length=33, batch_tokens=None)
    branches = [Branch(0, 30), Branch(0, 30, 7), Branch(0, 5), *[Branch(0, 28, 9)] * 3]
    found = dict(decoder.continue_greedily([ids], branches, frozenset(), 10))
    assert [found[i].ids.size for i in range(6)] == [3, 2, 10, 4, 4, 4]
    assert not any(said.ended for said in found.values())


def test_candidates_are_the_likeliest_of_equal_ones_the_lower_ids():
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[100:110] = model.get_output_embeddings().weight[50]
    ids = np.random.default_rng(1).integers(3, VOCABULARY, 30).astype(np.int32)
    positions = np.array([1, 7, 30])
    found = GreedyDecoder(model, max_length=None, batch_tokens=None).candidates(
        ids, positions, VOCABULARY - 20
    )
    for row, position in zip(found, positions, strict=True):
        expected = logits(model, ids[:position].tolist())[-1]
        ranked = sorted(range(VOCABULARY), key=lambda token: (-float(expected[token]), token))
        assert row.tolist() == ranked[: VOCABULARY - 20] or np.allclose(
            expected[row], expected[ranked[: VOCABULARY - 20]], atol=TIE
        )
        same = [token for token in row.tolist() if token == 50 or 100 <= token < 110]
        assert same == sorted(same)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_a_rotary_embedding_that_would_change_within_an_answer_is_refused(name):
    model = BY_LENGTH[name]().eval()
    decoder = GreedyDecoder(model, max_length=None, batch_tokens=None)
    ids = np.arange(3, 13, dtype=np.int32)
    assert len(dict(decoder.continue_greedily([ids], [Branch(0, 10)], (), 4))) == 1
    with pytest.raises(SstokenError, match="rotary embedding changes"):
        list(decoder.continue_greedily([ids], [Branch(0, 10)], (), 30))


def test_nan_is_one_line():
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    decoder = GreedyDecoder(model, max_length=None, batch_tokens=None)
    ids = np.arange(3, 13, dtype=np.int32)
    with pytest.raises(SstokenError, match="NaN"):
        list(decoder.continue_greedily([ids], [Branch(0, 10)], (), 4))
    with pytest.raises(SstokenError, match="NaN"):
        decoder.candidates(ids, np.array([3]), 2)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    model = make_model("llama")
    decoder = GreedyDecoder(model, max_length=None, batch_tokens=10_000)
    ids = np.arange(3, 13, dtype=np.int32)
    branches = [Branch(0, 5, token) for token in range(200, 210)]
    expected = dict(decoder.continue_greedily([ids], branches, (), 6))
    decode, sizes = decoder._decode, []

    def small(sequences, some, *rest):
        sizes.append(len(some))
        if len(some) > 3:
            raise torch.OutOfMemoryError
        return decode(sequences, some, *rest)

    monkeypatch.setattr(decoder, "_decode", small)
    found = dict(decoder.continue_greedily([ids], branches, (), 6))
    assert sizes == [10, 5, 2, 2, 2, 2, 2]
    assert all(np.array_equal(found[i].ids, expected[i].ids) for i in range(10))


def test_a_model_whose_cache_does_not_grow_with_every_token_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config).eval()
    decoder = GreedyDecoder(model, max_length=None, batch_tokens=None)
    with pytest.raises(SstokenError, match="caches keys and values"):
        list(decoder.continue_greedily([np.arange(3, 9, dtype=np.int32)], [Branch(0, 4)], (), 4))
