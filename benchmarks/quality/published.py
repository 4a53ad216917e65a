"""The methods of `sstoken.methods` as they are published, offline and in the loop, by the project's own code.

Offline: the scorer's signals, the method's own scope, policy, parameters and weights. In the loop: the project's
trainer, with the optimiser, the batches and the steps of `training.train`.
"""

import tempfile
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quality.page import WEIGHT_ON_NOISE
from benchmarks.quality.signals import Signals
from benchmarks.quality.student import Student
from benchmarks.quality.tokens import CONTENT, END, Encoded
from benchmarks.quality.training import batches, optimiser_and_schedule
from sstoken import SelfModulatedTrainer, SelfModulation
from sstoken.in_loop.observation import Observation, Observer, example_key
from sstoken.in_loop.rule import Rule, column_of
from sstoken.labels import IGNORED_LABEL
from sstoken.measure.scorer import MEASURABLE, Scorer
from sstoken.methods import Denominator, Input, Tokens, get_method
from sstoken.signals import get_signal

HISTORY, CURRENT = "history", "current"
LEFT_OUT = {
    "critical-tokens": "its signal is generated text",
    "asft": "offline its weights are those of dft; its other term is a loss of its own",
    "trimming": "by default the same as loss",
}
"""Methods of `sstoken.methods` that no study trains, and why."""
_NEVER = 1_000_000
"""Steps between snapshots of the history: more than any study takes, so it stays the base."""


class Decision(NamedTuple):
    """What a method makes of the response tokens of some examples, [n] for each example."""

    keep: list[NDArray[np.bool_]]
    """Whether a token is trained on."""
    weight: list[NDArray[np.float64]] | None
    """What its loss is multiplied by; None: 1."""
    denominator: Denominator = "kept"


def share_kept(decision: Decision, examples: Sequence[Encoded]) -> dict[str, float]:
    """The share of each class of tokens that is learned, and how much of the weight is on noise.

    Tokens of negative weight, which are trained on to be forgotten, count as dropped.
    """
    kept = np.concatenate(decision.keep)
    if decision.weight is not None:
        kept = kept & (np.concatenate(decision.weight) > 0)
    kinds = np.concatenate([e.kinds for e in examples])
    classes = np.concatenate([e.classes for e in examples])
    content = (kinds == CONTENT) | (kinds == END)
    share = {"all": float(kept.mean())}
    groups = {"content": kinds == CONTENT, "noise": ~content, END: kinds == END}
    groups |= {f"kind {k}": kinds == k for k in sorted(set(kinds) - {CONTENT, END})}
    groups |= {f"class {c}": content & (classes == c) for c in sorted(set(classes) - {END})}
    share |= {name: float(kept[group].mean()) for name, group in groups.items() if group.any()}
    weight = kept * (1.0 if decision.weight is None else np.concatenate(decision.weight))
    share[WEIGHT_ON_NOISE] = float(weight[~content].sum() / max(weight.sum(), 1e-12))
    return share


def measure_inputs(
    student: Student, base: Student, examples: Sequence[Encoded], names: Iterable[str]
) -> Signals:
    """What the methods of these names read and one forward pass gives; history: the base, current: the student.

    Both models' attention implementation is changed.
    """
    inputs = {Input(i) for name in names for i in get_method(name).inputs}
    found: Signals = {}
    for role, model in ((HISTORY, base), (CURRENT, student)):
        own = {i.signal for i in inputs if i.role == role}
        wanted = sorted(s for s in own if s.partition("@")[0] in MEASURABLE)
        if not wanted:
            continue
        references = {HISTORY: base.model} if any("@" in s for s in wanted) else {}
        model.model.set_attn_implementation(
            "sdpa"
        )  # eager rounds otherwise, too far for the scorer's trial in bfloat16
        scorer = Scorer(model.model, signals=wanted, references=references)
        masks = [np.arange(len(e.ids)) >= e.start for e in examples]
        measured = dict(scorer.measure([e.ids for e in examples], masks))
        for signal in wanted:
            values = [measured[i][signal] for i in range(len(examples))]
            found[f"{role}.{signal}"] = np.concatenate(values).astype(np.float64)
    return found


def decide(name: str, examples: Sequence[Encoded], signals: Signals) -> Decision:
    """Decide with the method's own scope and parameters, the examples being the whole dataset.

    Raises:
        UsageError: a signal that the method reads was not measured.
    """
    method = get_method(name)
    counts = [e.num_response for e in examples]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    tokens = Tokens(
        offsets,
        signals,
        own_units=offsets[[0, -1]] if method.scope == "global" else None,
        positions=np.concatenate([np.arange(e.start, len(e.ids)) for e in examples]),
        lengths=np.array([len(e.ids) for e in examples]),
    )
    params = method.read_params({})
    keep, weight = method.decide(tokens, params)[1]
    at, denominator = offsets[1:-1], Rule(method, params, method.scope).denominator
    if weight is None:
        return Decision(np.split(np.asarray(keep), at), None, denominator)
    return Decision(
        np.split(weight != 0, at), np.split(np.asarray(weight, dtype=np.float64), at), denominator
    )


def train_in_loop(
    student: Student,
    examples: Sequence[Encoded],
    name: str,
    history: Signals,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> tuple[Decision, int, int]:
    """Train with the project's trainer, on the batches that `training.train` takes.

    A method that compares with the history has one step on all tokens first: before it, the two do not differ.

    Args:
        student: trained in place.
        examples: all that may be drawn.
        name: of a method.
        history: the base's signals as `history.SIGNAL`, flat.
        num_steps: batches; every example is in one.
        batch_size: examples a batch.
        learning_rate: the peak.
        seed: of the batches' order.

    Returns:
        What was decided about each example when it was seen last; how many tokens were trained on, and in how many
        steps there were none.
    """
    order = [i for batch in batches(len(examples), batch_size, num_steps, seed) for i in batch]
    selection = _settings(name)
    offsets = np.concatenate([[0], np.cumsum([e.num_response for e in examples])])
    rows = []
    for e, first in zip(examples, offsets[:-1].tolist(), strict=True):
        row: dict[str, Any] = {"input_ids": e.ids, "labels": e.ids.copy()}
        row["labels"][: e.start] = IGNORED_LABEL
        for i in get_method(name).inputs:
            if column_of(i) in selection.columns:
                own = history[i][first : first + e.num_response]
                row[column_of(i)] = np.concatenate([np.full(e.start, np.nan), own])
        rows.append(row)
    seen: dict[bytes, Observation] = {}
    trained = [0] * num_steps

    def observe(observation: Observation) -> None:
        seen[observation.key] = observation
        trained[observation.step] += int(_trained_on(observation).sum())

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on batches of which the study has few
        _trainer(
            student, rows, order, selection, observe, folder, num_steps, batch_size, learning_rate
        ).train()
    student.model.eval()
    keep, weight = [], []
    for example in examples:
        mask = np.arange(len(example.ids)) >= example.start
        observed = seen[example_key(example.ids, mask)]
        keep.append(_trained_on(observed)[mask])
        weight.append(
            (observed.keep_mask.astype(float) if observed.weight is None else observed.weight)[mask]
        )
    return Decision(keep, weight), sum(trained), trained.count(0)


def _trained_on(observation: Observation) -> NDArray[np.bool_]:
    return observation.keep_mask if observation.weight is None else observation.weight != 0


def _settings(name: str) -> SelfModulation:
    """The base as history: its signals as columns, or its weights where whole distributions are compared."""
    method = get_method(name)
    needs_weights = any(get_signal(Input(i).signal).needs == "second checkpoint" for i in method.inputs)
    compares = needs_weights or set(method.roles) == {HISTORY, CURRENT}
    warmup = 1 if compares else 0
    if needs_weights:
        return SelfModulation(method=name, history="snapshot", history_every=_NEVER, warmup_steps=warmup)
    return SelfModulation(method=name, warmup_steps=warmup)


def _trainer(
    student: Student,
    rows: list[dict[str, Any]],
    order: list[int],
    selection: SelfModulation,
    observe: Observer,
    folder: str,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
) -> SelfModulatedTrainer:
    from transformers import TrainingArguments

    class InOrder(SelfModulatedTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return order

    parameters = [p for p in student.model.parameters() if p.requires_grad]
    return InOrder(
        model=student.model,
        args=TrainingArguments(
            folder,
            max_steps=num_steps,
            per_device_train_batch_size=batch_size,
            max_grad_norm=1.0,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=_pad,
        optimizers=optimiser_and_schedule(parameters, learning_rate, num_steps),
        selection=selection,
        observers=[observe],
    )


def _pad(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filling: int) -> torch.Tensor:
        out = np.full((len(rows), width), filling, dtype=np.int64)
        for line, row in zip(out, rows, strict=True):
            line[: len(row["input_ids"])] = row.get(name, 1)
        return torch.from_numpy(out)

    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", IGNORED_LABEL),
        "attention_mask": padded("attention_mask", 0),
    }
