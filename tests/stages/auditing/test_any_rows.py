"""Whatever a row holds, an audit ends with a result that is JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sstoken.errors import UsageError
from sstoken.stages.auditing.run import audit
from tests.stages.auditing import datasets

SMALL = st.integers(0, 4)
NUMBERS = (
    st.integers(-2, 300) | st.sampled_from([-100, 2**40, 2**70]) | st.floats() | st.booleans() | st.none()
)
LISTS = st.lists(SMALL, max_size=12) | st.lists(st.integers(0, 260) | st.just(-100), max_size=12)
CELLS = LISTS | st.lists(NUMBERS, max_size=6) | st.lists(LISTS, max_size=2) | NUMBERS | st.text(max_size=3)
NAMES = ("labels", "loss_mask", "assistant_masks", "completion_mask", "attention_mask", "position_ids", "seq_lengths",
         "weight", "response_mask", "keep_mask", "id")  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return datasets.save(datasets.chatml(), tmp_path_factory.mktemp("tokenizer"))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_rows(tokenizer: str, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=4))
    columns = {"input_ids": CELLS} | dict.fromkeys(names, CELLS)
    rows = data.draw(st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=4))
    place: str | None = data.draw(st.sampled_from([tokenizer, None]))
    result = audit(rows, tokenizer=place)
    assert result.facts["rows"] == len(rows)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["form"] == "tokenised"
    for finding in result.findings:
        assert 1 <= finding.rows <= len(rows)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_change_of_a_sound_row(tokenizer: str, data: st.DataObject) -> None:
    """Tokens deleted, doubled or exchanged, in the ids with their labels or in the labels alone."""
    row: dict[str, Any] = datasets.sound(datasets.chatml(), 1, 2)[0]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(row["input_ids"]) - 1))
        token = data.draw(st.integers(0, 260))
        kind = data.draw(st.sampled_from(["delete", "insert", "label"]))
        if kind == "delete":
            row = {name: values[:at] + values[at + 1 :] for name, values in row.items()}
        elif kind == "insert":
            row = {name: [*values[:at], token, *values[at:]] for name, values in row.items()}
        else:
            row["labels"][at] = data.draw(st.sampled_from([-100, row["input_ids"][at], token]))
    result = audit([row], tokenizer=tokenizer)
    assert result.facts["tokens"] == len(row["input_ids"])
    assert result.facts["trained"] <= sum(label != -100 for label in row["labels"])


def test_a_pattern_of_files(tokenizer: str, tmp_path: Path) -> None:
    rows = datasets.sound(datasets.chatml(), 4, 1)
    for number, row in enumerate(rows):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(row) + "\n")
    for source in (f"{tmp_path}/part-*.jsonl", tmp_path):
        assert audit(source, tokenizer=tokenizer).facts["rows"] == 4


def test_a_folder_of_several_kinds_of_files_is_refused(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(datasets.sound(datasets.chatml(), 1)[0]) + "\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert audit(tmp_path, tokenizer=tokenizer).facts["rows"] == 1
    (tmp_path / "part.arrow").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds \.arrow and \.jsonl files; name those"):
        audit(tmp_path, tokenizer=tokenizer)
