"""The kinds of peft adapters that can be scored."""

from collections.abc import Mapping
from typing import Any

from sstoken.errors import SstokenError

SUPPORTED = (
    "LORA",
    "ADALORA",
    "BOFT",
    "C3A",
    "DELORA",
    "FOURIERFT",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "TRAINABLE_TOKENS",
    "VBLORA",
    "VERA",
    "WAVEFT",
)
"""Tested kinds: they change nothing outside the base model's modules."""
_UNSUPPORTED_SETTINGS = {
    "alora_invocation_tokens": "an activated LoRA (aLoRA)",
    "arrow_config": "an Arrow router",
    "layer_replication": "a LoRA that replicates layers",
    "use_bdlora": "a block-diagonal LoRA",
}


def check_kind(ref: str, config: Mapping[str, Any]) -> None:
    """Refuse an adapter whose `adapter_config.json` names a kind that cannot be scored."""
    kind = config.get("peft_type")
    if kind not in SUPPORTED:
        raise SstokenError(
            f"{ref}: adapters of the kind {kind} are not supported, legal is {', '.join(SUPPORTED)}; merge it into its "
            "base (merge_and_unload, then save_pretrained) where peft can"
        )
    for setting, name in _UNSUPPORTED_SETTINGS.items():
        if config.get(setting):
            raise SstokenError(
                f"{ref}: {name} ({setting} is set) is not supported; merge it into its base, or train a plain LoRA"
            )
