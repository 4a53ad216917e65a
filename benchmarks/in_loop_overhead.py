"""What in-loop selection costs: training steps per second, step by step in turns in one run.

    plain       transformers' Trainer on all response tokens
    scores      in the loop, history losses from a column
    rho 1       in the loop with everything kept: nothing is measured or selected
    plain lora  Trainer with a LoRA adapter
    base        in the loop with that adapter; history is the model without it
    script      what research scripts do: ask the model for all attention weights, losses in a loop over examples

A model of 34M parameters with random weights (0.5B on a GPU); the second half of each example is the response. Each
length is measured in float32 and in bfloat16: autocast over float32 weights, as trainers have it. All sides see the
same batches, each in its own `train()`. A ratio is that of the times of two sides' steps in the same round, whose order
rotates; given are the median of the rounds, and the lowest and highest.

Plain computes logits of all tokens, in the loop they are computed for response tokens alone, which saves more than
selecting costs. `scores / rho 1` compares with the same trainer where all is kept: it measures nothing first, and
computes logits with gradients for every response token.

    python benchmarks/in_loop_overhead.py --quick
    python benchmarks/in_loop_overhead.py --lengths 1024 --rounds 10 --json
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.rounds import at_least
from sstoken import SelfModulatedTrainer, SelfModulation
from sstoken.methods import decide

warnings.filterwarnings("ignore", "in-loop selection")  # random weights and histories mean nothing

RHO, GAMMA = 0.6, 0.5
TOKENS_A_STEP = {"cpu": 1024, "cuda": 8192}
SIDES = ("plain", "scores", "rho 1", "plain lora", "base", "script")
RATIOS = (("scores", "plain"), ("scores", "rho 1"), ("base", "plain lora"), ("script", "plain"))
CPU = {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "intermediate_size": 1536}
GPU = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def main() -> None:
    """Parse the options and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="length 256 only")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object on the last line")
    parser.add_argument("--lengths", default="", help="comma-separated (default 256,1024)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    parser.add_argument("--sides", default=",".join(SIDES), help="comma-separated, plain first")
    parser.add_argument("--rounds", type=int, default=7, help="at least 3")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = options.lengths or ("256" if options.quick else "256,1024")
    rounds = at_least(options.rounds)
    figures: dict[str, dict[str, Any]] = {}
    for length in map(int, lengths.split(",")):
        batch = max(1, TOKENS_A_STEP[device] // length)
        rows = make_rows(length, batch * (rounds + 1))
        for dtype in options.dtypes.split(","):
            figures[f"{length} {dtype}"] = compare(
                options.sides.split(","), rows, batch, rounds, device, dtype
            )
    if options.json:
        print(json.dumps(figures))


def compare(
    names: list[str], rows: list[dict[str, list[Any]]], batch: int, rounds: int, device: str, dtype: str
) -> dict[str, Any]:
    """Time the sides, in turns after every step; the first step of each is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            name: Side(make_trainer(name, folder, rows, batch, rounds + 1, device, dtype)) for name in names
        }
        times: dict[str, list[float]] = {name: [] for name in names}
        for round_ in range(rounds + 1):
            first = round_ % len(names)  # each follows another: what one leaves in caches burdens all
            for name in (*names[first:], *names[:first]):
                seconds = sides[name].step()
                if round_:
                    times[name].append(seconds)
        for side in sides.values():
            side.join()
    return report(f"{len(rows[0]['input_ids']):5} {dtype}", times)


class Side(TrainerCallback):
    """A training run in a thread of its own that waits after each step until it is asked for the next."""

    def __init__(self, trainer: Trainer) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        trainer.add_callback(self)
        self._thread = threading.Thread(target=self._train, args=(trainer,), daemon=True)
        self._thread.start()

    def _train(self, trainer: Trainer) -> None:
        self._go.acquire()
        trainer.train()

    def step(self) -> float:
        """Take a step; its seconds, from the end of the last to its own."""
        start = time.perf_counter()
        self._go.release()
        if not self._done.acquire(timeout=600):
            sys.exit("a training run failed, or took more than ten minutes for a step")
        return time.perf_counter() - start

    def join(self) -> None:
        """Let it end."""
        self._go.release()
        self._thread.join()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand over."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._done.release()
        self._go.acquire()


def report(title: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Print and return each side's steps per second, and how sides compare within each round."""
    figures: dict[str, Any] = {
        name: {"steps_per_second": round(1 / statistics.median(seconds), 3)}
        for name, seconds in times.items()
    }
    for above, below in RATIOS:
        if above in times and below in times:
            ratios = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
            figures[f"{above} / {below}"] = {
                "time": round(statistics.median(ratios), 3),
                "lowest": round(ratios[0], 3),
                "highest": round(ratios[-1], 3),
            }
    for name, values in figures.items():
        print(f"{title}  {name:17}  " + "  ".join(f"{k} {v:.3f}" for k, v in values.items()), flush=True)
    return figures


def make_rows(length: int, number: int) -> list[dict[str, list[Any]]]:
    """Random examples of one length; the second half is the response."""
    random = np.random.default_rng(0)
    response = np.arange(length) >= length // 2
    rows = []
    for _ in range(number):
        ids = random.integers(1, 32_000, length)
        history = np.where(response, random.gamma(9.0, 1.0, length), np.nan).astype(np.float32)
        labels = np.where(response, ids, -100)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "history_loss": history.tolist()})
    return rows


def make_model(device: str, implementation: str, lora: bool) -> Any:
    """Random weights; the CPU's has 34M parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        max_position_embeddings=16_384,
        tie_word_embeddings=True,
        attn_implementation=implementation,
        **(GPU if device == "cuda" else CPU),
    )
    model = LlamaForCausalLM(config)
    if not lora:
        return model
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=16, target_modules=targets))


def make_trainer(
    name: str, folder: str, rows: list[dict[str, list[Any]]], batch: int, steps: int, device: str, dtype: str
) -> Trainer:
    """A side's trainer."""
    kind: type[Trainer] = Trainer
    more: dict[str, Any] = {}
    if name in ("scores", "rho 1", "base"):
        kind = SelfModulatedTrainer
        history: Any = "base" if name == "base" else "scores"
        rho = 1.0 if name == "rho 1" else RHO
        more["selection"] = SelfModulation(rho=rho, gamma=GAMMA, history=history)
    elif name == "script":
        kind = ScriptTrainer
    trainer = kind(
        make_model(device, "eager" if name == "script" else "sdpa", lora=name in ("plain lora", "base")),
        TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-5,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            bf16=dtype == "bfloat16",
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        data_collator=collate,
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def collate(rows: list[dict[str, list[Any]]]) -> dict[str, torch.Tensor]:
    """All examples are of one length."""
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


class ScriptTrainer(Trainer):
    """All attention weights of all layers, full logits, a loop over examples, numpy."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.history = {tuple(row["input_ids"]): np.array(row["history_loss"]) for row in self.train_dataset}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The mean loss of each example's kept tokens, averaged over examples."""
        labels = inputs.pop("labels")
        outputs = model(**inputs, output_attentions=True)
        losses = []
        for row, ids in enumerate(inputs["input_ids"]):
            response = labels[row] != -100
            log_probs = torch.log_softmax(outputs.logits[row, :-1].float(), -1)
            loss = torch.zeros(ids.numel(), device=ids.device)
            loss[1:] = -log_probs.gather(1, ids[1:, None])[:, 0]
            weights = outputs.attentions[-1][row].float().mean(0)
            attention = (weights * ~response).sum(1)
            mask = response.cpu().numpy()
            signals = {
                "history.loss": self.history[tuple(ids.tolist())][mask],
                "current.loss": loss.detach().cpu().numpy()[mask].astype(np.float64),
                "current.attention": attention.detach().cpu().numpy()[mask].astype(np.float64),
            }
            keep = decide("sstoken", np.array([0, mask.sum()]), signals, rho=RHO, gamma=GAMMA).keep
            losses.append(loss[response][torch.from_numpy(keep).to(ids.device)].mean())
        return torch.stack(losses).mean()


if __name__ == "__main__":
    main()
