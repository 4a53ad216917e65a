"""Load peft adapters onto a base model in memory, and refuse one that does not load completely."""

import math
import re
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError, first_line
from sstoken.stages.adapter_kinds import check_kind
from sstoken.stages.checkpoints import local_folder
from sstoken.stages.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json

_NAME = "default"
_CHANGES_BASE = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "loftq_config",
)
_REPEATED = re.compile(r"\.modules_to_save\.weight$")
"""A second name under which peft also writes the weights of saved embeddings."""
_WHOLE_MODULE = r"(?:\.modules_to_save|\.original_module|\.base_layer)?\.weight"


class Adapter:
    """An adapter's folder, not yet loaded."""

    def __init__(self, ref: str) -> None:
        """Read its configuration.

        Raises:
            SstokenError: its kind is not supported, or peft is not installed.
        """
        self._ref, self._folder = ref, local_folder(ref) or Path(ref)
        self._config = read_json(self._folder / ADAPTER_CONFIG)
        check_kind(ref, self._config)
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise SstokenError(f"{ref}: adapters need PEFT; pip install peft") from error
        from safetensors import safe_open

        with safe_open(self._folder / ADAPTER_WEIGHTS, "pt") as file:
            self._saved = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118

    @property
    def leaves_base(self) -> bool:
        """Whether it changes no tensor of the base, so that unloading it restores the base."""
        config = self._config
        return (
            config.get("peft_type") == "LORA"
            and config.get("bias", "none") == "none"
            and config.get("init_lora_weights", True) in (True, False, "gaussian", "orthogonal")
            and not any(config.get(name) for name in _CHANGES_BASE)
            and all(".lora_" in key for key in self._saved)
        )

    def put_on(self, model: Any) -> Any:
        """Load it onto a base model, changing its modules; return peft's model around it.

        Raises:
            SstokenError: it does not load completely; the base model is then unusable.
        """
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict

        self._fit_embeddings(model)
        try:
            config = PeftConfig.from_pretrained(str(self._folder))
            config.inference_mode = True
            adapted = PeftModel(model, config, adapter_name=_NAME)
            for tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).values():
                # peft would leave random numbers where the file has no weights
                if tensor.is_floating_point():
                    tensor.fill_(math.nan)
            unused = adapted.load_adapter(str(self._folder), _NAME, is_trainable=False).unexpected_keys
            loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        except Exception as error:  # peft, torch and safetensors raise many kinds
            raise SstokenError(f"{self._ref}: the adapter does not load ({_reason(error)})") from error
        missing = [k for k, v in loaded.items() if v.is_floating_point() and v.isnan().any()]
        if missing:
            raise SstokenError(
                f"{self._ref}: {len(missing)} of the adapter's weights are missing or NaN (first: {min(missing)}); "
                "copy it again, or set base_model_name_or_path to the model that it was trained on"
            )
        if unused := [k for k in unused if not _REPEATED.search(k)]:
            raise SstokenError(
                f"{self._ref}: {len(unused)} weights have no place in the base (first: {min(unused)}); set "
                "base_model_name_or_path to the model that it was trained on"
            )
        adapted.eval().requires_grad_(False)
        return adapted

    def _fit_embeddings(self, model: Any) -> None:
        """Resize the base's embeddings to the adapter's: tokens may have been added in training."""
        from torch import nn

        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        rows_in = self._rows(_name_of(model, inputs))
        rows_out = 0 if outputs is None else self._rows(_name_of(model, outputs))
        before, wanted = len(inputs.weight), max(rows_in, rows_out)
        if wanted in (0, before):
            return
        if wanted < before:
            raise SstokenError(
                f"{self._ref}: its embeddings have {wanted} rows, its base's {before}; set base_model_name_or_path to "
                "the base that it was trained on"
            )
        tied = outputs is not None and outputs.weight is inputs.weight
        if tied and not self._config.get("modules_to_save"):
            rows_out = wanted
        if rows_out or self._config.get("ensure_weight_tying"):
            model.resize_token_embeddings(wanted, mean_resizing=False)
        else:  # the new tokens' output rows were not saved: they stay out of the softmax
            like = {"device": inputs.weight.device, "dtype": inputs.weight.dtype}
            grown = nn.Embedding(wanted, inputs.weight.shape[1], **like)
            grown.weight.data[:before] = inputs.weight.data
            model.set_input_embeddings(grown)

    def _rows(self, module: str) -> int:
        """Return the rows of a complete embedding in the adapter's file; 0 if it has none of that name."""
        pattern = re.compile(rf"(?:^|\.){re.escape(module)}{_WHOLE_MODULE}$")
        return max((shape[0] for key, shape in self._saved.items() if pattern.search(key)), default=0)


def _name_of(model: Any, wanted: Any) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _reason(error: Exception) -> str:
    """Return an error's reason in one line: the first mismatched shape, else its first line."""
    lines = [line.strip() for line in str(error).splitlines()]
    mismatch = next((line for line in lines if line.startswith("size mismatch for ")), None)
    if mismatch is not None:
        return f"{mismatch.rstrip('.')}: it belongs to another base model, or to one with resized embeddings"
    return first_line(error)
