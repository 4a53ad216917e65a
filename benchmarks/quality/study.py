"""Runs a study cell by cell (a method and a seed); a cell whose file is there is not run again."""

import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.quality import data
from benchmarks.quality.marking import right
from benchmarks.quality.planting import Example, plant
from benchmarks.quality.published import Decision, decide, measure_inputs, share_kept, train_in_loop
from benchmarks.quality.scores import SCORES
from benchmarks.quality.settings import MethodRun, Seed, Study
from benchmarks.quality.signals import Signals, measure, measure_layers, measure_loss
from benchmarks.quality.student import Student, load_tokenizer
from benchmarks.quality.tokens import CONTENT, END, Encoded, encode, encode_plain, end_token, prompt_text
from benchmarks.quality.training import answer_greedily, losses_by_class, train
from sstoken.selection import keep_per_example

Say = Callable[[str], None]
LESSON_SEED = 1_000_000
"""Of the answers that a base is taught; no seed of a study."""


class Cells:
    """The cells of one study in a folder.

    Args:
        study: what to run.
        folder: `signals/` and `cells/` are kept in it.
        say: called with a line on what is done.
    """

    def __init__(self, study: Study, folder: Path, say: Say) -> None:
        self.study, self.folder, self.say = study, folder, say
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        (folder / "signals").mkdir(exist_ok=True)
        self.tokenizer = load_tokenizer(study.base)
        self._below: dict[bytes, Tensor] = {}
        self.num_run = 0
        """Cells that were run here, not found; without methods, training sets that were measured."""

    def run(self) -> None:
        """Run what is missing: for each seed `full` first, since its model is the signals' current one."""
        for seed in self.study.seeds:
            for method in sorted(self.study.methods, key=lambda m: m.method != "full"):
                self.cell(method, seed)
            if self.study.layers:
                self._measure_layers(seed)
            if not self.study.methods:
                self.num_run += not (self.folder / "signals" / f"history-{seed.key}.npz").exists()
                self.signals(seed, self.training_set(seed))
                self.say(f"{self.study.name}  {seed.key}: measured")
        for seed in self.study.variance:
            for method in self.study.varied(seed):
                self.cell(method, seed)

    def path(self, method: MethodRun, seed: Seed) -> Path:
        """Where a cell's result is kept."""
        return self.folder / "cells" / f"{method.key.replace(' ', '_')}-{seed.key}.json"

    def cell(self, method: MethodRun, seed: Seed) -> None:
        """Train on one method's mask with one seed; measure what comes of it."""
        path = self.path(method, seed)
        if path.exists():
            return
        began, cpu_began = time.monotonic(), time.process_time()
        self.num_run += 1
        training = self.training_set(seed)
        is_current = method.key == "full" and seed in self.study.seeds
        student = self._student(seed)
        decision = (
            Decision([], None) if method.published == "in-loop" else self.decide(method, seed, training)
        )
        num_steps = self.study.epochs * len(training) // self.study.batch_size
        if method.protocol == "equal-tokens":
            num_steps = round(num_steps / max(share_kept(decision, training)["all"], 1e-9))
        if method.method == "base":
            num_steps = 0
        options: dict[str, Any] = {
            "num_steps": num_steps,
            "batch_size": self.study.batch_size,
            "learning_rate": self.study.learning_rate,
            "seed": seed.order,
        }
        early: Signals = {}

        def after_step(step: int) -> None:
            if is_current and step in self.study.checkpoints:
                student.model.eval()
                early.update(measure_loss(student, training, f"step{step}"))
                student.model.train()

        if method.published == "in-loop":
            decision, trained, empty = train_in_loop(
                student, training, method.method, self._all_signals(seed, training), **options
            )
        else:
            trained, empty = train(student, training, *decision, after_step=after_step, **options)
        found = {
            "method": method.key,
            "seed": seed.model_dump(exclude_none=True),
            "steps": num_steps,
            "trained_tokens": trained,
            "empty_steps": empty,
            "kept": share_kept(decision, training),
            **(self._untrained if method.method == "base" else self.evaluate(student)),
        }
        if is_current:
            self._measure_current(student, seed, training, early)
        found["seconds"] = round(time.monotonic() - began, 1)
        found["cpu_seconds"] = round(time.process_time() - cpu_began, 1)
        path.with_suffix(".partial").write_text(json.dumps(found), encoding="utf-8")
        path.with_suffix(".partial").rename(path)
        loss = sum(r["loss_all"] for r in found["held_out"]) / sum(r["tokens_all"] for r in found["held_out"])
        self.say(f"{self.study.name}  {seed.key}  {method.key}: loss {loss:.3f}, {found['seconds']} s")

    def _student(self, seed: Seed) -> Student:
        return Student(self._base, self.study.upper_layers, seed.drawn, below=self._below)

    @cached_property
    def _base(self) -> str | Path:
        """The base, or the folder of what it was taught; studies with the same lesson share it."""
        study, lesson = self.study, self.study.lesson
        if lesson is None:
            return study.base
        folder = self.folder.parent / "bases" / f"{study.base}-{study.data}-{lesson.key}"
        if not folder.exists():
            rows = data.draw(study.data, "train", lesson.num_train, LESSON_SEED)
            examples = encode(self.tokenizer, [Example(r, r.answer) for r in rows], study.max_length)
            student = Student(study.base, None, LESSON_SEED)
            train(
                student,
                examples,
                [np.ones(e.num_response, dtype=bool) for e in examples],
                num_steps=len(examples) // lesson.batch_size,
                batch_size=lesson.batch_size,
                learning_rate=lesson.learning_rate,
                seed=LESSON_SEED,
            )
            partial = folder.with_name(folder.name + ".partial")
            student.model.save_pretrained(partial)
            partial.rename(folder)
            self.say(f"{study.name}  taught the base: {folder.name}")
        return folder

    @cached_property
    def _untrained(self) -> dict[str, Any]:
        """The base without training: the same with every seed."""
        return self.evaluate(self._student(self.study.seeds[0]))

    def training_set(self, seed: Seed) -> list[Encoded]:
        """The training examples of a seed, with noise in them."""
        rows = data.draw(self.study.data, "train", self.study.num_train, seed.data)
        examples = plant(rows, rows, rate=self.study.noise_rate, seed=seed.noise, half=self.study.phrases)
        return encode(self.tokenizer, examples, self.study.max_length)

    def decide(self, method: MethodRun, seed: Seed, training: Sequence[Encoded]) -> Decision:
        """What a method makes of each response token, before training."""
        if method.published:
            return decide(method.method, training, self._all_signals(seed, training))
        offsets = np.concatenate([[0], np.cumsum([e.num_response for e in training])]).astype(np.int64)
        kinds = np.concatenate([e.kinds for e in training])
        if method.method in ("base", "full"):
            kept = np.ones(len(kinds), dtype=bool)
        elif method.method == "noise":
            kept = (kinds == CONTENT) | (kinds == END)
        else:
            scores = self._scores(method.method, seed, training, offsets)
            whole = np.array([0, len(scores)], dtype=np.int64)
            kept = keep_per_example(scores, offsets if method.scope == "sample" else whole, method.rho)
        if method.protect:
            kept = kept | (kinds == END)
        return Decision(np.split(kept, offsets[1:-1]), None)

    def _scores(
        self, name: str, seed: Seed, training: Sequence[Encoded], offsets: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        if name == "random":
            return np.random.default_rng([seed.data, seed.noise, seed.drawn]).random(int(offsets[-1]))
        if name == "worst":
            return -SCORES["pmi-band"](self.signals(seed, training), offsets)
        return SCORES[name](self.signals(seed, training), offsets)

    def signals(self, seed: Seed, training: Sequence[Encoded]) -> Signals:
        """The history's signals (the base model's) and the current's, where `full` has been trained."""
        path = self.folder / "signals" / f"history-{seed.key}.npz"
        same_answers = sorted(path.parent.glob(f"history-d{seed.data}-n{seed.noise}-*.npz"))
        if not path.exists() and same_answers:
            path = same_answers[0]  # the base does not depend on the order
        if not path.exists():
            student = self._student(seed)
            self._save(path, measure(student, training, "history", attention=False))
        others = [self.folder / "signals" / f"{name}-{seed.key}.npz" for name in ("layers", "current")]
        return {name: values for p in (path, *others) if p.exists() for name, values in np.load(p).items()}

    def _all_signals(self, seed: Seed, training: Sequence[Encoded]) -> Signals:
        """With those that published methods read."""
        path = self.folder / "signals" / f"published-{seed.key}.npz"
        return self.signals(seed, training) | (dict(np.load(path)) if path.exists() else {})

    def _measure_layers(self, seed: Seed) -> None:
        path = self.folder / "signals" / f"layers-{seed.key}.npz"
        if path.exists():
            return
        student = Student(self._base, self.study.upper_layers, seed.drawn, attention="eager")
        self._save(path, measure_layers(student, self.training_set(seed), "history"))
        self.say(f"{self.study.name}  {seed.key}: attention of every layer measured")

    def _measure_current(
        self, student: Student, seed: Seed, training: Sequence[Encoded], early: Signals
    ) -> None:
        student.model.set_attn_implementation("eager")
        conditional_only = self.study.upper_layers is not None
        found = measure(student, training, "current", attention=True, unconditional=not conditional_only)
        self._save(self.folder / "signals" / f"current-{seed.key}.npz", found | early)
        if names := {m.method for m in self.study.methods if m.published}:
            inputs = measure_inputs(student, self._student(seed), training, names)
            self._save(self.folder / "signals" / f"published-{seed.key}.npz", inputs)

    @staticmethod
    def _save(path: Path, signals: Signals) -> None:
        with open(path.with_suffix(".partial"), "wb") as file:
            np.savez_compressed(file, **{k: v.astype(np.float32) for k, v in signals.items()})
        path.with_suffix(".partial").rename(path)

    @cached_property
    def _held_out(self) -> list[Encoded]:
        rows = data.draw(self.study.data, "test", self.study.num_held_out, 0)
        return encode(self.tokenizer, [Example(r, r.answer) for r in rows], self.study.max_length)

    @cached_property
    def _others(self) -> list[Encoded]:
        rows = data.roleplay(self.study.num_forgetting)
        return encode(self.tokenizer, [Example(r, r.answer) for r in rows], min(self.study.max_length, 256))

    def evaluate(self, student: Student) -> dict[str, Any]:
        """Held-out losses by class, greedy answers, and the loss on other data."""
        found: dict[str, Any] = {"held_out": losses_by_class(student, self._held_out)}
        if self.study.num_greedy:
            rows = data.draw(self.study.data, "test", self.study.num_greedy, 0)
            answers = answer_greedily(
                student,
                self.tokenizer,
                [prompt_text(self.tokenizer, row.question) for row in rows],
                self.tokenizer.convert_tokens_to_ids(end_token(self.tokenizer)),
                self.study.max_new_tokens,
            )
            found["greedy"] = [
                {"right": right(row, text), "ended": ended, "length": length, "text": text}
                for row, (text, ended, length) in zip(rows, answers, strict=True)
            ]
        if self.study.num_forgetting:
            found["forgetting"] = losses_by_class(student, self._others)
            texts = data.plain_texts(self.study.num_forgetting)
            plain = encode_plain(self.tokenizer, texts, min(self.study.max_length, 256))
            found["plain"] = losses_by_class(student, plain)
        return found
