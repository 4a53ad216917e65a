"""Checks of an in-loop trainer, when it is created and before the first step."""

import warnings
from collections.abc import Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch

from sstoken.errors import UsageError
from sstoken.in_loop.forward import Decision, SelectingModel
from sstoken.in_loop.response_tokens import ResponseTokens
from sstoken.measure.architecture import check_causal, last_softmax_layer

LOSS_TYPES = ("nll", "dft", "chunked_nll")
"""TRL losses that are sums over the tokens' log-probabilities, so that dropping tokens is exact."""
_LOSS_KERNELS = ("fused_linear_cross_entropy", "cross_entropy")
"""Liger kernels that replace the loss. The others replace layers and are allowed."""


def check_trainer(trainer: Any) -> None:
    """Refuse a model or trainer settings that would bypass or distort the selection; turn off Liger's loss kernels.

    Raises:
        UsageError: names the setting and how to change it.
    """
    obstacles = (_model_obstacles, _loss_obstacles, _divisor_obstacles, _device_obstacles)
    for text in chain.from_iterable(find(trainer) for find in obstacles):
        raise UsageError(f"in-loop selection: {text}")
    args = trainer.args
    device = trainer.accelerator.device.type
    with trainer.accelerator.autocast():
        if (args.fp16 or args.bf16) and not torch.is_autocast_enabled(device):
            asked = "fp16" if args.fp16 else "bf16"
            warnings.warn(
                f"in-loop selection: {asked}=True does nothing on this device ({device}): training uses the dtype of "
                "the weights",
                UserWarning,
                stacklevel=2,
            )
    if args.use_liger_kernel:
        kernels = getattr(args, "liger_kernel_config", None) or {}
        args.liger_kernel_config = kernels | dict.fromkeys(_LOSS_KERNELS, False)


def _model_obstacles(trainer: Any) -> Iterator[str]:
    name = type(trainer.model).__name__
    if trainer.model.config.is_encoder_decoder:
        yield f"{name} is an encoder-decoder; only causal language models work"
    if not trainer.model_accepts_loss_kwargs:
        yield f"{name}.forward takes no **kwargs, so its loss cannot be averaged"
    adapter = getattr(trainer.model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        tuning = getattr(getattr(adapter, "peft_type", None), "value", "")
        yield (
            f"{tuning} puts virtual tokens before each sequence, and attention to a prompt is not defined with them; "
            "train LoRA or another adapter of the weights"
        )


def _loss_obstacles(trainer: Any) -> Iterator[str]:
    args, selection = trainer.args, trainer._selection
    if trainer.compute_loss_func is not None:
        yield (
            "compute_loss_func is set, which would replace the loss that selects; remove it, or select in your own "
            "training loop (self_modulated_loss)"
        )
    if args.label_smoothing_factor:
        yield (
            f"label_smoothing_factor is set ({args.label_smoothing_factor}), which would replace the loss that "
            "selects; set it to 0"
        )
    loss_type = getattr(args, "loss_type", None)
    if loss_type not in (None, *LOSS_TYPES):
        yield f"loss_type is {loss_type!r}; legal: {', '.join(LOSS_TYPES)}"
    kernels = getattr(args, "liger_kernel_config", None) or {}
    fused = [name for name in _LOSS_KERNELS if kernels.get(name)]
    if args.use_liger_kernel and fused:
        yield (
            f"liger_kernel_config asks for {' and '.join(fused)}, for a loss of all tokens; remove that, the layer "
            "kernels of use_liger_kernel work"
        )
    if loss_type == "dft" and selection.of.weighted:
        yield f"loss_type is 'dft', which weights tokens, and so does method {selection.method!r}; set loss_type='nll'"


def _divisor_obstacles(trainer: Any) -> Iterator[str]:
    args, selection = trainer.args, trainer._selection
    if not selection.divides_late:
        return
    known_late = f"the number of tokens that method {selection.method!r} keeps is known only after the last micro-batch"
    if trainer.is_deepspeed_enabled:
        yield f"{known_late}, and DeepSpeed does not let gradients be rescaled; set denominator='response'"
    if not args.average_tokens_across_devices and args.world_size > 1:
        yield f"{known_late}; set average_tokens_across_devices=True, or denominator='response'"
    if getattr(trainer.model.config.get_text_config(), "output_router_logits", False):
        yield f"{known_late}, too late for the auxiliary loss of a mixture of experts; set denominator='response'"


def _device_obstacles(trainer: Any) -> Iterator[str]:
    if trainer.args.n_gpu > 1:
        yield f"{trainer.args.n_gpu} GPUs in one process; start one process per GPU (torchrun)"
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if any((getattr(parallelism, f"{kind}_size", 1) or 1) > 1 for kind in ("tp", "cp", "sp")):
        yield "tensor, context and sequence parallelism split examples; use data parallelism or FSDP"
    if trainer.is_fsdp_enabled and trainer._selection.history in ("ema", "snapshot"):
        yield "histories 'ema' and 'snapshot' keep weights, which FSDP shards; use 'scores', or 'base' with LoRA"


def choose_layer(trainer: Any) -> int:
    """Return the index of the layer whose attention is captured.

    Raises:
        UsageError: no layer's attention can be captured.
    """
    layer = trainer._selection.layer
    if layer != "last":
        return int(layer)
    if not _can_run(trainer):
        return -1
    with trainer.accelerator.autocast():
        return last_softmax_layer(trainer.model)


def _can_run(trainer: Any) -> bool:
    """Whether the model can run now: its weights are loaded and not sharded."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return not sharded and trainer.model.get_input_embeddings().weight.device.type != "meta"


@torch.no_grad()
def try_out(trainer: Any) -> None:
    """Run three tokens through the model, to refuse an unsuitable one before the first step.

    Raises:
        SstokenError: it is not causal, its attention cannot be captured, or it does not give logits for each position.
    """
    model, capture = trainer.model, trainer._capture
    if not _can_run(trainer):
        return
    weight = model.get_input_embeddings().weight
    ids = torch.arange(3, device=weight.device)[None] % weight.shape[0]
    tokens = ResponseTokens.of(torch.ones_like(ids, dtype=torch.bool))
    keeps_all: Any = SimpleNamespace(
        signals=("loss",),
        reference=None,
        prepare=lambda model, inputs: None,
        select=lambda signals: Decision(torch.ones_like(signals["loss"], dtype=torch.bool)),
    )
    training = model.training
    model.eval()
    try:
        if capture is not None:
            capture.expect(tokens.response_mask)
        with trainer.accelerator.autocast():
            check_causal(model)
            selecting = SelectingModel(model, trainer._head, tokens, keeps_all)
            selecting(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=2)
        if capture is not None:
            capture.take()
    finally:
        model.train(training)
