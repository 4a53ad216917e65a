"""Trains a base model, runs the real pipeline, and reports how much planted noise each method kept.

Everything is generated: the data by code, the tiny model from random weights. No network; minutes on two cores. With
`--model M`, the same noisy data is scored by a pretrained model without training.
"""

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline.demo.data import KINDS, DemoExample, Noise, generate, write_jsonl, write_noise
from sstoken.pipeline.demo.model import build_model
from sstoken.pipeline.job import Result
from sstoken.pipeline.verbs import stages
from sstoken.stages import plain_json, storage, tables
from sstoken.stages.checkpoints import load_tokenizer
from sstoken.stages.folders import copy_folder
from sstoken.stages.machine import multiplies_bfloat16
from sstoken.stages.report.show import default_console, print_example, print_legend, read_examples
from sstoken.stages.storage import write_atomic
from sstoken.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The sizes follow from the time budget: two minutes on one core, so under four on a slow laptop.
NUM_BASE = 800
"""Examples on which the base model is trained."""
NUM_PIPELINE = 500
"""Examples that go through the pipeline."""
TRAINING: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3}
"""Settings of the base model's training and of the anchor run."""
RHO = 0.6
METHODS = ("sstoken", "rel", "attention", "loss", "random", "full")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
_LOCAL = Path(".models") / "smollm2"
"""The folder to which `make smollm2` downloads it."""
NUM_PRETRAINED = 80
"""Examples for a pretrained model: takes minutes on two cores with 135 M parameters."""
PRETRAINED_METHODS = ("recommended", "random", "full")

CLASSES = ("content", *KINDS)
_READING = (
    f"Share of the response tokens kept, at rho {RHO}: chance keeps {RHO:.0%} of every class, and a method that "
    "tells noise from content keeps less of the noise. The last two columns are the first and the last tenth of "
    "each response, whatever their class: attention to the prompt fades along a response, as there is more else "
    "to attend to, and what opens it scores high.\n"
)


def run_demo(
    out: Path,
    seed: int = 0,
    console: Console | None = None,
    num_base: int = NUM_BASE,
    num_pipeline: int = NUM_PIPELINE,
    model: str | None = None,
) -> dict[str, Any]:
    """Run the demo in `out` and print its findings; parts finished by an earlier call are not repeated.

    If `model` is given, it scores the examples, and nothing is trained.

    Returns:
        `tokens`: response tokens by class; `kept`: by method, the share of each class that was kept, in [0, 1];
        `kept_by_tenth`: by method, the share kept in each tenth of the responses.

    Raises:
        UsageError: `out` holds something else, or the demo of another seed.
    """
    console = console or default_console()
    began = time.monotonic()

    def say(what: str) -> None:
        clock = Text(f"{time.monotonic() - began:4.0f} s  ", style="dim")
        console.print(clock + Text(what, style="not dim"), soft_wrap=True)

    _claim(out, seed, model)
    if model is not None:
        examples = list(generate(min(num_pipeline, NUM_PRETRAINED), seed))
        say(f"encode: {len(examples):,} examples, with noise planted in their answers")
        selected = _pretrained(out, place_of(model), examples, seed, say)
    else:
        examples = list(generate(num_base + num_pipeline, seed))
        examples, base_examples = examples[num_base:], examples[:num_base]
        say(f"base: a tiny model, from random weights, on {num_base:,} generated examples")
        base = _base_model(out / "base", out / "pretraining", base_examples, seed)
        say(f"encode: {len(examples):,} other examples, with noise planted in their answers")
        selected = _trained(out, base, examples, seed, say)
    say("done")
    found = count_kept({method: result.folder for method, result in selected.items()}, examples)
    found["kept_by_tenth"] = {m: result.metrics["kept_share_by_decile"] for m, result in selected.items()}
    console.print(_findings(found))
    reading = _READING if model is None else _READING.partition(" The last two")[0] + "\n"
    console.print(reading, highlight=False, soft_wrap=not console.is_terminal)
    masked = next(iter(selected.values())).folder
    _print_examples(masked, examples, console)
    _print_next(masked, console)
    return found


def place_of(model: str) -> str:
    """Return a model's folder or Hub id; `smollm2` stands for SmolLM2-135M-Instruct, the local copy if there is one."""
    if model != "smollm2":
        return model
    return str(_LOCAL) if (_LOCAL / "config.json").is_file() else SMOLLM2


def _pretrained(
    out: Path, model: str, examples: Sequence[DemoExample], seed: int, say: Callable[[str], None]
) -> dict[str, Result]:
    """Run the stages without training; return each method's selection."""
    import torch

    tokens = _encoded(out, model, examples)
    say(f"score: their tokens under {model}, with and without their prompts; no training")
    scores = stages.score(
        tokens=tokens,
        checkpoints=[f"base={model}"],
        out=out / "scores",
        attention_from="none",
        signals=("loss", "loss_unconditional"),
        dtype="bfloat16" if torch.accelerator.is_available() or multiplies_bfloat16() else "float32",
    ).folder
    choice = {"rho": RHO, "scope": "sample", "seed": seed}
    choices = {method: {} if method == "full" else choice for method in PRETRAINED_METHODS}
    return _selected(out, tokens, scores, choices, say)


def _trained(
    out: Path, base: Path, examples: Sequence[DemoExample], seed: int, say: Callable[[str], None]
) -> dict[str, Result]:
    """Run the stages as a user would; return each method's selection."""
    tokens = _encoded(out, str(base), examples)
    say(f"anchor: {TRAINING['epochs']} epochs of fine-tuning on them")
    history = stages.anchor(tokens=tokens, model=str(base), out=out / "history", seed=seed, **TRAINING)
    current = history.folder / history.metrics["snapshots"][-1]
    say(f"score: their tokens under the base and under {current.name}")
    scores = stages.score(
        tokens=tokens, checkpoints=[str(base), str(current)], out=out / "scores", attention_from=current.name
    ).folder
    choice = {"rho": RHO, "history": "base", "current": current.name, "seed": seed}
    return _selected(out, tokens, scores, dict.fromkeys(METHODS, choice), say)


def _encoded(out: Path, model: str, examples: Sequence[DemoExample]) -> Path:
    write_jsonl(out / "data.jsonl", examples)
    write_noise(out / "noise.jsonl", examples)
    return stages.encode(data=str(out / "data.jsonl"), model=model, out=out / "tokens").folder


def _selected(
    out: Path,
    tokens: Path,
    scores: Path,
    choices: Mapping[str, Mapping[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Result]:
    """Select by each method, with its settings."""
    say(f"select: {', '.join(choices)}")
    return {
        method: stages.select(
            tokens=tokens, scores=scores, out=out / f"masked-{method}", method=method, **choice
        )
        for method, choice in choices.items()
    }


def count_kept(masked: dict[str, Path], examples: Iterable[DemoExample]) -> dict[str, Any]:
    """Count the response tokens of each class, and the share of them that each method kept.

    Args:
        masked: the masked folder of each method.
        examples: the examples they were made from, with the planted noise.

    Returns:
        `tokens`: class to number; `kept`: method to class to share, in [0, 1].
    """
    by_id = {example.example_id: example for example in examples}
    totals: Counter[str] = Counter()
    kept: dict[str, dict[str, float]] = {}
    classes: dict[str, list[str | None]] = {}
    for method, folder in masked.items():
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
        found: Counter[str] = Counter()
        totals.clear()
        for row in _rows(folder):
            example_id = row["example_id"]
            if example_id not in classes:
                classes[example_id] = token_classes(
                    tokenizer, by_id[example_id], row["input_ids"], row["response_mask"]
                )
            pairs = list(zip(classes[example_id], row["keep_mask"], strict=True))
            totals.update(kind for kind, _ in pairs if kind)
            found.update(kind for kind, keep in pairs if kind and keep)
        kept[method] = {kind: found[kind] / max(1, totals[kind]) for kind in CLASSES}
    return {"tokens": {kind: totals[kind] for kind in CLASSES}, "kept": kept}


def token_classes(
    tokenizer: "PreTrainedTokenizerBase",
    example: DemoExample,
    input_ids: Sequence[int],
    response_mask: Sequence[bool],
) -> list[str | None]:
    """Return the class of each of T tokens: one of `CLASSES`, or None outside the response.

    A token is noise if it shares a non-space character with a planted span. Every other response token, including the
    end-of-turn token, is content.
    """
    text = str(tokenizer.apply_chat_template(list(example.messages), tokenize=False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"][: len(input_ids)] == list(input_ids), example.example_id
    kinds = np.full(len(text), "content", dtype=object)
    start = 0
    for index, message in enumerate(example.messages):
        start = text.index(message["content"], start)
        for span in example.noise:
            if span.message == index:
                kinds[start + span.start : start + span.end] = span.kind
        start += len(message["content"])
    kinds[[c.isspace() for c in text]] = "content"

    def of_token(a: int, b: int) -> str:
        return next((kind for kind in kinds[a:b] if kind != "content"), "content")

    offsets = encoded["offset_mapping"][: len(input_ids)]
    return [of_token(a, b) if r else None for (a, b), r in zip(offsets, response_mask, strict=True)]


def _base_model(folder: Path, work: Path, examples: Sequence[DemoExample], seed: int) -> Path:
    """Make the checkpoint `folder`: random weights, trained on `examples` by the pipeline's stages in `work`."""
    random_model = work / "random"
    storage.of(work).make_folder(work)
    write_jsonl(work / "data.jsonl", examples)
    if not random_model.is_dir():
        with storage.of(random_model).put_folder(random_model) as partial:
            build_model(partial, examples, seed)
    tokens = stages.encode(data=str(work / "data.jsonl"), model=str(random_model), out=work / "tokens")
    trained = stages.anchor(
        tokens=tokens.folder,
        model=str(random_model),
        out=work / "history",
        snapshots=1,
        seed=seed,
        **TRAINING,
    )
    if not folder.is_dir():
        with storage.of(folder).put_folder(folder) as partial:
            copy_folder(trained.folder / trained.metrics["snapshots"][-1], partial)
    return folder


def _held(marker: Path) -> dict[str, Any]:
    try:
        return plain_json.parse_object(marker.read_bytes())
    except ValueError:
        raise SstokenError(f"{marker}: damaged; name another folder, or delete this one") from None


def _claim(out: Path, seed: int, model: str | None) -> None:
    """Mark a folder as this demo's; refuse a folder with other content."""
    marker = out / "demo.json"
    facts = {"seed": seed, "version": __version__} | ({} if model is None else {"model": model})
    if out.is_dir() and any(out.iterdir()) and not marker.is_file():
        raise UsageError(f"{out}: not empty, and not a demo; name another folder")
    if marker.is_file() and (held := _held(marker)) != facts:
        scored_by = f" with {held['model']}" if "model" in held else ""
        raise UsageError(
            f"{out}: holds the demo of seed {held.get('seed')}{scored_by}, by sstoken {held.get('version')}; name "
            "another folder, or delete this one"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(marker, json.dumps(facts) + "\n")
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror}); name another folder") from error


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for part in tables.parts(folder):
        columns = ["example_id", "input_ids", "response_mask", "keep_mask"]
        yield from tables.read_table(part, columns).to_pylist()


def _findings(found: dict[str, Any]) -> Table:
    table = Table("method", *CLASSES, "first 10%", "last 10%", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row(
        "tokens", *(f"{found['tokens'][kind]:,}" for kind in CLASSES), style="dim", end_section=True
    )
    for method, shares in found["kept"].items():
        tenths = found["kept_by_tenth"][method]
        table.add_row(method, *(f"{share:.1%}" for share in (*shares.values(), tenths[0], tenths[-1])))
    return table


def _print_examples(masked: Path, examples: Sequence[DemoExample], console: Console) -> None:
    """Print the first single-turn example with each kind of noise, chosen without looking at the masks."""
    chosen: list[str] = []
    for kind in KINDS:
        of_kind = (e for e in examples if len(e.answers) == 1 and any(n.kind == kind for n in e.noise))
        chosen += islice((e.example_id for e in of_kind if e.example_id not in chosen), 1)
    by_id = {e.example_id: e for e in examples}
    tokenizer = load_tokenizer(str(masked / "tokenizer"))
    for row in read_examples(masked, 0, len(by_id)):
        if row.example_id in chosen:
            example = by_id[row.example_id]
            print_example(row, tokenizer, console)
            planted = "   ".join(_planted(example, noise) for noise in example.noise)
            console.print(Text(f"planted: {planted}\n"), soft_wrap=not console.is_terminal)
    print_legend(console)


def _planted(example: DemoExample, noise: Noise) -> str:
    text = example.messages[noise.message]["content"][noise.start : noise.end].strip()
    return f"{noise.kind} “{text}”" + (f" for “{noise.clean}”" if noise.clean else "")


def _print_next(masked: Path, console: Console) -> None:
    run = {
        "tokens": masked.parent / "tokens",
        "scores": masked.parent / "scores",
        "out": masked.parent / "masked-30",
    }
    options = " ".join(f"--{name} {shlex.quote(str(path))}" for name, path in run.items())
    console.print(
        f"\nLook further, or select again (no model runs):\n  sstoken-curate show {shlex.quote(str(masked))} --row 3\n"
        f"  sstoken-curate select {options} --rho 0.3",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
