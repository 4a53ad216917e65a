"""The stage: what it writes, what it refuses, and that nothing but its settings decides the result."""

import json
import pickle
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import sharded
from sstoken.stages.encode import Encode
from sstoken.stages.encoding import shards
from sstoken.stages.encoding.sources import Row
from sstoken.stages.encoding.token_stats import merge, metrics, no_stats
from sstoken.stages.tables import TOKENS, parts, read_metadata
from tests.factories import byte_tokenizer
from tests.stages.context import ProcessEngine, make_context

ROWS = [{"question": f"what is {i} plus {i}?", "answer": f"It is {i + i}." * (1 + i % 3)} for i in range(23)]

PAIR = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer(
        ["<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        model_max_length=512,
        chat_template=(
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
            "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        ),
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path) -> str:
    return write(tmp_path / "data.jsonl", ROWS)


def write(path: Path, rows: list) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.parent.name != sharded.TOOK)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def rows_of(folder: Path) -> list[dict]:
    return [row for part in parts(folder) for row in pq.read_table(part).to_pylist()]


def test_writes_shards_with_provenance(model, data, tmp_path) -> None:
    out = tmp_path / "tokens"
    found = Encode(data=data, model=model, shard_rows=10).run(make_context(out))
    assert [len(pq.read_table(p)) for p in parts(out)] == [10, 10, 3]
    assert pq.read_schema(parts(out)[0]).remove_metadata() == TOKENS
    rows = rows_of(out)
    assert [row["example_id"] for row in rows] == [f"data-{i}" for i in range(23)]
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    for row, source in zip(rows, ROWS, strict=True):
        response = [t for t, m in zip(row["input_ids"], row["response_mask"], strict=True) if m]
        assert tokenizer.decode(response) == source["answer"] + "<|im_end|>"
    lengths = sorted(len(row["input_ids"]) for row in rows)
    assert found["rows"] == found["examples"] == 23
    assert found["tokens"] == sum(lengths)
    assert found["length"] == {"p50": lengths[11], "p90": lengths[20], "p99": lengths[22], "max": lengths[22]}
    metadata = read_metadata(parts(out)[0])
    assert metadata["kind"] == "tokens"
    assert metadata["tokenizer"] == {
        "fingerprint": metadata["tokenizer"]["fingerprint"], "vocab_size": len(tokenizer), "name": model,
    }  # fmt: skip
    assert metadata["max_length"] == 512
    assert metadata["stats"]["examples"] == 10
    assert not list(out.rglob("*.tmp"))


def test_workers_do_not_change_the_result(model, data, tmp_path) -> None:
    found = []
    for workers in (1, 2):
        stage = Encode(data=data, model=model, shard_rows=10, workers=workers)
        found.append(stage.run(replace(make_context(tmp_path / str(workers)), engine=ProcessEngine(workers))))
    assert found[0] == found[1]
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    settings = [Encode(data=data, model=model, workers=w).fingerprinted() for w in (1, 2)]
    assert settings[0] == settings[1]


def test_finished_shards_are_kept(model, tmp_path, monkeypatch) -> None:
    data = write(tmp_path / "data.jsonl", [*ROWS, "{", *ROWS])
    stage = Encode(data=data, model=model, shard_rows=10, on_bad_row="skip")
    whole = stage.run(make_context(tmp_path / "whole"))
    again = tmp_path / "again"
    stage.run(make_context(again))
    (again / "part-00002.parquet").unlink()
    (again / "part-00004.parquet").unlink()
    encoded = []
    checked = Row.checked
    monkeypatch.setattr(Row, "checked", lambda row: encoded.append(row.index) or checked(row))
    assert stage.run(make_context(again)) == whole
    assert encoded == [0, 0, *range(20, 30), *range(40, 47)]  # the first row shows the layout
    assert contents(again) == contents(tmp_path / "whole")


def test_a_bad_row_stops_the_run(model, tmp_path) -> None:
    data = write(tmp_path / "data.jsonl", [*ROWS[:2], {"question": "secret"}, *ROWS])
    with pytest.raises(
        SstokenError, match=r"data.jsonl line 3: no answer: column 'answer' .*--on-bad-row skip"
    ) as error:
        Encode(data=data, model=model).run(make_context(tmp_path / "tokens"))
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    pickle.loads(pickle.dumps(error.value))


def test_bad_rows_are_counted_and_listed(model, tmp_path) -> None:
    bad = ["{", '{"question": "\\ud800", "answer": "a"}', {"question": "secret"}, "[1]"]
    data = write(tmp_path / "data.jsonl", [*bad, *ROWS])
    out = tmp_path / "tokens"
    found = Encode(data=data, model=model, on_bad_row="skip", shard_rows=4).run(make_context(out))
    assert found["bad_rows"] == {"broken JSON": 1, "lone surrogate": 1, "no answer": 1, "not an object": 1}
    assert (found["rows"], found["examples"]) == (27, 23)
    assert len(pq.read_table(out / "part-00000.parquet")) == 0
    text = (out / "bad_rows/part-00000.jsonl").read_text()
    assert "secret" not in text
    assert [(r["file"], r["row"]) for r in map(json.loads, text.splitlines())] == [
        ("data", i) for i in range(4)
    ]
    assert rows_of(out)[0]["example_id"] == "data-4"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"messages": PAIR, "background": "It was raining on that day."}],
            "unused text: background .*--column",
        ),
        ([{"messages": PAIR[:1], "chosen": "b", "rejected": "c"}], "preference row: .*--preference take"),
        ([{"messages": PAIR, "label": True}], "preference row: .*--ignore-column label"),
        ([{"messages": 5}, {"messages": PAIR, "label": True}], "line 2: preference row: "),
    ],
)
def test_what_needs_a_decision_stops_before_any_shard(rows, message, model, tmp_path) -> None:
    data = write(tmp_path / "d.jsonl", rows)
    with pytest.raises(SstokenError, match=message) as error:
        Encode(data=data, model=model, on_bad_row="skip").run(make_context(tmp_path / "t"))
    assert "\n" not in str(error.value)
    assert not parts(tmp_path / "t")


def test_a_column_that_comes_later_is_a_bad_row(model, tmp_path) -> None:
    rows = [{"messages": PAIR}, {"messages": PAIR, "background": "It was raining on that day."}]
    data = write(tmp_path / "d.jsonl", rows)
    with pytest.raises(SstokenError, match=r"line 2: unused text: background .*--on-bad-row skip"):
        Encode(data=data, model=model).run(make_context(tmp_path / "a"))
    found = Encode(data=data, model=model, on_bad_row="skip").run(make_context(tmp_path / "b"))
    assert found["bad_rows"] == {"unused text": 1}
    found = Encode(data=data, model=model, ignore_columns=("background",)).run(make_context(tmp_path / "c"))
    assert found["unused"] == {"background": 1}
    assert found["examples"] == 2


def test_what_is_left_out_and_taken_is_counted(model, tmp_path) -> None:
    rows = [{"messages": PAIR, "label": i % 2 == 0, "source": "x" if i else None} for i in range(5)]
    data = write(tmp_path / "d.jsonl", [*rows, {"messages": PAIR, "images": ["a.png"]}])
    stage = Encode(data=data, model=model, preference="take", on_bad_row="skip", shard_rows=2)
    found = stage.run(make_context(tmp_path / "t"))
    assert found["passed_over"] == {"unwanted answer": 2}
    assert found["notes"] == {"wanted answers of preference rows": 3}
    assert found["unused"] == {"source": 2}
    assert found["bad_rows"] == {"media": 1}
    assert (found["rows"], found["examples"]) == (6, 3)


def test_no_wanted_answer_is_an_error(model, tmp_path) -> None:
    data = write(tmp_path / "d.jsonl", [{"messages": PAIR, "label": False}] * 2)
    with pytest.raises(SstokenError, match=r"no row can be used .2 x unwanted answer"):
        Encode(data=data, model=model, preference="take").run(make_context(tmp_path / "t"))


def test_a_lone_surrogate_stops_by_its_name(model, tmp_path) -> None:
    data = write(tmp_path / "data.jsonl", ['{"question": "\\ud800", "answer": "a"}'])
    with pytest.raises(SstokenError, match="line 1: lone surrogate"):
        Encode(data=data, model=model).run(make_context(tmp_path / "tokens"))


def test_nothing_left_is_an_error(model, data, tmp_path) -> None:
    with pytest.raises(
        SstokenError,
        match=r"no example left of 23 rows .23 x no response token within the maximal length.; raise",
    ):
        Encode(data=data, model=model, max_length=4).run(make_context(tmp_path / "a"))
    data = write(tmp_path / "bad.jsonl", ["{", "["])
    with pytest.raises(SstokenError, match="2 x broken JSON"):
        Encode(data=data, model=model, on_bad_row="skip").run(make_context(tmp_path / "b"))


def test_truncation_and_drops_are_counted(model, tmp_path) -> None:
    rows = [
        {"question": "a", "answer": "b"},
        {"question": "a", "answer": "b" * 90},
        {"question": "a" * 90, "answer": "b"},
    ]
    found = Encode(data=write(tmp_path / "d.jsonl", rows), model=model, max_length=50).run(
        make_context(tmp_path / "t")
    )
    assert (found["examples"], found["truncated"], found["dropped_no_response"]) == (2, 1, 1)


def test_limit_and_own_ids(model, tmp_path) -> None:
    rows = [row | {"example_id": i} for i, row in enumerate(ROWS)]
    Encode(data=write(tmp_path / "d.jsonl", rows), model=model, limit=3).run(make_context(tmp_path / "t"))
    assert [row["example_id"] for row in rows_of(tmp_path / "t")] == ["0", "1", "2"]


def test_a_chat_template_of_ones_own(model, data, tmp_path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    stage = Encode(data=data, model=model, chat_template=str(template))
    stage.run(make_context(tmp_path / "t"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t/tokenizer")
    assert tokenizer.decode(rows_of(tmp_path / "t")[0]["input_ids"]).startswith(
        "user: what is 0 plus 0?<|im_end|>assistant: It"
    )
    assert tokenizer.chat_template == template.read_text()
    identity = stage.sources(lambda path: path.read_text()[:9])
    assert identity["chat_template"] == "{% for m "
    assert set(identity) == {"data", "tokenizer", "chat_template"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "missing.jsonl"}, "no such file"),
        ({"model": "./missing"}, "no such folder"),
        ({"chat_template": "missing.jinja"}, "no such file"),
        ({"format": "qa", "columns": {"prompt": "x"}}, "answer, context, history, question, reasoning"),
    ],
)
def test_check_refuses(options, message, model, data) -> None:
    with pytest.raises(UsageError, match=message):
        Encode(**{"data": data, "model": model} | options).check()


def test_fields_are_documented() -> None:
    assert all(field.description for field in Encode.model_fields.values())


def test_merge_and_percentiles() -> None:
    one = no_stats() | {"rows": 2, "examples": 2, "tokens": 30, "response_tokens": 6}
    one["lengths"] = {"10": 1, "20": 1}
    both = merge(one, one | {"bad_rows": {"x": 1}})
    assert both["lengths"] == {"10": 2, "20": 2}
    assert metrics(both)["length"] == {"p50": 10, "p90": 20, "p99": 20, "max": 20}
    assert metrics(both)["response_share"] == 0.2


def test_importing_the_stage_loads_nothing_heavy() -> None:
    import subprocess

    heavy = {"torch", "transformers", "datasets", "fsspec"}
    code = f"import sys, sstoken.stages.encode; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_shard_function_pickles(model, tmp_path) -> None:
    from sstoken.stages.encoding.chat import EncoderOptions
    from sstoken.stages.encoding.layouts import detect_layout

    settings = shards.EncodingSettings(
        model, False, EncoderOptions(), detect_layout(ROWS[0]), 10, True, tmp_path, "f"
    )
    assert pickle.loads(pickle.dumps(partial(shards.encode_shard, settings))).args == (settings,)


def test_says_how_rows_were_read_and_what_the_template_adds(model, data, tmp_path):
    found = Encode(data=data, model=model).run(make_context(tmp_path / "own"))["read_as"]
    assert found == {
        "layout": "qa",
        "columns": [["question", "question"], ["answer", "answer"]],
        "template": "tokenizer",
        "template_adds": "",
    }
    preaching = tmp_path / "preaching.jinja"
    preaching.write_text(
        "<|im_start|>system\nYou are a helpful assistant named Tiny.<|im_end|>\n"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    stage = Encode(data=data, model=model, chat_template=str(preaching))
    found = stage.run(make_context(tmp_path / "given"))["read_as"]
    assert found["template"] == "given"
    assert found["template_adds"] == (
        "<|im_start|>system\nYou are a helpful assistant named Tiny.<|im_end|>\n<|im_start|>user\n"
    )
