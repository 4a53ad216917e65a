"""Options of the stages that run a checkpoint through a backend: `score` and `critical`."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sstoken.errors import SstokenError
from sstoken.stages.backends import (
    BACKENDS,
    BackendOptions,
    LoadedModel,
    Setting,
    deciding_settings,
    resolve_backend,
)
from sstoken.stages.sharded import ShardedStage
from sstoken.stages.stage import SPEED_ONLY


class ModelOptions(ShardedStage):
    """How a checkpoint is run, whatever is measured."""

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Dtype of the weights; softmax and loss are always fp32. bfloat16 is faster where `doctor` says so, and changes
    about 0.3 % of the keep decisions. auto: as the checkpoint stores them, which is recorded."""
    backend: Annotated[
        str,
        Field(
            description=f"Inference backend: {', '.join(BACKENDS)}, or another package's. auto: vllm on a GPU if it is "
            "installed and supports the checkpoint, else hf."
        ),
    ] = "auto"
    backend_options: dict[str, Setting] = Field(default_factory=dict)
    """The backend's own settings, such as vllm's `tensor_parallel_size`."""
    batch_tokens: Annotated[int | None, Field(ge=1), SPEED_ONLY] = None
    """Most positions in a batch, padding included; a longer sequence is a batch of its own. None: by the free memory.
    Halved when a batch does not fit."""
    device: Annotated[str, SPEED_ONLY] = "auto"
    """cpu, cuda, mps, ..., or a list with one for each worker: cuda:0,cuda:1. auto: a GPU if there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""

    def backend_for(
        self, *, log_folder: Path | None = None, device: str | None = None, **more: Any
    ) -> BackendOptions:
        """Return the backend's options: this stage's fields of the same names; those in `more` have other values."""
        own = type(self).model_fields
        given = {
            field.name: getattr(self, field.name) for field in fields(BackendOptions) if field.name in own
        }
        given["device"] = device or self.device.partition(",")[0]
        given["settings"] = tuple(sorted(self.backend_options.items()))
        return BackendOptions(**given | {"log_folder": log_folder} | more)

    def fingerprinted_for(self, options: BackendOptions) -> dict[str, Any]:
        """Return the fields that decide what is written, with `auto` resolved to the backend that runs."""
        backend = resolve_backend(self.backend, options)
        fields = super().fingerprinted() | {"backend": backend}
        del fields["backend_options"]
        if deciding := deciding_settings(backend, options):
            fields["backend_options"] = deciding
        return fields


def check_lengths(
    checkpoint: str,
    model: LoadedModel,
    tokens: Path,
    example_ids: Sequence[str],
    sequences: Sequence[NDArray[np.int32]],
    other_remedy: str = "",
) -> None:
    """Refuse a shard of tokens with an unknown token id or an example that is too long for the model.

    `other_remedy` is what to do about a long example, besides cutting it when it is encoded.
    """
    for example_id, ids in zip(example_ids, sequences, strict=True):
        if int(ids.max()) >= model.vocab_size:
            raise SstokenError(
                f"{checkpoint}: {tokens.name}, example {example_id!r} has token id {int(ids.max())}, beyond the "
                f"model's vocabulary of {model.vocab_size}; encode with this model's tokenizer"
            )
        if model.max_length is not None and ids.size > model.max_length:
            raise SstokenError(
                f"{checkpoint}: {tokens.name}, example {example_id!r} has {ids.size} tokens, the model takes "
                f"{model.max_length}; encode with --max-length {model.max_length}{other_remedy}"
            )
