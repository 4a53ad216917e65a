"""Load a model and check that it matches its files: transformers only warns where they contradict config.json."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sstoken.errors import SstokenError, first_line
from sstoken.stages.checkpoints import check_content, check_loadable, local_folder, place
from sstoken.stages.weight_files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_NUMBERED = re.compile(r"^(.*?\.)(\d+)\.(.*)$")
"""A weight of one layer in a stack: the stack, the layer's number, the weight's name within the layer."""
_OF_ACTIVATIONS = re.compile(r"\.(?:[kvq]|input|output)_scale$")
"""Scales of quantized activations, which are not weights."""


def load_model(
    ref: str, *, dtype: "torch.dtype | str" = "auto", trust_remote_code: bool = False
) -> "tuple[PreTrainedModel, list[str]]":
    """Load the causal language model of a full checkpoint, not of an adapter.

    Args:
        ref: a folder or Hub id.
        dtype: a torch dtype, or "auto" for the checkpoint's own.
        trust_remote_code: run the checkpoint's own Python code.

    Returns:
        The model, and the names of weights in its files that it does not use.

    Raises:
        SstokenError: it does not load, or does not match its files; one line with the reason.
    """
    from transformers import AutoModelForCausalLM

    check_loadable(ref)
    check_content(ref)
    name, revision = place(ref)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_loaded` then refuses them by name
        )
    except Exception as error:  # transformers and safetensors raise many types
        raise SstokenError(f"{ref}: the model does not load ({_why_not(ref, error)})") from error
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # sdpa would ignore the model's soft-capping
    return model, check_loaded(ref, model, report)


def _why_not(ref: str, error: Exception) -> str:
    """Return why a model does not load, and what to do if its architecture is unknown."""
    folder = local_folder(ref)
    config = {} if folder is None else read_json(folder / "config.json")
    kind = config.get("model_type")
    if isinstance(error, ValueError) and "does not recognize this architecture" in str(error):
        import transformers

        return (
            f"transformers {transformers.__version__} does not know model_type {kind!r}; update transformers"
        )
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return "it comes with Python code of its own; read it, and pass --trust-remote-code to run it"
    return first_line(error)


def check_loaded(ref: str, model: Any, report: Mapping[str, Any]) -> list[str]:
    """Refuse a model that does not match its files.

    Args:
        ref: the checkpoint, for messages.
        model: what `from_pretrained` returned.
        report: the loading info that it returned.

    Returns:
        Sorted names of weights in the files that this model does not use, such as another task's head.

    Raises:
        SstokenError: weights are missing, have other shapes, or belong to the model but have no place in it.
    """
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise SstokenError(
            f"{ref}: its files do not fit its config.json: {name} is {list(found)} in the files, {list(expected)} by "
            f"config.json ({len(mismatched)} such weights); copy or download the checkpoint again"
        )
    unused = sorted(report["unexpected_keys"])
    if missing := report["missing_keys"]:  # transformers would continue with random values
        instead = f"; its files hold {unused[0]} and others in their place" if unused else ""
        raise SstokenError(
            f"{ref}: {len(missing)} weights are missing (first: {min(missing)}){instead}; copy or download the "
            "checkpoint again"
        )
    if lost := _belonging(unused, model.state_dict()):
        raise SstokenError(
            f"{ref}: {len(lost)} weights in its files have no place in the model that its config.json describes "
            f"(first: {lost[0]}); copy or download the checkpoint again, or merge what was trained into its base"
        )
    return unused


def _belonging(unused: Iterable[str], used: Iterable[str]) -> list[str]:
    """Return the unused weights that the model cannot do without: part of a module it has, or a layer of its own."""
    used = list(used)
    modules = {name.rpartition(".")[0] for name in used if name.endswith(".weight")}
    numbers, names = defaultdict(set), defaultdict(set)
    for match in filter(None, map(_NUMBERED.match, used)):
        numbers[match[1]].add(match[2])
        names[match[1]].add(match[3])
    layers = defaultdict(set)
    for match in filter(None, map(_NUMBERED.match, unused)):
        if match[1] in numbers and match[2] not in numbers[match[1]]:
            layers[match[1], match[2]].add(match[3])
    # a layer with other weights as well is a multi-token prediction layer, which the model does not use
    more = {f"{stack}{number}." for (stack, number), own in layers.items() if own <= names[stack]}

    def belongs(name: str) -> bool:
        if _OF_ACTIVATIONS.search(name):
            return False
        parts = name.split(".")
        return name.startswith(tuple(more)) or any(
            ".".join(parts[:n]) in modules for n in range(1, len(parts))
        )

    return [name for name in unused if belongs(name)]
