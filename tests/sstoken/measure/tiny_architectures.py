"""Every causal architecture of the installed transformers as a tiny random model, and what can be measured of it.

python -m tests.sstoken.measure.tiny_architectures > docs/architectures.md
"""

import inspect
import warnings
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sstoken.errors import SstokenError, UsageError
from sstoken.measure.scorer import Scorer

LARGEST = 8_000_000
"""Parameters; what cannot be made smaller is left out."""
_SIZES: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "emb_dim": 32,
    "word_embed_proj_dim": 32, "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48, "d_ff": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 24, "dim_ff": 48,
    "shared_expert_intermediate_size": 24, "mlp_hidden_size": 48, "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4,
    "num_layers": 4, "decoder_layers": 4, "encoder_layers": 2, "num_decoder_layers": 4, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "kv_channels": 8, "dim_head": 8,
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256, "n_ctx": 256, "num_experts": 4,
    "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "rotary_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "ssm_state_size": 8, "state_size": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, "n_groups": 1, "mamba_expand": 2,
    "is_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.12,
    "sliding_window": 16,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 4},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "mamba2": {"num_heads": 8},
    "prophetnet": {"num_hidden_layers": None},
    "reformer": {"axial_pos_embds": False},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16},
    "xlm": {"causal": True},
    "xlnet": {"max_position_embeddings": None},
    "zamba2": {"num_hidden_layers": None, "layers_block_type": None},
    "zaya": {"num_experts_per_tok": 1},
}  # what the common names do not settle


_WITHOUT_SINKS = {"granite_swa", "granitemoe_swa"}
"""Their own eager attention returns the weights before the sink takes its share."""
LENGTHS = (23, 9, 40, 17)
TOLERANCE = 1e-4
NOT_TRIED = "not tried: cannot be made tiny"
WRONG = "WRONG"


def architectures() -> list[str]:
    """The model types that `AutoModelForCausalLM` knows."""
    return [kind for kind, config in CONFIG_MAPPING.items() if config in MODEL_FOR_CAUSAL_LM_MAPPING]


def make_tiny(kind: str) -> PreTrainedModel:
    """A seeded random model.

    Raises:
        Exception: of any kind: its configuration cannot be made that small by the common names of sizes.
    """
    config_class = CONFIG_MAPPING[kind]
    default, own = config_class(), _OWN.get(kind, {})
    if getattr(default, "kv_lora_rank", None):
        own = {"head_dim": None, "num_key_value_heads": 4} | own  # MLA: all heads have keys of their own
    sizes = {k: v for k, v in _SIZES.items() if hasattr(default, k) and not _read_only(config_class, k)} | own
    if not hasattr(default, "vocab_size") and hasattr(default, "text_config"):
        raise ValueError("a model of several parts")
    config = config_class(**{k: v for k, v in sizes.items() if v is not None})
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    model_class = found[0] if isinstance(found, tuple) else found
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=0.2)
        elif (
            parameter.ndim > 1 and parameter.std() < 0.05
        ):  # an initialisation of its own, too near to nothing
            torch.nn.init.normal_(parameter, std=0.12)
    return model.eval()


def _read_only(config_class: type, name: str) -> bool:
    found = inspect.getattr_static(config_class, name, None)
    return isinstance(found, property) and found.fset is None


def classify(kind: str) -> str:
    """What can be measured: `losses and attention`, `losses`, `refused: ...`; `WRONG` where a value is.

    Raises:
        Exception: a traceback that a user would see.
    """
    try:
        model = make_tiny(kind)
    except Exception:  # of any kind, as there is no common way to make one
        return NOT_TRIED
    random = np.random.default_rng(0)
    sequences = [random.integers(3, 130, n).astype(np.int32) for n in LENGTHS]
    masks = [np.arange(n) >= n // 3 for n in LENGTHS]
    try:
        expected = [_losses(model, ids) for ids in sequences]
    except Exception:  # its own forward pass fails
        expected = None
    try:
        try:
            scorer = Scorer(model, signals=["loss", "attention"], batch_tokens=100)
        except UsageError:
            scorer = Scorer(model, batch_tokens=100)
        measured = dict(scorer.measure(sequences, masks))
    except SstokenError as refused:
        if "\n" in str(refused):
            return f"{WRONG}: an error of several lines"
        return f"refused: {str(refused).removeprefix(type(model).__name__).lstrip(': ')}"
    if expected is None:
        return f"{WRONG}: measured what the model does not run"
    for i, mask in enumerate(masks):
        apart = np.abs(measured[i]["loss"] - expected[i][mask]).max()
        if not apart < TOLERANCE:
            return f"{WRONG}: losses {apart:.2g} nats apart"
    layer = scorer.layers.get("attention")
    if layer is None:
        return "losses"
    number = model.config.get_text_config().num_hidden_layers
    where = "" if layer == number - 1 else f" of layer {layer} of {number}, the last with softmax attention"
    if kind in _WITHOUT_SINKS:
        return f"losses and attention{where}"
    again = make_tiny(kind)
    again.load_state_dict(model.state_dict())
    again.set_attn_implementation("eager")
    for i, (ids, mask) in enumerate(zip(sequences, masks, strict=True)):
        apart = np.abs(measured[i]["attention"] - _attention(again, ids, mask, layer)[mask]).max()
        if not apart < TOLERANCE:
            return f"{WRONG}: attention {apart:.2g} apart"
    return f"losses and attention{where}"


def _losses(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids[None]).long(), use_cache=False).logits[0]
    log_p = logits.float().log_softmax(-1)[:-1]
    return np.concatenate([[np.nan], -log_p.gather(1, torch.tensor(ids[1:, None]).long())[:, 0].numpy()])


def _attention(model: PreTrainedModel, ids: np.ndarray, mask: np.ndarray, layer: int) -> np.ndarray:
    """Mean over the heads of the attention to the prompt, from the weights that eager attention returns."""
    with torch.no_grad():
        given = model(
            input_ids=torch.tensor(ids[None]).long(), use_cache=False, output_attentions=True
        ).attentions
    every_layer = len(given) == model.config.get_text_config().num_hidden_layers
    weights = given[layer] if every_layer else given[-1]  # else those of softmax layers alone
    return weights[0, :, :, : int(mask.argmax())].sum(-1).mean(0).numpy()


def table() -> str:
    """The documentation's table."""
    rows = "".join(f"| {kind} | {classify(kind)} |\n" for kind in sorted(architectures()))
    return (
        "# Architectures\n\nWhat `score` measures of each causal architecture of transformers "
        f"{transformers.__version__}, tried on a tiny random model: losses against a plain forward pass and attention "
        f"against eager attention's own weights, both within {TOLERANCE}. Tests keep this table current.\n\n"
        f"| architecture | what is measured |\n|---|---|\n{rows}"
    )


def silence() -> None:
    """Keep transformers from speaking of configurations that nobody uses."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)


if __name__ == "__main__":
    silence()
    print(table(), end="")
