"""Small random models that vLLM takes: its attention knows no heads smaller than 32."""

from pathlib import Path

from tests.factories import random_model

VOCABULARY = 1300
POSITIONS = 1000
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,  # far from uniform attention and loss, so that errors show
    "tie_word_embeddings": False,
}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 48},
    "gemma2": {
        "sliding_window": 48,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {"sliding_window": 48, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "phi3": {"original_max_position_embeddings": POSITIONS},
}
_HEAD_IS_A_SHARE = ("granite", "phi3")
"""Their heads have hidden_size / num_attention_heads."""


def save_model(folder: Path, architecture: str, seed: int = 0, **changes: object) -> Path:
    """A seeded random model of that architecture."""
    sizes = _SIZES | ARCHITECTURES[architecture] | changes
    if architecture in _HEAD_IS_A_SHARE:
        sizes = {k: v for k, v in sizes.items() if k != "head_dim"} | {"hidden_size": 128}
    random_model(architecture, seed, **sizes).save_pretrained(folder)
    return folder
