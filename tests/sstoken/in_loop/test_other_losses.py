"""Other losses, kernels and architectures: each composes as documented, or is refused when the trainer is made."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import SFTConfig

from sstoken import (
    AttentionCapture,
    SelfModulatedSFTTrainer,
    SelfModulatedTrainer,
    SelfModulation,
    UsageError,
)
from sstoken.in_loop.response_tokens import find_response_tokens
from tests.factories import VOCABULARY
from tests.sstoken.in_loop.small import (
    SETTINGS,
    Watcher,
    arguments,
    collate,
    collate_left,
    make_model,
    make_scored_examples,
    save_tokenizer,
)

ONE_STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def train(kind, folder, tokenizer, model, selection=None, **changes):
    watcher = Watcher()
    given = {
        "train_dataset": Dataset.from_list(make_scored_examples(8)),
        "selection": selection or SelfModulation(rho=0.4),
        "observers": [watcher],
    }
    changes = ONE_STEP | changes
    if kind == "SFTTrainer":
        config = SFTConfig(str(folder), **{"max_length": None} | SETTINGS | changes)
        trainer = SelfModulatedSFTTrainer(model, config, processing_class=tokenizer, **given)
    else:
        trainer = SelfModulatedTrainer(model, arguments(folder, **changes), data_collator=collate, **given)
    trainer.train()
    return trainer, watcher


def kept_log_probs(model, watcher):
    """Return the log-probabilities of the kept tokens, each example by itself: [K] with gradients."""
    found = []
    for seen in watcher.seen:
        log_probs = model(torch.from_numpy(seen.input_ids)[None]).logits[0].log_softmax(-1)
        found += [log_probs[i - 1, seen.input_ids[i]] for i in np.flatnonzero(seen.keep_mask)]
    return torch.stack(found)


def assert_one_step(trainer, model, loss):
    """The trainer's step is that of this loss, and its log says so."""
    loss.backward()
    for (name, p), ours in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(ours.detach(), p.detach() - p.grad, atol=1e-5, rtol=0, msg=name)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll", "dft"])
def test_losses_of_trl(tmp_path, tokenizer, loss_type):
    """Tokens are selected by their plain loss; what is averaged over those kept is the loss that was asked for."""
    trainer, watcher = train("SFTTrainer", tmp_path, tokenizer, make_model(), loss_type=loss_type)
    model = make_model()
    log_probs = kept_log_probs(model, watcher)
    assert_one_step(
        trainer, model, (-log_probs * (log_probs.exp().detach() if loss_type == "dft" else 1)).mean()
    )


def make_mixture():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
            output_router_logits=True, router_aux_loss_coef=0.5, initializer_range=0.2, sliding_window=None,
            bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_the_auxiliary_loss_of_a_mixture_of_experts_is_added(tmp_path, tokenizer, kind):
    trainer, watcher = train(kind, tmp_path, tokenizer, make_mixture(), per_device_train_batch_size=8)
    model = make_mixture()
    batch = collate(
        [{"input_ids": s.input_ids.tolist(), "labels": s.input_ids.tolist()} for s in watcher.seen]
    )
    batch.pop("labels")
    loss = -kept_log_probs(model, watcher).mean()
    assert_one_step(trainer, model, loss + 0.5 * model(**batch, output_router_logits=True).aux_loss)


def small(kind, config, **more):
    torch.manual_seed(0)
    return kind(
        config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
            bos_token_id=None, eos_token_id=0, pad_token_id=0, **more,
        )
    )  # fmt: skip


MODELS = {
    "knows soft-capping, but has none": lambda: make_model("sstoken"),
    "norms its queries": lambda: small(Qwen3ForCausalLM, Qwen3Config),
    "soft-caps": lambda: small(
        Gemma2ForCausalLM, Gemma2Config, attn_implementation="sstoken", final_logit_softcapping=2.0
    ),
    "scales its logits": lambda: small(GraniteForCausalLM, GraniteConfig, logits_scaling=3.0),
    "an adapter on its head": lambda: adapted(["lm_head", "q_proj"]),
}


def adapted(targets):
    torch.manual_seed(1)
    return get_peft_model(make_model(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast", "bfloat16 weights"])
@pytest.mark.parametrize("name", MODELS)
def test_architectures(tmp_path, tokenizer, name, precision):
    """Losses are measured as the model's own head gives them, but for rounding."""
    model, reference = MODELS[name](), MODELS[name]().eval()
    if precision == "bfloat16 weights":
        model, reference = model.to(torch.bfloat16), reference.to(torch.bfloat16).float()
    selection = SelfModulation(rho=0.4, history="base" if "adapter" in name else "scores")
    trainer, watcher = train(
        "Trainer", tmp_path, tokenizer, model, selection, bf16=precision == "bfloat16 autocast"
    )
    exact = precision == "float32"
    for seen in watcher.seen:
        with torch.no_grad():
            log_probs = reference(torch.from_numpy(seen.input_ids)[None]).logits[0].log_softmax(-1)
        places = np.flatnonzero(seen.response_mask)
        expected = [-float(log_probs[i - 1, seen.input_ids[i]]) for i in places]
        np.testing.assert_allclose(seen.loss[places], expected, atol=1e-4 if exact else 0.15)
        assert np.abs(seen.loss[places] - expected).mean() < (1e-4 if exact else 0.03)
    with torch.no_grad():
        expected = float(-kept_log_probs(reference, watcher).mean())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4 if exact else 0.03)


@pytest.mark.parametrize("kernel", ["fused_linear_cross_entropy", "cross_entropy"])
def test_kernels_that_replace_the_loss_are_refused_and_layer_kernels_are_not(tmp_path, monkeypatch, kernel):
    monkeypatch.setattr("transformers.training_args.is_liger_kernel_available", lambda: True, raising=False)
    given = {"data_collator": collate, "train_dataset": make_scored_examples(8)}
    with pytest.raises(UsageError, match=f"liger_kernel_config asks for {kernel}, for a loss of all tokens"):
        SelfModulatedTrainer(
            make_model(),
            arguments(tmp_path, use_liger_kernel=True, liger_kernel_config={kernel: True}),
            **given,
        )
    trainer = SelfModulatedTrainer(make_model(), arguments(tmp_path, use_liger_kernel=True), **given)
    assert trainer.args.liger_kernel_config == {"fused_linear_cross_entropy": False, "cross_entropy": False}


def test_flex_attention_is_measured_as_sdpa(tmp_path):
    """Its mask is no tensor. It trains on a GPU alone, so that what is compared is a forward pass."""
    batch, found = collate_left(make_scored_examples(4)), []
    tokens = find_response_tokens(batch)
    for implementation in ("sdpa", "flex_attention"):
        model = make_model(implementation)
        capture = AttentionCapture(model)
        capture.expect(tokens.response_mask, tokens.segments)
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        found.append(capture.take())
    torch.testing.assert_close(*found)
