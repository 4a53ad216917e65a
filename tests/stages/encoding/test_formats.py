"""A row gives the same conversation, or the same refusal, whatever file it stands in."""

import copy
import csv
import io
import json
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sstoken.stages.encoding.arrow_rows import NULLS_LEFT_OUT
from sstoken.stages.encoding.conversations import to_conversation
from sstoken.stages.encoding.layouts import detect_layout
from sstoken.stages.encoding.messages import BadRow
from sstoken.stages.encoding.sources import open_rows

BIG = 123456789012345678901234


def read(path, split=None):
    """The one row's conversation as JSON text and its notes, or why it is refused."""
    (row,) = open_rows(str(path), split)
    try:
        if row.problem is not None:
            raise BadRow(*row.problem)
        found = to_conversation(row.value, detect_layout(row.value))
    except BadRow as error:
        return error.reason, set()
    said = [found.messages, found.tools, sorted(found.untrained)]
    return json.dumps(said), set(found.notes) | set(row.notes)


def without_nulls(value):
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def as_text(row):
    """Each column as a CSV file holds it."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}


def write_csv(path, row):
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(row))
    writer.writeheader()
    writer.writerow(as_text(row))
    path.write_text(buffer.getvalue(), encoding="utf-8", newline="")


def write_json_columns(path, row):
    """Messages and tools in the Arrow JSON type, as `datasets` writes what has no one type."""
    columns = {}
    for name, value in row.items():
        each = pa.ExtensionArray.from_storage(pa.json_(), pa.array(map(json.dumps, value), pa.string()))
        columns[name] = pa.ListArray.from_arrays([0, len(value)], each)
    pq.write_table(pa.table(columns), path)


def write_struct(path, row):
    """False where Arrow has no type for the row, or changes it while it writes."""
    try:
        table = pa.Table.from_pylist([row])
        pq.write_table(table, path)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return False
    return json.dumps(without_nulls(table.to_pylist()[0])) == json.dumps(without_nulls(row))


def write_saved(path, row):
    """False as in `write_struct`: a list of 0 and 0.0 becomes one of floats."""
    try:
        saved = datasets.Dataset.from_list([row])
        saved.save_to_disk(path)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
        return False
    return json.dumps(without_nulls(saved[0]), sort_keys=True) == json.dumps(
        without_nulls(row), sort_keys=True
    )


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
# Arrow ends a name at a NUL: such a key is lost when the file is written.
keys = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(BIG) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(keys, values, max_size=3)


@st.composite
def rows(draw):
    messages = [{"role": "user", "content": draw(text | st.just("half \ud800"))}]
    if draw(st.booleans()):
        given_as = draw(st.sampled_from([lambda a: a, json.dumps]))
        call = {"type": "function", "function": {"name": "f", "arguments": given_as(draw(arguments))}}
        messages += [
            {"role": "assistant", "content": draw(st.none() | text), "tool_calls": [call]},
            {"role": "tool", "content": draw(text)},
        ]
    answer = {"role": "assistant", "content": draw(text), "weight": draw(st.sampled_from([0, 1, None]))}
    if draw(st.booleans()):
        answer["reasoning_content"] = draw(text)
    row = {"messages": [*messages, answer]}
    if draw(st.booleans()):
        row["tools"] = [{"name": "f", "parameters": draw(arguments)}]
    return row


@settings(deadline=None, max_examples=60)
@given(rows())
def test_every_format_gives_the_same(row) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "d.jsonl").write_text(json.dumps(row))
        expected, notes = read(path / "d.jsonl")
        (path / "d.json").write_text(json.dumps([row], indent=1))
        write_csv(path / "d.csv", row)
        write_json_columns(path / "d.parquet", row)
        for name in ("d.json", "d.csv", "d.parquet"):
            assert read(path / name) == (expected, notes), name
        bare = copy.deepcopy(row)
        for message in bare["messages"]:
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = without_nulls(call["function"]["arguments"])
        bare |= {"tools": without_nulls(row["tools"])} if "tools" in row else {}
        (path / "bare.jsonl").write_text(json.dumps(bare))
        for name, write in (("struct.parquet", write_struct), ("saved", write_saved)):
            if write(path / name, row):
                found, said = read(path / name)
                if NULLS_LEFT_OUT in said:
                    assert (found, said - {NULLS_LEFT_OUT}) == read(path / "bare.jsonl"), name
                else:
                    assert (found, said) == (expected, notes), name


def call_with(argument):
    call = {"function": {"name": "f", "arguments": argument}}
    return {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [call]}]}


def arguments_of(path):
    (row,) = open_rows(str(path))
    assert row.problem is None
    conversation = to_conversation(row.value, detect_layout(row.value))
    return conversation.messages[1]["tool_calls"][0]["function"]["arguments"], row.notes


@pytest.mark.parametrize("value", [BIG, -BIG, 2**63, 2**64, 1.5, 1e300, None, True, [None, BIG], {"a": None}])
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_values_of_json_are_kept(value, name, tmp_path) -> None:
    row = call_with({"x": value})
    (tmp_path / name).write_text(json.dumps([row] if name == "d.json" else row))
    (found, notes) = arguments_of(tmp_path / name)
    assert json.dumps(found) == json.dumps({"x": value})
    assert notes == ()


@pytest.mark.parametrize("text", ["0.10000000000000001", "1.50", "1E5"])
def test_numbers_may_be_written_in_other_ways(text, tmp_path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(call_with({"x": 0.5})).replace("0.5", text))
    assert arguments_of(tmp_path / "d.jsonl")[0] == {"x": float(text)}


def test_nulls_that_parquet_invents_are_left_out_and_told(tmp_path) -> None:
    calls = [call_with({"city": "Oslo"}), call_with({"city": "Rome", "unit": None}), call_with({"unit": "C"})]
    pq.write_table(pa.Table.from_pylist(calls), tmp_path / "d.parquet")
    found = [
        (row.value["messages"][1]["tool_calls"][0]["function"]["arguments"], row.notes)
        for row in open_rows(str(tmp_path / "d.parquet"))
    ]
    assert found == [
        ({"city": "Oslo"}, (NULLS_LEFT_OUT,)),
        ({"city": "Rome"}, (NULLS_LEFT_OUT,)),
        ({"unit": "C"}, (NULLS_LEFT_OUT,)),
    ]


def test_single_precision_is_not_spelled_out(tmp_path) -> None:
    call = pa.struct({"name": pa.string(), "arguments": pa.struct({"x": pa.float32()})})
    message = pa.struct({"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(call)})
    turns = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 0.1}}]},
    ]
    pq.write_table(pa.table({"messages": pa.array([turns], pa.list_(message))}), tmp_path / "d.parquet")
    assert arguments_of(tmp_path / "d.parquet") == ({"x": 0.1}, ())


def test_nulls_of_maps_are_values(tmp_path) -> None:
    call = pa.struct({"name": pa.string(), "arguments": pa.map_(pa.string(), pa.string())})
    message = pa.struct({"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(call)})
    rows = [
        [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [("a", "b"), ("c", None)]}]},
        ]
    ]
    pq.write_table(pa.table({"messages": pa.array(rows, pa.list_(message))}), tmp_path / "d.parquet")
    assert arguments_of(tmp_path / "d.parquet") == ({"a": "b", "c": None}, ())


def test_decimals_and_dates_of_parquet(tmp_path) -> None:
    from datetime import datetime
    from decimal import Decimal

    table = pa.table(
        {
            "question": ["Q"],
            "answer": ["A"],
            "seen": pa.array([datetime(2024, 1, 2)], pa.timestamp("ns")),
            "price": [{"a": Decimal("1.50"), "b": Decimal("7")}],
        }
    )
    pq.write_table(table, tmp_path / "d.parquet")
    (row,) = open_rows(str(tmp_path / "d.parquet"))
    assert row.value["seen"].startswith("2024-01-02")
    assert row.value["price"] == {"a": 1.5, "b": 7}
    pq.write_table(pa.Table.from_pylist([call_with({"at": datetime(2024, 1, 2)})]), tmp_path / "call.parquet")
    assert read(tmp_path / "call.parquet") == ("bad message", set())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "Q", "question": "R", "answer": "A"}', "duplicate key"),
        ('{"question": "Q", "answer": "A", "n": ' + "9" * 5000 + "}", "broken JSON"),
        ('{"question": "\\ud800", "answer": "A"}', "lone surrogate"),
        (json.dumps(call_with({"x": float("nan")})), "bad message"),
        (json.dumps(call_with({"x": float("inf")})), "bad message"),
        (json.dumps(call_with({"x": 0.5})).replace("0.5", "3.14159265358979323846"), "bad message"),
        (json.dumps(call_with({"x": 0.5})).replace("0.5", "1e-400"), "bad message"),
        (json.dumps(call_with({"x": 0.5})).replace("0.5", "1e" + "9" * 20), "broken JSON"),
        (json.dumps(call_with("not JSON")), "bad tool call"),
        (json.dumps(call_with("[1]")), "bad tool call"),
        (json.dumps(call_with('{"a": 1, "a": 2}')), "bad tool call"),
    ],
)
def test_json_that_says_no_one_thing_is_refused(line, reason, tmp_path) -> None:
    (tmp_path / "d.jsonl").write_text(line)
    (tmp_path / "d.json").write_text(f"[{line}]")
    assert read(tmp_path / "d.jsonl") == (reason, set())
    assert read(tmp_path / "d.json") == (reason, set())


def test_nan_in_a_column_that_is_not_used_is_no_matter(tmp_path) -> None:
    (tmp_path / "d.jsonl").write_text('{"question": "Q", "answer": "A", "score": NaN}')
    assert "Q" in read(tmp_path / "d.jsonl")[0]


@settings(deadline=None, max_examples=100)
@given(st.lists(values | st.text(max_size=40).map(lambda t: t * 20), min_size=1), st.sampled_from([None, 1]))
def test_arrays_are_read_piece_by_piece(expected, indent) -> None:
    from sstoken.stages.encoding import json_values

    data = json.dumps(expected, indent=indent).encode()
    whole = json_values._CHUNK
    json_values._CHUNK = 3
    try:
        found = list(json_values.elements(io.BytesIO(data)))
    finally:
        json_values._CHUNK = whole
    assert json.dumps(found) == json.dumps([(value, None) for value in expected])


@pytest.mark.parametrize("text", ["[1, 2", "[1,, 2]", "[1 2]", "[1,]", "[1] x", "[tru]", '["a\n"]', "{}"])
def test_broken_arrays(text) -> None:
    from sstoken.stages.encoding.json_values import elements

    with pytest.raises(ValueError, match=r"\w"):
        list(elements(io.BytesIO(text.encode())))
