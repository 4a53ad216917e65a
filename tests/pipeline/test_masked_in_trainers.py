"""`masked/` is what a trainer takes: with unmodified trainers, the labels that reach the model are exactly ours."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from sstoken.pipeline import api
from tests.factories import save_model
from tests.pipeline.small_run import save_conversations

EXAMPLES = 30
Example = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids and labels."""


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    model = AutoModelForCausalLM.from_pretrained(save_model(folder / "base", positions=256))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder / "later")
    data = save_conversations(folder / "data.jsonl", EXAMPLES)
    base = str(folder / "base")
    api.encode(data=str(data), model=base, out=folder / "tokens", shard_rows=11, workers=1)
    api.score(tokens=folder / "tokens", checkpoints=[base, str(folder / "later")], out=folder / "scores")
    return api.select(tokens=folder / "tokens", scores=folder / "scores", out=folder / "masked").folder


@pytest.fixture
def model(masked: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(masked.parent / "base")


@pytest.fixture
def dataset(masked: Path, tmp_path: Path) -> Dataset:
    return load_dataset(str(masked), split="train", cache_dir=str(tmp_path / "cache"))


def ours(masked: Path) -> list[Example]:
    """From the keep mask, not from `labels`."""
    table = pl.read_parquet(masked / "part-*.parquet")
    return [
        (tuple(ids), tuple(i if kept else -100 for i, kept in zip(ids, keep, strict=True)))
        for ids, keep in zip(table["input_ids"], table["keep_mask"], strict=True)
    ]


class Recorder:
    """What a model is called with, and what comes of it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.calls: list[dict[str, torch.Tensor]] = []
        self._hidden = torch.empty(0)
        model.model.register_forward_hook(self._keep)
        model.register_forward_hook(self._record, with_kwargs=True)

    def _keep(self, decoder: torch.nn.Module, _: Any, output: Any) -> None:
        self._hidden = output.last_hidden_state.detach().clone()

    def _record(self, model: PreTrainedModel, _: Any, inputs: dict[str, Any], output: Any) -> None:
        call = {name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)}
        self.calls.append(call | {"hidden": self._hidden, "loss": output.loss.detach().clone()})


def examples(call: dict[str, torch.Tensor]) -> Iterator[tuple[Example, torch.Tensor]]:
    """The examples of a call, without padding and out of their packs, each with its hidden states."""
    for row, ids in enumerate(call["input_ids"]):
        for part in _parts(call, row):
            labels = call["labels"][row][part]
            yield (tuple(ids[part].tolist()), tuple(labels.tolist())), call["hidden"][row][part]


def _parts(call: dict[str, torch.Tensor], row: int) -> list[slice]:
    if "attention_mask" in call:
        length = int(call["attention_mask"][row].sum())
        assert (call["labels"][row][length:] == -100).all()
        return [slice(0, length)]
    position_ids = call["position_ids"][row]
    starts = [*(position_ids == 0).nonzero().flatten().tolist(), position_ids.numel()]
    for start, stop in zip(starts, starts[1:], strict=False):
        assert position_ids[start:stop].tolist() == list(range(stop - start))
    return [slice(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]


def check_received(recorder: Recorder, masked: Path) -> None:
    """Every example came once, with our labels; it saw itself alone; the loss is that of the kept tokens."""
    received = [example for call in recorder.calls for example, _ in examples(call)]
    assert Counter(received) == Counter(ours(masked))
    assert len(received) == EXAMPLES
    model = AutoModelForCausalLM.from_pretrained(masked.parent / "base").requires_grad_(False)
    for call in recorder.calls:
        losses = []
        for (ids, labels), hidden in examples(call):
            alone = model(torch.tensor([ids]), output_hidden_states=True)
            torch.testing.assert_close(hidden, alone.hidden_states[-1][0], atol=1e-5, rtol=1e-4)
            log_probs = alone.logits[0].log_softmax(-1)
            losses += [-log_probs[i - 1, label] for i, label in enumerate(labels) if label != -100]
        torch.testing.assert_close(call["loss"], torch.stack(losses).mean(), atol=1e-5, rtol=1e-4)


SETTINGS: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.0,  # the model stays, so that its answers can be compared
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def test_transformers_trainer(masked: Path, dataset: Dataset, model: PreTrainedModel, tmp_path: Path) -> None:
    recorder = Recorder(model)
    tokenizer = AutoTokenizer.from_pretrained(masked / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **SETTINGS),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    check_received(recorder, masked)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": True},
        {"packing": True, "shuffle_dataset": True},
        {"padding_free": True},
        {"completion_only_loss": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("lean", [False, True])
def test_sft_trainer(
    masked: Path,
    dataset: Dataset,
    model: PreTrainedModel,
    tmp_path: Path,
    settings: dict[str, bool],
    lean: bool,
) -> None:
    from trl import SFTConfig, SFTTrainer

    if lean:
        dataset = dataset.select_columns(["example_id", "input_ids", "labels", "keep_mask"])
    recorder = Recorder(model)
    length = 256 if settings.get("packing") else None
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), max_length=length, loss_type="nll", **settings, **SETTINGS),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(masked / "tokenizer"),
    )
    trainer.train()
    check_received(recorder, masked)
    if "packing" in settings:
        assert len(recorder.calls) < EXAMPLES / 4


def test_found_by_its_files_too(masked: Path, dataset: Dataset, tmp_path: Path) -> None:
    """The folder's card names the shards, though JSON files and a tokenizer stand beside them."""
    files = str(masked / "part-*.parquet")
    by_files = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert by_files.features == dataset.features
    assert by_files.to_list() == dataset.to_list()
    assert dataset.num_rows == EXAMPLES
    streamed = load_dataset(str(masked), split="train", streaming=True)
    assert next(iter(streamed)) == dataset[0]


def test_every_reader_sees_the_same(masked: Path, dataset: Dataset) -> None:
    by_pyarrow = pa.concat_tables([pq.read_table(path) for path in sorted(masked.glob("part-*.parquet"))])
    by_polars = pl.read_parquet(masked / "part-*.parquet")
    assert by_pyarrow.to_pylist() == dataset.to_list()
    assert by_polars.to_dicts() == dataset.to_list()
    for name in ("input_ids", "labels"):
        assert by_pyarrow.schema.field(name).type.value_type == pa.int32()
        assert by_polars.schema[name] == pl.List(pl.Int32)


def test_provenance_is_in_the_file_and_nothing_of_a_library(masked: Path) -> None:
    for path in masked.glob("part-*.parquet"):
        metadata = pq.read_schema(path).metadata
        assert set(metadata) == {b"sstoken"}
        facts = json.loads(metadata[b"sstoken"])
        assert facts["method"] == "sstoken"
        assert facts["rho"] == 0.6
        assert {role: used["name"] for role, used in facts["checkpoints"].items()} == {
            "history": "base",
            "current": "later",
            "attention": "later",
        }


def test_pyarrow_alone_reads_it(masked: Path) -> None:
    """Where neither we nor `datasets` are installed."""
    code = (
        "import sys; sys.modules['sstoken'] = sys.modules['datasets'] = None\n"
        "import pyarrow.parquet as pq\n"
        "table = pq.read_table(sys.argv[1], columns=['input_ids', 'labels'])\n"
        "print(sum(len(row) for row in table['labels'].to_pylist()))"
    )
    path = masked / "part-00000.parquet"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) == sum(map(len, pq.read_table(path)["input_ids"].to_pylist()))
