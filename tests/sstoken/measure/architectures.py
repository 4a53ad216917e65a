"""Small random models of the architectures that scoring has to get right."""

from transformers import PreTrainedModel

from tests.factories import random_model

VOCABULARY = 1300  # more than one tile of the loss, and not a multiple of it
WINDOW = 16
SIZES: dict[str, object] = {
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
_WITHOUT_HEAD_DIM = {name: value for name, value in SIZES.items() if name != "head_dim"}

ARCHITECTURES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {**SIZES, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", SIZES),
    "mistral-window": ("mistral", {**SIZES, "sliding_window": WINDOW}),
    "gemma2-softcap": (
        "gemma2",
        {
            **SIZES,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": ("gemma3_text", {**SIZES, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}),
    "granite-logit-scaling": (
        "granite",
        {
            **_WITHOUT_HEAD_DIM,
            "logits_scaling": 4.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.7,
        },
    ),
    "cohere-logit-scale": ("cohere", {**_WITHOUT_HEAD_DIM, "logit_scale": 0.25}),
    "phi-head-bias": ("phi", _WITHOUT_HEAD_DIM),
    "gpt-oss-sinks": (
        "gpt_oss",
        {**SIZES, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 48,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.12,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "scale_attn_by_inverse_layer_idx": True,
        },
    ),
}


def make_model(name: str) -> PreTrainedModel:
    """Make the model with seeded weights, including biases and sinks."""
    model_type, settings = ARCHITECTURES[name]
    return random_model(model_type, **settings)
