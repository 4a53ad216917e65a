"""vLLM continues and ranks candidates as transformers does, but for ties; with prefix caching at work."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sstoken.measure.branches import Branch
from sstoken.stages.backends import BackendOptions
from sstoken.stages.backends.generation import make_generator
from tests.sstoken.measure.continuations import TIE, check_continuation, logits
from tests.vllm.models import VOCABULARY, save_model
from tests.vllm.test_signals import save_adapter

STOP = frozenset(range(3, 60))


def generators(checkpoint):
    options = BackendOptions(str(checkpoint), (), None, "float32", "cpu", None, False)
    return [make_generator(name, options) for name in ("hf", "vllm")]


def check_both(checkpoint, model, sequences, limit=20):
    """Each backend against the definition; returns vLLM's generator."""
    random = np.random.default_rng(0)
    positions = [np.unique(random.integers(1, ids.size + 1, 12)) for ids in sequences]
    branches = [
        Branch(s, int(p), token)
        for s, some in enumerate(positions)
        for p in some
        for token in (None, int(random.integers(60, VOCABULARY)), 5)
    ]
    for generator in generators(checkpoint):
        found = generator.candidates(sequences, positions, 4)
        for ids, some, ranked in zip(sequences, positions, found, strict=True):
            predictions = logits(model, ids.tolist())
            for position, row in zip(some, ranked, strict=True):
                best = predictions[position - 1].topk(4).values
                assert torch.allclose(predictions[position - 1][row], best, atol=TIE)
                assert len(set(row.tolist())) == 4
        said = dict(generator.continue_greedily(sequences, branches, STOP, limit))
        assert sorted(said) == list(range(len(branches)))
        for index, branch in enumerate(branches):
            start = sequences[branch.sequence][: branch.length].tolist()
            start += [] if branch.token is None else [branch.token]
            at_its_end = branch.token in STOP
            check_continuation(model, start, said[index], at_its_end=at_its_end, stop=STOP, limit=limit)
    return generator


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mistral", "gemma2"))]
)
def test_both_agree_with_the_definition(architecture, tmp_path):
    checkpoint = save_model(tmp_path, architecture)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    random = np.random.default_rng(1)
    sequences = [random.integers(60, VOCABULARY, n).astype(np.int32) for n in (5, 300, 200, 2)]
    vllm = check_both(checkpoint, model.eval(), sequences)
    assert vllm.reused > vllm.asked // 5


def test_adapters_generate(tmp_path):
    from peft import PeftModel

    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter(base, tmp_path / "adapter", seed=1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, adapter).eval()
    ids = np.random.default_rng(2).integers(60, VOCABULARY, 90).astype(np.int32)
    check_both(adapter, model, [ids])
