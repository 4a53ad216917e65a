"""Stage `anchor`: fine-tune a model and keep the snapshots that serve as history and current checkpoint."""

import atexit
import copy
import importlib.util
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from sstoken.errors import SstokenError, UsageError
from sstoken.measure.rope import longest
from sstoken.stages import checkpoints, joins, plain_json, storage
from sstoken.stages.hub_models import split_revision
from sstoken.stages.loading import load_model
from sstoken.stages.machine import multiplies_bfloat16
from sstoken.stages.processes import is_main_process, num_processes
from sstoken.stages.stage import BY_CONTENT, SPEED_ONLY, Context, Stage
from sstoken.stages.storage import write_atomic
from sstoken.stages.training import reporting, sealing
from sstoken.stages.training.history_index import read_index, too_few_steps
from sstoken.stages.training.reporting import Reporter
from sstoken.stages.vocabularies import check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from sstoken.stages.training.token_dataset import Extent

_LOG = "log.jsonl"
_TRAINER = "trainer"
"""Folder of what an unfinished run needs to resume; deleted when training ends."""
_IN_SNAPSHOTS = ("generation_config.json",)
"""Files of the base model, besides weights and configuration, that are copied into its snapshots."""


class Anchor(Stage):
    """Fine-tune `model` on the responses of `tokens`, or on the kept and weighted tokens of `masked`; keep snapshots.

    Under `torchrun` or `accelerate launch`, every process calls `run` with the same context (data parallelism).
    """

    name: ClassVar[str] = "anchor"
    folder: ClassVar[str] = "history"
    distributed: ClassVar[bool] = True
    seeded: ClassVar[bool] = True
    reads_once: ClassVar[bool] = True

    model: Annotated[str, BY_CONTENT]
    """The base model: a folder or a Hub id. Its tokenizer must be the one that made the tokens."""
    snapshots: Annotated[int, Field(ge=1)] | None = None
    """Number of snapshots, evenly spaced, the last one at the last step. None: 4, unless `snapshot_every` is set."""
    snapshot_every: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between snapshots, instead of `snapshots`."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Per-step decay, in (0, 1), of a moving average of the weights, saved beside each snapshot. None: no average."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; overrides `epochs`."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak of AdamW's learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate schedule after the warm-up."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps, in [0, 1), over which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    batch_size: int = Field(default=8, ge=1)
    """Examples per device and forward pass."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Norm to which gradients are clipped. 0: no clipping."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, but needs less memory."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass; full weights always train in float32. auto: bfloat16 on a GPU that supports it."""
    lora_rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of LoRA adapters on every linear layer. None: train all weights."""
    lora_alpha: float = Field(default=32, gt=0)
    """LoRA's scale is alpha / rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the adapters' inputs, in [0, 1)."""
    trust_remote_code: bool = False
    """Run the model's own Python code."""
    data_workers: Annotated[int, Field(ge=0), SPEED_ONLY] = 0
    """Processes that prepare batches. 0: the training process does it itself."""
    report_to: Annotated[Reporter, SPEED_ONLY] = "none"
    """Where to report loss, gradient norm and learning rate during training, besides OUT.partial/trainer/log.jsonl.
    TensorBoard files go into the folder `tensorboard` beside OUT."""

    def check(self) -> None:
        """See `Stage.check`."""
        if self.snapshots is not None and self.snapshot_every is not None:
            raise UsageError(
                f"snapshots is {self.snapshots} and snapshot_every is {self.snapshot_every}; give one, not both"
            )
        reporting.check(self.report_to)
        if self.lora_rank is not None and importlib.util.find_spec("peft") is None:
            raise UsageError("lora_rank needs PEFT; pip install peft")
        for name in ("lora_alpha", "lora_dropout"):
            value = getattr(self, name)
            if self.lora_rank is None and value != type(self).model_fields[name].default:
                raise UsageError(
                    f"{name} is {value}, which needs lora_rank; set lora_rank, or leave {name} out"
                )
        if checkpoints.adapter_base(self.model) is not None:
            raise UsageError(f"model {self.model!r} is a LoRA adapter; merge it into its base model first")
        checkpoints.check_loadable(self.model)

    def sources(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """See `Stage.sources`."""
        return {"model": checkpoints.identity(self.model, digest, also=_IN_SNAPSHOTS)}

    def faster(self) -> str:
        """See `Stage.faster`."""
        import torch

        levers = []
        if not torch.accelerator.is_available():
            if self.precision != "bfloat16" and multiplies_bfloat16():
                levers.append("--precision bfloat16, which this processor multiplies natively")
            levers.append("a GPU")
        elif self.precision == "float32":
            levers.append("--precision bfloat16")
        if self.lora_rank is None:
            levers.append("--lora-rank 16, which trains adapters alone")
        return "; ".join([*levers, "fewer steps (--max-steps)"])

    def agree(self, run: bool | None) -> bool:
        """See `Stage.agree`. Joins the processes that torchrun started."""
        if num_processes() == 1:
            return bool(run)
        from torch import distributed

        _join()
        word = [run]
        distributed.broadcast_object_list(word)
        return bool(word[0])

    def run(self, context: Context) -> dict[str, Any]:
        """Train, or resume training; write the snapshots, `history.json`, `log.jsonl` and `learning_curve.png`.

        A run that resumes at its last snapshot writes the same bytes as one that was never interrupted.

        Raises:
            SstokenError: the model does not fit the tokens, the loss is not a number, or resuming is impossible.
        """
        began = time.monotonic()
        log = context.out / _LOG
        if is_main_process():
            # Also when a run resumes: nothing vouches for the old note.
            joins.note_training(context.out, _data(context))
        if not log.exists():
            with reporting.no_messages(), ExitStack() as stack:
                self._train(context, stack)
        elif is_main_process():
            sealing.check_ended(context.out)
        lines = [plain_json.parse(line) for line in log.read_bytes().splitlines()]
        entries = read_index(context.out)
        if num_processes() > 1:  # the folder is renamed once the main process returns: read it before
            from torch import distributed

            _join()
            distributed.barrier()
        if is_main_process():
            from sstoken.stages.training.learning_curve import draw

            draw(lines, entries, context.out / "learning_curve.png")
            storage.of(context.out).delete(context.out / _TRAINER)
        return {
            "steps": lines[-1]["step"],
            "tokens_seen": lines[-1]["tokens_seen"],
            "loss": lines[-1]["loss"],
            "snapshots": [entry.name for entry in entries],
            "notes": too_few_steps(lines[-1]["step"], self.snapshots, self.snapshot_every),
            "seconds": round(time.monotonic() - began, 3),
        }

    def _train(self, context: Context, stack: ExitStack) -> None:
        from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, set_seed

        from sstoken.stages.training import resumable, token_dataset
        from sstoken.stages.training.history import HistorySnapshots

        folder = context.out / _TRAINER
        storage.of(folder).make_folder(folder)
        stack.enter_context(reporting.tensorboard_beside(context.out))
        arguments = self._arguments(folder, context.seed)  # joins the other processes
        source, data = _data(context), folder / "examples.arrow"
        with arguments.main_process_first(local=False):
            if arguments.process_index == 0:
                resumable.clean(folder)
                if not data.exists():
                    token_dataset.build(source, data)
        tokenizer = self._tokenizer(source)
        set_seed(context.seed)
        model = self._model(token_dataset.read_extent(data), source, arguments.bf16)
        context.unchanged()
        rows = model.get_input_embeddings().weight.shape[0]
        snapshots = HistorySnapshots(
            context.out, self.snapshots, self.snapshot_every, ema_decay=self.ema_decay, base=self.model
        )
        dataset = token_dataset.TokenDataset(data)
        collate, trainer_of = DataCollatorForSeq2Seq(_padding(tokenizer, rows)), Trainer
        if dataset.weighted:
            from sstoken.stages.training.weighted import WeightedTrainer, with_weights

            collate, trainer_of = with_weights(collate), WeightedTrainer
        trainer = trainer_of(
            model,
            arguments,
            data_collator=collate,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[
                resumable.Watch(stack, context.progress, self.learning_rate),
                snapshots,
                resumable.Resumable(folder, snapshots, context.keep),
                resumable.LiveLog(folder / _LOG),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        checkpoint = resumable.last_complete(folder)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if arguments.process_index == 0:
            lines = resumable.log_lines(trainer.state.log_history)
            sealing.seal_ended(context.out, trainer.state.global_step, lines, _LOG)
            write_atomic(context.out / _LOG, lines)
        trainer.accelerator.wait_for_everyone()

    def _arguments(self, folder: Path, seed: int) -> "TrainingArguments":
        import torch
        from transformers import TrainingArguments
        from transformers.utils import is_torch_bf16_gpu_available

        on_cpu = not torch.accelerator.is_available()
        bfloat16 = self.precision == "bfloat16" or (
            self.precision == "auto" and not on_cpu and is_torch_bf16_gpu_available()
        )
        checkpointing = "activation_checkpointing"
        if checkpointing not in TrainingArguments.__dataclass_fields__:  # renamed within transformers 5
            checkpointing = "gradient_checkpointing"
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=self.epochs,
            max_steps=self.max_steps or -1,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.schedule if self.schedule != "constant" else "constant_with_warmup",
            warmup_steps=self.warmup_ratio,
            weight_decay=self.weight_decay,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation,
            max_grad_norm=self.max_grad_norm,
            bf16=bfloat16,
            use_cpu=on_cpu,
            seed=seed,
            data_seed=seed,
            dataloader_num_workers=self.data_workers,
            dataloader_pin_memory=not on_cpu,
            remove_unused_columns=False,
            include_num_input_tokens_seen="non_padding",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            ddp_find_unused_parameters=False,
            report_to=self.report_to,
            run_name=folder.parent.name.removesuffix(".partial"),
            disable_tqdm=True,
            **({checkpointing: True} if self.gradient_checkpointing else {}),
        )
        # One process, one device: several visible GPUs would multiply the batch size and change the result.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments

    def _tokenizer(self, tokens: Path) -> "PreTrainedTokenizerBase":
        """Return the model's tokenizer with the chat template of the tokens; theirs if it has none or the same one."""
        made_with = checkpoints.load_tokenizer(str(tokens / "tokenizer"))
        own = checkpoints.own_tokenizer(self.model, trust_remote_code=self.trust_remote_code)
        if own is None:
            return made_with  # its vocabulary's size is checked
        if checkpoints.tokenizer_fingerprint(own) == checkpoints.tokenizer_fingerprint(made_with):
            return made_with
        check_vocabulary(self.model, own, tokens)
        own.chat_template = made_with.chat_template
        own.eos_token = own.eos_token or made_with.eos_token
        return own

    def _model(self, extent: "Extent", tokens: Path, bfloat16: bool) -> "PreTrainedModel":
        import torch

        # bfloat16 would round away updates far smaller than the weights; frozen weights get none.
        dtype = "auto" if self.lora_rank is not None and bfloat16 else torch.float32
        model, _ = load_model(self.model, dtype=dtype, trust_remote_code=self.trust_remote_code)
        vocabulary = model.get_input_embeddings().num_embeddings
        if extent.largest_id >= vocabulary:
            raise SstokenError(
                f"{self.model}: its vocabulary has {vocabulary} entries, but {tokens} holds token id "
                f"{extent.largest_id}; encode the data with --model {self.model}"
            )
        positions = longest(model.config)
        if positions and extent.longest > positions:
            raise SstokenError(
                f"{self.model}: takes {positions} tokens, but {tokens} holds an example of {extent.longest}; encode "
                f"the data with --max-length {positions}"
            )
        if self.lora_rank is None:
            return model
        from peft import LoraConfig, get_peft_model

        adapter: PreTrainedModel = get_peft_model(
            model,
            LoraConfig(
                r=self.lora_rank,
                lora_alpha=self.lora_alpha,
                lora_dropout=self.lora_dropout,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
                revision=split_revision(self.model)[1],
            ),
        )
        return adapter


def _data(context: Context) -> Path:
    """Return the folder to train on: the masked dataset, else the tokens with all their responses."""
    return context.inputs["masked"] if "masked" in context.inputs else context.inputs["tokens"]


def _join() -> None:
    """Connect the processes as the trainer does, and disconnect at exit: a process that just ends is aborted."""
    import torch
    from accelerate import PartialState

    if not torch.distributed.is_initialized():
        state = PartialState(cpu=not torch.accelerator.is_available())
        atexit.register(state.destroy_process_group)


def _padding(tokenizer: "PreTrainedTokenizerBase", rows: int) -> "PreTrainedTokenizerBase":
    """Return a copy that pads on the right, with EOS if the model cannot embed the padding token (it is masked)."""
    padding = copy.deepcopy(tokenizer)
    padding.padding_side = "right"
    if padding.pad_token_id is None or padding.pad_token_id >= rows:
        padding.pad_token = padding.eos_token
    return padding
