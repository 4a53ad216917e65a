"""Small random models of the architectures that scoring has to get right."""

from collections.abc import Callable

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 1300  # more than one tile of the loss, and no multiple of it
WINDOW = 16
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.12,  # far from uniform attention and loss, so that errors show
}


def _without(*names: str) -> dict[str, object]:
    return {k: v for k, v in _SIZES.items() if k not in names}


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=False)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=WINDOW)),
    "gemma2-softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_SIZES,
            sliding_window=WINDOW,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_SIZES, sliding_window=WINDOW, query_pre_attn_scalar=24)
    ),
    "granite-logit-scaling": lambda: GraniteForCausalLM(
        GraniteConfig(
            **_without("head_dim"), logits_scaling=4.0, attention_multiplier=0.4, residual_multiplier=0.7
        )
    ),
    "cohere-logit-scale": lambda: CohereForCausalLM(CohereConfig(**_without("head_dim"), logit_scale=0.25)),
    "phi-head-bias": lambda: PhiForCausalLM(PhiConfig(**_without("head_dim"))),
    "gpt-oss-sinks": lambda: GptOssForCausalLM(
        GptOssConfig(**_SIZES, sliding_window=WINDOW, num_local_experts=2, num_experts_per_tok=1)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=48,
            n_layer=3,
            n_head=4,
            n_positions=256,
            initializer_range=0.12,
            bos_token_id=1,
            eos_token_id=2,
            scale_attn_by_inverse_layer_idx=True,
        )
    ),
}


def make_model(name: str) -> PreTrainedModel:
    """The model with seeded weights, biases and sinks included, ready for inference."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()
