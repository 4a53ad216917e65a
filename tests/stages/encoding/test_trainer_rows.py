"""Rows as APIs and trainers write them: calls, parts, reasoning, marks on turns."""

import json

import pytest

from sstoken.stages.encoding.conversations import IN_PROMPT, PROMPT_MARKED, UNTRAINED, to_conversation
from sstoken.stages.encoding.layouts import detect_layout
from sstoken.stages.encoding.messages import BadRow

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"name": "weather", "description": "Of a place.", "parameters": {"type": "object"}}
ASK = {"role": "user", "content": "Weather in Oslo?"}
ANSWER = {"role": "assistant", "content": "7 degrees."}


def convert(row, ignored=(), **options):
    return to_conversation(row, detect_layout(row, ignored=frozenset(ignored), **options))


def reason_of(row, **options):
    with pytest.raises(BadRow) as error:
        convert(row, **options)
    assert "\n" not in str(error.value)
    return error.value.reason


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [CALL["function"]]},
        {"role": "assistant", "tool_calls": [{"name": "weather", "parameters": {"city": "Oslo"}}]},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
        },
        {"role": "assistant", "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "name": "weather", "input": {"city": "Oslo"}}],
        },
        {"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(CALL["function"])}]},
        {"role": "assistant", "content": [{"type": "tool_call", "tool_call": CALL["function"]}]},
        {"role": "tool_call", "content": json.dumps(CALL["function"])},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "function_call", "value": json.dumps([CALL["function"]])},
    ],
)
def test_calls_in_every_form(turn) -> None:
    column = "conversations" if "from" in turn else "messages"
    assert convert({column: [ASK, turn]}).messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL],
    }


def test_calls_keep_their_ids_and_text_before_them() -> None:
    turn = {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL | {"id": "c1", "index": 0}]}
    (_, found) = convert({"messages": [ASK, turn]}).messages
    assert found == {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL | {"id": "c1"}]}


def test_a_call_without_arguments() -> None:
    for arguments in ({}, "{}", "", None):
        turn = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": arguments}}]}
        (call,) = convert({"messages": [ASK, turn]}).messages[1]["tool_calls"]
        assert call["function"]["arguments"] == {}


@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython", "tool_response"])
def test_results_of_tools(role) -> None:
    row = {
        "messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}, {"role": role, "content": "7"}, ANSWER]
    }
    assert convert(row).messages[2] == {"role": "tool", "content": "7"}


def test_sharegpt_with_tools() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Weather in Oslo?"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": '{"degrees": 7}'},
            {"from": "gpt", "value": "7 degrees."},
        ],
        "tools": json.dumps([TOOL]),
    }
    found = convert(row)
    assert [m["role"] for m in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[2]["content"] == '{"degrees": 7}'
    assert found.tools == [{"type": "function", "function": TOOL}]


def test_calls_one_a_turn_are_one_message() -> None:
    call = {"role": "tool_call", "content": json.dumps(CALL["function"])}
    result = {"role": "tool_response", "content": "7"}
    found = convert({"messages": [ASK, call, call, result, result, ANSWER]}).messages
    assert found[1] == {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    assert [m["role"] for m in found] == ["user", "assistant", "tool", "tool", "assistant"]


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [{"type": "function", "function": TOOL}],
        [{"type": "function", **TOOL}],
        json.dumps([TOOL]),
        json.dumps(TOOL),
        [json.dumps(TOOL)],
        [{"name": "weather", "description": "Of a place.", "input_schema": {"type": "object"}}],
    ],
)
def test_tools_in_every_form(tools) -> None:
    assert convert({"messages": [ASK, ANSWER], "tools": tools}).tools == [
        {"type": "function", "function": TOOL}
    ]


def test_anthropic_messages() -> None:
    row = {
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "Weather in Oslo?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "A tool.", "signature": "xyz"},
                    {"type": "text", "text": "Let me look."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "7"}]},
                    {"type": "text", "text": "And?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "7 degrees."}]},
        ],
    }
    found = convert(row)
    assert found.messages == [
        {"role": "system", "content": "Be brief."},
        ASK,
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "A tool.",
            "tool_calls": [CALL | {"id": "t1"}],
        },
        {"role": "tool", "content": "7", "tool_call_id": "t1"},
        {"role": "user", "content": "And?"},
        ANSWER,
    ]
    assert found.unused == ("messages[].content[].signature",)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_every_key(key) -> None:
    expected = ANSWER | {"reasoning_content": "Cold."}
    assert convert({"messages": [ASK, ANSWER | {key: "Cold."}]}).messages[1] == expected
    part = {"type": "reasoning", "value": "Cold."}
    parts = [part, {"type": "text", "value": "7 degrees."}]
    assert convert({"messages": [ASK, {"role": "assistant", "content": parts}]}).messages[1] == expected
    assert convert({"question": "Q", "answer": "7 degrees.", "reasoning": "Cold."}).messages[1] == expected


def test_reasoning_as_a_part_of_its_own_type() -> None:
    turn = ANSWER | {"thinking": [{"type": "thinking", "thinking": "Cold."}]}
    assert convert({"messages": [ASK, turn]}).messages[1] == ANSWER | {"reasoning_content": "Cold."}


SENTENCE = "It was seven degrees in that town today."


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [CALL | {"result": SENTENCE}]},
        {"tool_calls": [{"function": CALL["function"] | {"thought": SENTENCE}}]},
        {"function_call": CALL["function"] | {"thought": SENTENCE}},
        {"content": [{"type": "tool_use", "name": "f", "input": {}, "rationale": SENTENCE}]},
        {"content": [{"type": "text", "text": "x", "reasoning": SENTENCE}]},
        {"content": [{"type": "text", "text": "x", "citations": [{"cited": SENTENCE}]}]},
        {
            "content": [
                {"type": "thinking", "thinking": "Cold.", "text": SENTENCE},
                {"type": "text", "text": "x"},
            ]
        },
    ],
)
def test_no_text_inside_a_call_or_a_part_is_lost(turn) -> None:
    assert reason_of({"messages": [ASK, {"role": "assistant"} | turn]}) == "unused text"


def test_a_schema_may_be_json_text() -> None:
    row = {"messages": [ASK, ANSWER], "tools": [TOOL | {"parameters": json.dumps(TOOL["parameters"])}]}
    assert convert(row).tools == [{"type": "function", "function": TOOL}]


def test_a_call_in_both_forms_is_one_call() -> None:
    older = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    turn = {"role": "assistant", "tool_calls": [CALL], "function_call": older}
    assert convert({"messages": [ASK, turn]}).messages[1]["tool_calls"] == [CALL]


def test_answers_in_a_prompt_column_are_not_trained_on() -> None:
    row = {"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER], "history": [["Q", "A"]]}
    found = convert(row)
    assert (found.untrained, found.notes) == ({3}, (IN_PROMPT,))


def test_a_switch_is_no_reasoning() -> None:
    found = convert({"prompt": "Q", "response": "A", "reasoning": "off"})
    assert found.messages[1] == {"role": "assistant", "content": "A"}
    assert found.unused == ("reasoning",)


def test_turns_as_json_text() -> None:
    assert convert({"messages": [json.dumps(ASK), json.dumps(ANSWER)]}).messages == [ASK, ANSWER]


def test_developers_and_capital_letters() -> None:
    row = {"messages": [{"role": "developer", "content": "S"}, {"role": "User", "content": "Q"}, ANSWER]}
    assert [m["role"] for m in convert(row).messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "bad tool call"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "city=Oslo"}}]}, "bad tool call"),
        ({"tool_calls": "call me"}, "bad tool call"),
        (
            {"content": [{"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "x"}]},
            "part order",
        ),
        ({"content": [{"type": "text", "text": "x"}, {"type": "reasoning", "value": "y"}]}, "part order"),
        ({"content": "x", "reasoning": "a", "thinking": "b"}, "bad message"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "media"),
        ({"content": [{"type": "input_audio", "input_audio": {}}]}, "media"),
        ({"content": "x", "images": ["a.png"]}, "media"),
        ({"content": "x", "weight": 0.5}, "fractional weight"),
        ({"content": "x", "weight": 2}, "fractional weight"),
        ({"content": "x", "train": "perhaps"}, "unclear mark"),
        (
            {"content": "x", "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
            "unclear mark",
        ),
        ({"content": "x", "weight": 0}, "not to be trained on"),
        ({"content": "x", "mask": 1}, "unclear mark"),
        ({"content": "x", "train_on_turn": False}, "unclear mark"),
        ({"content": "x", "masked": True}, "unclear mark"),
        ({"content": "x", "loss_scale": 0}, "unclear mark"),
    ],
)
def test_turns_that_are_refused(turn, reason) -> None:
    assert reason_of({"messages": [ASK, {"role": "assistant"} | turn]}) == reason


def dialogue(marks):
    """Four turns; `marks` go into each."""
    turns = [ASK, ANSWER, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No: 8."}]
    return [turn | mark for turn, mark in zip(turns, marks, strict=True)]


@pytest.mark.parametrize(
    "marks",
    [
        [{}, {"weight": 0}, {}, {"weight": 1}],
        [{}, {"weight": 0.0}, {}, {}],
        [{}, {"train": False}, {}, {"train": True}],
        [{"loss_weight": 0.0}, {"loss_weight": 0.0}, {"loss_weight": 0.0}, {"loss_weight": 1.0}],
        [{}, {"loss": False}, {}, {"loss": True}],
        [{}, {"trainable": "false"}, {}, {"trainable": "true"}],
        [{"mask": 0}, {"mask": 0}, {"mask": 0}, {"mask": 1}],
        [{"mask": True}, {"mask": True}, {"mask": True}, {"mask": False}],
    ],
)
def test_marks_on_turns(marks) -> None:
    found = convert({"messages": dialogue(marks)})
    assert found.untrained == {1}
    assert found.notes == (UNTRAINED,)
    assert found.unused == ()
    assert all(set(m) == {"role", "content"} for m in found.messages)


@pytest.mark.parametrize(
    "column",
    [
        {"loss_mask": [0, 0, 0, 1]},
        {"loss_mask": [0, 1]},
        {"loss_mask": "[0, 0, 0, 1]"},
        {"loss_weights": [1.0, 0.0, 1.0, 1.0]},
        {"mask": [0, 0, 0, 1]},
        {"mask": [1, 1, 1, 0]},
    ],
)
def test_columns_of_marks(column) -> None:
    assert convert({"messages": dialogue([{}] * 4)} | column).untrained == {1}
    assert convert({"messages": dialogue([{}] * 4), "system": "S"} | column).untrained == {2}


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ({"loss_mask": [0, 1, 1]}, "unclear mark"),
        ({"loss_mask": [0, 0.5, 0, 1]}, "fractional weight"),
        ({"mask": [0, 1]}, "unclear mark"),
        ({"weight": 0}, "not to be trained on"),
        ({"train": False}, "not to be trained on"),
        ({"weight": 0.3}, "fractional weight"),
        ({"assistant_mask": [0, 1]}, "unclear mark"),
        ({"train_on_turns": [False, False, False, True]}, "unclear mark"),
        ({"train_last_only": True}, "unclear mark"),
    ],
)
def test_columns_of_marks_that_are_refused(column, reason) -> None:
    row = {"messages": dialogue([{}] * 4)} | column
    assert reason_of(row) == reason
    assert convert(row, ignored=list(column)).unused == tuple(column)


def test_other_numbers_are_no_marks() -> None:
    row = {"messages": [turn | {"loss_value": 0.3} for turn in (ASK, ANSWER)], "attention_mask": [1] * 9}
    assert convert(row).unused == ("attention_mask", "messages[].loss_value")


def test_marks_that_nemo_writes() -> None:
    turns = [{"from": "User", "value": "Q"}, {"from": "Assistant", "value": "A"}]
    assert convert({"conversations": turns, "mask": "User", "system": ""}).untrained == frozenset()
    assert reason_of({"conversations": turns, "mask": "Assistant"}) == "not to be trained on"


def test_marks_on_prompts_are_counted() -> None:
    assert convert({"messages": dialogue([{"train": True}] * 4)}).notes == (PROMPT_MARKED, PROMPT_MARKED)
    assert convert({"messages": [ASK, ANSWER], "train_on_input": True}).notes == (PROMPT_MARKED,)
    assert convert({"messages": [ASK, ANSWER], "train_on_input": False}).notes == ()


def test_marks_can_be_ignored() -> None:
    found = convert({"messages": dialogue([{}, {"weight": 0.5}, {}, {}])}, ignored=["weight"])
    assert (found.untrained, found.unused) == (frozenset(), ("messages[].weight",))


def test_a_call_and_its_answer_are_marked_alike() -> None:
    call = {"from": "function_call", "value": json.dumps(CALL["function"]), "train": False}
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}, call]}
    assert reason_of(row) == "unclear mark"
