"""The settings that people train with, crossed: which go together, and a run of each against a slow, obvious reference.

`python -m tests.sstoken.in_loop.matrix` writes the tables of docs/in-loop.md.
"""

import contextlib
import copy
import itertools
import tempfile

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from trl import SFTConfig

from sstoken import (
    AttentionCapture,
    CarryHistory,
    SelfModulatedSFTTrainer,
    SelfModulatedTrainer,
    SelfModulation,
    SstokenError,
    find_segments,
    self_modulated_loss,
    token_loss,
)
from sstoken.in_loop.observation import Observation
from sstoken.methods import decide
from tests.sstoken.in_loop.small import (
    SETTINGS,
    Watcher,
    arguments,
    collate,
    collate_left,
    dumping,
    flatten,
    make_model,
    make_scored_examples,
)
from tests.support import ROOT

DOCUMENT = ROOT / "docs" / "in-loop.md"
AXES = {
    "loop": ("Trainer", "SFTTrainer", "own loop"),
    "precision": ("float32", "bfloat16 autocast", "bfloat16 weights", "float16 autocast"),
    "history": ("scores", "base", "ema", "snapshot"),
    "batch": ("padded", "padded on the left", "padding-free", "packed"),
    "extra": ("nothing", "gradient checkpointing", "torch.compile"),
}
RHO, GAMMA, DECAY, STEPS = 0.4, 0.6, 0.5, 3
LOSS_TOLERANCE = {
    "float32": 1e-5,
    "bfloat16 autocast": 0.02,
    "bfloat16 weights": 0.02,
    "float16 autocast": 5e-3,
}
"""Nats, of the loss of a step."""
MASK_TOLERANCE = {
    "float32": 0.0,
    "bfloat16 autocast": 0.1,
    "bfloat16 weights": 0.1,
    "float16 autocast": 0.06,
}
"""Share of response tokens whose decision may differ, over a run."""


def why_not(case):
    """Why these settings do not go together; None: they do. `case` may leave axes out."""
    own = case.get("loop") == "own loop"
    if own and case.get("history") in ("ema", "snapshot"):
        return "keep the weights yourself"
    if case.get("batch") == "packed" and case.get("loop") in ("Trainer", "own loop"):
        return "SFTTrainer packs; give others padding-free batches"
    if case.get("batch") == "padded on the left" and case.get("loop") == "SFTTrainer":
        return "its collator pads on the right"
    return None


def pairwise():
    """Few cases in which every two settings that go together meet."""
    names = list(AXES)
    cases = [dict(zip(names, values, strict=True)) for values in itertools.product(*AXES.values())]
    cases = [case for case in cases if not why_not(case)]
    wanted = {pair for case in cases for pair in itertools.combinations(case.items(), 2)}
    chosen = []
    while wanted:
        best = max(cases, key=lambda case: len(wanted & set(itertools.combinations(case.items(), 2))))
        wanted -= set(itertools.combinations(best.items(), 2))
        chosen.append(best)
    return chosen


def name_of(case):
    return ", ".join(case.values())


def prepared_model(case):
    model = make_model()
    if case["precision"] == "bfloat16 weights":
        model = model.to(torch.bfloat16)
    if case["history"] == "base":
        torch.manual_seed(1)
        config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    return model


def run(case, folder, tokenizer, backend="eager"):
    """Train some steps: the watcher with what was seen and dumped, and the logged losses."""
    return (run_own if case["loop"] == "own loop" else run_trainer)(case, folder, tokenizer, backend)


def run_trainer(case, folder, tokenizer, backend):
    watcher = Watcher()
    changes = {"max_steps": STEPS, "bf16": case["precision"] == "bfloat16 autocast"}
    changes["gradient_checkpointing"] = case["extra"] == "gradient checkpointing"
    if case["extra"] == "torch.compile":
        changes |= {"torch_compile": True, "torch_compile_backend": backend}
    selection = SelfModulation(
        rho=RHO,
        gamma=GAMMA,
        history=case["history"],
        history_decay=DECAY if case["history"] == "ema" else None,
    )
    given = {"selection": selection, "observers": [watcher]}
    given["train_dataset"] = Dataset.from_list(make_scored_examples())
    if case["loop"] == "SFTTrainer":
        if case["batch"] == "packed":
            changes |= {"packing": True, "max_length": 64, "per_device_train_batch_size": 2}
        settings = {"max_length": None, "padding_free": case["batch"] == "padding-free"} | SETTINGS | changes
        trainer = dumping(watcher, kind_of(case, SelfModulatedSFTTrainer))(
            prepared_model(case), SFTConfig(str(folder), **settings), processing_class=tokenizer, **given
        )
    else:
        trainer = dumping(watcher, kind_of(case, SelfModulatedTrainer))(
            prepared_model(case), arguments(folder, **changes), data_collator=collator_of(case), **given
        )
    trainer.train()
    return watcher, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def kind_of(case, trainer_class):
    """On a CPU trainers take `fp16=True` and go on in float32; here they do not."""
    if case["precision"] != "float16 autocast":
        return trainer_class

    class Half(trainer_class):
        def compute_loss_context_manager(self):
            return torch.autocast("cpu", torch.float16)

    return Half


def collator_of(case):
    return {"padded": collate, "padded on the left": collate_left, "padding-free": flatten}[case["batch"]]


def run_own(case, folder, tokenizer, backend):
    """The loop of docs/in-loop.md, for each setting; float16 with a gradient scaler, as on a GPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if case["precision"] == "bfloat16 autocast" else "no"
    )
    half = case["precision"] == "float16 autocast"
    model, watcher, logged = prepared_model(case), Watcher(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader(make_scored_examples(), batch_size=4, collate_fn=CarryHistory(collator_of(case)))
    inner = model
    if case["extra"] == "gradient checkpointing":
        model.gradient_checkpointing_enable()
    if case["extra"] == "torch.compile":
        model = torch.compile(model, backend=backend)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scaler = torch.amp.GradScaler("cpu", enabled=half, init_scale=2.0**10)
    capture = AttentionCapture(accelerator.unwrap_model(model), layer=-1)
    for step, batch in zip(range(STEPS), loader, strict=False):
        watcher.weights[step] = {k: v.detach().clone() for k, v in inner.state_dict().items()}
        segments = find_segments(batch)
        labels, history = batch.pop("labels"), batch.pop("history_loss")
        response = labels != -100
        autocast = torch.autocast("cpu", torch.float16) if half else contextlib.nullcontext()
        with autocast:
            if case["history"] == "base":
                with torch.no_grad(), inner.disable_adapter():
                    history = token_loss(model(**batch, use_cache=False).logits, labels)
                torch.clear_autocast_cache()
            capture.expect(response, segments)
            losses = token_loss(model(**batch, use_cache=False).logits, labels)
            selected = self_modulated_loss(
                losses, history, capture.take(), response, rho=RHO, gamma=GAMMA, segments=segments
            )
        accelerator.backward(scaler.scale(selected.loss))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        logged.append(float(selected.loss))
        for row, start, stop in segments:
            place = (row, slice(start, stop))
            arrays = [t[place].numpy() for t in (batch["input_ids"], response, selected.keep_mask)]
            loss = losses.detach()[place].float().numpy()
            watcher(
                Observation(step, arrays[0], arrays[1] & (np.arange(len(loss)) > 0), arrays[2], loss, None)
            )
    return watcher, logged


def signals_of(model, observation):
    """Losses and attention of one example's tokens: all logits, eager attention, float32."""
    with torch.no_grad():
        output = model(torch.from_numpy(observation.input_ids)[None], output_attentions=True)
    log_probs, ids = output.logits[0].log_softmax(-1), observation.input_ids
    loss = np.array([0.0] + [-float(log_probs[i - 1, ids[i]]) for i in range(1, ids.size)])
    attention = (output.attentions[-1][0].mean(0).numpy() * ~observation.response_mask).sum(1)
    return loss, attention


def compare(case, watcher, logged):
    """The largest error of a logged loss, and the share of decisions that are not the reference's.

    At the first step the average and the snapshot are the model itself: REL is rounding error, and no mask is expected.
    """
    model = prepared_model(case | {"precision": "float32"})
    (model.get_base_model() if case["history"] == "base" else model).set_attn_implementation("eager")
    model.eval()
    past = copy.deepcopy(model)
    column = {np.array(e["input_ids"]).tobytes(): e["history_loss"] for e in make_scored_examples()}
    errors, wrong, number = [], 0, 0
    average = {k: v.float() for k, v in watcher.weights[0].items()}
    for step in range(STEPS):
        weights = watcher.weights[step]
        model.load_state_dict(weights)
        if case["history"] == "ema" and step:
            average = {k: DECAY * average[k] + (1 - DECAY) * weights[k].float() for k in average}
        past.load_state_dict(watcher.weights[0] if case["history"] == "snapshot" else average)
        kept = []
        for seen in (o for o in watcher.seen if o.step == step):
            loss, attention = signals_of(model, seen)
            kept += loss[seen.keep_mask].tolist()
            if case["history"] == "scores":
                history = np.array(column[seen.input_ids.tobytes()])
            elif case["history"] == "base":
                with past.disable_adapter():
                    history, _ = signals_of(past, seen)
            else:
                history, _ = signals_of(past, seen)
            if case["history"] in ("ema", "snapshot") and not step:
                continue
            mask = seen.response_mask
            signals = {
                "history.loss": history[mask],
                "current.loss": loss[mask],
                "current.attention": attention[mask].astype(float),
            }
            offsets = np.array([0, mask.sum()])
            expected = decide("sstoken", offsets, signals, rho=RHO, gamma=GAMMA).keep
            wrong += int((expected != seen.keep_mask[mask]).sum())
            number += int(mask.sum())
        errors.append(abs(np.mean(kept) - logged[step]))
    assert number
    return max(errors), wrong / number


LOSSES = (
    ('`loss_type="nll"`, `"chunked_nll"`; `Trainer`', "the loss of the kept tokens"),
    ('`loss_type="dft"`', "that, times the token's probability; the selection looks at the plain loss"),
    (
        "auxiliary loss of a mixture of experts",
        "as the first, plus the model's coefficient times the auxiliary loss of all tokens, mean over micro-batches",
    ),
    ("`use_liger_kernel`", "as without: its layer kernels run, its kernels of the loss do not"),
)
"""What composes, and what the logged `loss` is then the mean of; tests/sstoken/in_loop/test_other_losses.py."""


def refusals(folder):
    """Settings that are refused when the trainer is made, and the line that says so."""

    def trainer(model=None, selection=None, changes=None, **more):
        examples = Dataset.from_list(make_scored_examples(4))
        given = {"data_collator": collate, "train_dataset": examples, "selection": selection} | more
        SelfModulatedTrainer(
            make_model() if model is None else model, arguments(folder, **changes or {}), **given
        )

    def prompts():
        from peft import PromptTuningConfig

        return get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))

    tried = {
        "`compute_loss_func`": lambda: trainer(compute_loss_func=print),
        "`label_smoothing_factor`": lambda: trainer(changes={"label_smoothing_factor": 0.1}),
        "Liger's kernels of the loss": lambda: trainer(
            changes={"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
        ),
        '`attn_implementation="eager"`': lambda: trainer(make_model("eager")),
        "prompt tuning": lambda: trainer(prompts(), SelfModulation(gamma=0)),
        '`history="base"` without LoRA': lambda: trainer(selection=SelfModulation(history="base")),
        "`layer=7` of two": lambda: trainer(selection=SelfModulation(layer=7)),
    }
    for name, make in tried.items():
        try:
            make()
        except SstokenError as error:
            yield name, str(error)
        else:
            raise AssertionError(f"{name} is not refused")


def tables(folder):
    """What docs/in-loop.md has between its marks."""
    lines = ["| | " + " | ".join(AXES["loop"]) + " |", "|---" * (len(AXES["loop"]) + 1) + "|"]
    for axis in ("precision", "history", "batch", "extra"):
        for value in AXES[axis]:
            if value != "nothing":
                cells = [why_not({"loop": loop, axis: value}) or "yes" for loop in AXES["loop"]]
                lines.append(f"| {value} | " + " | ".join(cells) + " |")
    lines += ["", "| loss or kernel | the logged `loss` is the mean of |", "|---|---|"]
    lines += [f"| {name} | {mean} |" for name, mean in LOSSES]
    lines += ["", "| refused | with |", "|---|---|"]
    lines += [f"| {name} | {message.replace('|', '/')} |" for name, message in refusals(folder)]
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- tables: python -m tests.sstoken.in_loop.matrix -->\n", "<!-- end of tables -->"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        before, begin, rest = DOCUMENT.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        assert begin, DOCUMENT
        assert end, DOCUMENT
        DOCUMENT.write_text(before + BEGIN + tables(name) + END + after)
