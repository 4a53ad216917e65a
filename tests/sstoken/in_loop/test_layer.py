"""The layer whose attention is measured: where not every layer has softmax attention, the last that has."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from sstoken import SelfModulatedTrainer, SelfModulation, SstokenError, UsageError
from tests.sstoken.in_loop.small import Watcher, arguments, collate, make_examples
from tests.sstoken.measure.tiny_architectures import make_tiny

EXAMPLES = make_examples(4)


def train(folder, model, **selection):
    watcher, training = Watcher(), model.training
    trainer = SelfModulatedTrainer(
        model,
        arguments(folder, max_steps=1),
        data_collator=collate,
        train_dataset=EXAMPLES,
        selection=SelfModulation(**selection),
        observers=[watcher],
    )
    assert trainer.model.training == training
    trainer.train()
    return watcher


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["lfm2", "qwen3_5_text", "llama"])
def test_the_last_layer_with_softmax_attention(tmp_path, kind, adapted):
    model = make_tiny(kind)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    watcher = train(tmp_path, model)
    reference = make_tiny(kind)
    reference.set_attn_implementation("eager")
    assert len(watcher.seen) == len(EXAMPLES)
    for seen in watcher.seen:
        with torch.no_grad():
            weights = reference(torch.from_numpy(seen.input_ids)[None], output_attentions=True).attentions
        softmax = [w for w in weights if w is not None and w.ndim == 4][-1]
        expected = (softmax[0].mean(0).numpy() * ~seen.response_mask).sum(1)
        np.testing.assert_allclose(
            seen.attention[seen.response_mask], expected[seen.response_mask], atol=1e-5
        )


def test_a_layer_without_softmax_attention(tmp_path):
    with pytest.raises(SstokenError, match="the attention of layer 3 cannot be captured"):
        train(tmp_path, make_tiny("lfm2"), layer=-1)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_softmax_attention_that_sdpa_has_not(tmp_path, kind):
    with pytest.raises(UsageError, match="load the model with attn_implementation='sstoken'"):
        train(tmp_path, make_tiny(kind))
    model = make_tiny(kind)
    model.set_attn_implementation("sstoken")
    assert train(tmp_path, model).seen


def test_a_mask_that_is_learned(tmp_path):
    """Doge's gets gradients, which not every kernel gives."""
    model = make_tiny("doge")
    before = model.model.layers[-1].self_attn.A.clone()
    assert train(tmp_path, model).seen
    assert not torch.equal(before, model.model.layers[-1].self_attn.A)


def test_a_model_without_softmax_attention(tmp_path):
    with pytest.raises(UsageError, match="set gamma=1, which needs none"):
        train(tmp_path, make_tiny("mamba"))
    assert train(tmp_path, make_tiny("mamba"), gamma=1.0).seen
