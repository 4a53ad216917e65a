"""Every layout gives the same messages; every kind of bad row its own reason."""

import json
import pickle

import pytest

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.encoding.conversations import to_conversation
from sstoken.stages.encoding.layouts import check_columns, detect_layout
from sstoken.stages.encoding.messages import BadRow
from tests.support import SHARED, needs_shared

PAIR = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]

PARTS = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in PAIR]


def convert(row, format="auto", columns=None, **options):
    return to_conversation(row, detect_layout(row, format, columns), **options).messages


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": PAIR}, "messages"),
        ({"messages": json.dumps(PAIR)}, "messages"),
        ({"messages": PARTS}, "messages"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "sharegpt"),
        ({"conversations": [{"from": "user", "value": "Q"}, {"from": "bot", "value": "A"}]}, "sharegpt"),
        ({"conversations": PAIR}, "sharegpt"),
        ({"prompt": "Q", "completion": "A"}, "prompt-completion"),
        ({"prompt": PAIR[:1], "completion": PAIR[1:]}, "prompt-completion"),
        ({"instruction": "Q", "input": "", "output": "A"}, "alpaca"),
        ({"instruction": "Q", "response": "A"}, "alpaca"),
        ({"question": "Q", "answer": "A"}, "qa"),
    ],
)  # fmt: skip
def test_layouts(row, format) -> None:
    assert detect_layout(row).format == format
    assert convert(row) == PAIR
    assert convert(row, format) == PAIR


def test_alpaca_input_follows_on_a_new_line() -> None:
    row = {"instruction": "Do", "input": "this", "output": "Done", "system": "Be kind"}
    assert convert(row) == [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "Do\nthis"},
        {"role": "assistant", "content": "Done"},
    ]


def test_columns_may_have_other_names() -> None:
    assert convert({"prompt_text": "Q", "answer": "A"}, columns={"question": "prompt_text"}) == PAIR
    assert convert({"chat": PAIR}, "messages", {"messages": "chat"}) == PAIR


def test_a_prompt_that_looks_like_a_list_is_text() -> None:
    assert convert({"prompt": "[1, 2]", "completion": "[]"})[0]["content"] == "[1, 2]"


def test_unknown_layout_says_what_to_do() -> None:
    with pytest.raises(SstokenError, match=r"text, label .*alpaca.*--format.*--column"):
        detect_layout({"text": "a", "label": 1})
    with pytest.raises(SstokenError, match=r"qa \(question, answer\)"):
        detect_layout({"messages": PAIR}, "qa")


def test_check_columns() -> None:
    check_columns("auto", {"question": "q", "output": "o"})
    with pytest.raises(UsageError, match="answer, context, history, question, reasoning, system, tools"):
        check_columns("qa", {"prompt": "q"})


def test_tool_conversation() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"default": None}}}
    row = {
        "messages": [
            {"role": "user", "content": "1+1?", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "x"},
            {"role": "assistant", "content": "Two."},
        ],
        "tools": json.dumps([tool]),
    }
    found = to_conversation(row, detect_layout(row))
    assert found.tools == [tool]
    assert found.messages[:3] == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
    ]


def turns(*roles):
    return {"messages": [{"role": r, "content": "x"} for r in roles]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (turns("assistant"), "role order"),
        (turns("system", "assistant"), "role order"),
        (turns("user", "system", "assistant"), "role order"),
        (turns("user", "assistant", "assistant"), "role order"),
        (turns("user", "tool", "assistant"), "role order"),
        (turns("user"), "no answer"),
        (turns("user", "narrator"), "unknown role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": " \n"}]}, "no answer"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": None}]}, "no answer"),
        ({"messages": []}, "no messages"),
        ({"messages": "hello"}, "no messages"),
        ({"messages": None}, "missing column"),
        ({"messages": ["hello"]}, "bad message"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, PAIR[1]]}, "media"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}, PAIR[1]]}, "not text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}, PAIR[1]]}, "not text"),
        ({"messages": [{"role": "user", "content": 5}, PAIR[1]]}, "not text"),
        ({"messages": PAIR, "tools": "add"}, "bad tools"),
        ({"question": "Q", "answer": None}, "no answer"),
        ({"question": "Q", "answer": ""}, "no answer"),
        ({"question": "Q", "answer": "A", "history": "earlier"}, "bad history"),
        ({"messages": '[{"role": "user", "role": "user"}]'}, "duplicate key"),
        ({"question": "\ud800", "answer": "A"}, "lone surrogate"),
        ({"question": "Q", "answer": "A" * 30}, "too long"),
    ],
)
def test_bad_rows(row, reason) -> None:
    layout = detect_layout(row)
    with pytest.raises(BadRow) as error:
        to_conversation(row, layout, max_chars=30)
    assert error.value.reason == reason
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.reason, again.detail, str(again)) == (reason, error.value.detail, str(error.value))


def test_rows_of_another_shape_are_bad() -> None:
    layout = detect_layout({"question": "Q", "answer": "A"})
    with pytest.raises(BadRow, match="not an object: a list"):
        to_conversation(["Q", "A"], layout)
    with pytest.raises(BadRow, match="column 'question' is missing"):
        to_conversation({"messages": PAIR}, layout)


def test_too_long_names_numbers_and_remedy() -> None:
    with pytest.raises(BadRow, match=r"3,0\d\d characters, more than --max-chars 2,000"):
        convert({"question": "Q" * 3000, "answer": "A"}, max_chars=2000)


@needs_shared
def test_golden_messages() -> None:
    import pyarrow.parquet as pq

    roleplay = json.loads((SHARED / "data/roleplay.json").read_text())
    gsm8k = [json.loads(line) for line in (SHARED / "data/gsm8k/train.jsonl").read_text().splitlines()]
    sources = {"roleplay": roleplay, "gsm8k": gsm8k}
    for row in pq.read_table(
        SHARED / "golden/tokens.parquet", columns=["example_id", "messages"]
    ).to_pylist():
        source, number = row["example_id"].split("-")
        assert convert(sources[source][int(number)]) == json.loads(row["messages"])
