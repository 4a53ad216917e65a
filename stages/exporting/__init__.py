"""One small module per trainer that `export` supports. To add one: write a class here and list it in `TARGETS`."""

from sstoken.errors import UsageError, did_you_mean
from sstoken.stages.exporting.axolotl import Axolotl
from sstoken.stages.exporting.base import Target
from sstoken.stages.exporting.jsonl import JsonLines
from sstoken.stages.exporting.litgpt import LitGPT
from sstoken.stages.exporting.llamafactory import LlamaFactory
from sstoken.stages.exporting.megatron_bridge import MegatronBridge
from sstoken.stages.exporting.nemo import NeMo
from sstoken.stages.exporting.swift import Swift
from sstoken.stages.exporting.torchtune import Torchtune
from sstoken.stages.exporting.transformers import Transformers
from sstoken.stages.exporting.trl import TRL
from sstoken.stages.exporting.unsloth import Unsloth
from sstoken.stages.exporting.verl import Verl

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        TRL(),
        Transformers(),
        Unsloth(),
        Axolotl(),
        LlamaFactory(),
        NeMo(),
        MegatronBridge(),
        Swift(),
        Torchtune(),
        Verl(),
        LitGPT(),
        JsonLines(),
    )
}


def get_target(name: str) -> Target:
    """Return the target that `--to` calls `name`.

    Raises:
        UsageError: there is none; suggests the nearest name and lists all.
    """
    if name not in TARGETS:
        hint = did_you_mean(name.lower(), TARGETS)
        raise UsageError(f"no export for {name!r}; legal: {', '.join(TARGETS)}{hint}")
    return TARGETS[name]
