"""What stands beside a conversation: taken, named, or a reason to stop; and preference and media rows."""

import json

import pytest

from sstoken.errors import SstokenError
from sstoken.stages.encoding.conversations import EARLIER, WANTED, to_conversation
from sstoken.stages.encoding.layouts import detect_layout
from sstoken.stages.encoding.messages import BadRow, NeedsDecision, PassedOver

PAIR = [{"role": "user", "content": "Who wrote it?"}, {"role": "assistant", "content": "Ada did."}]
SHAREGPT = [{"from": "human", "value": "Who wrote it?"}, {"from": "gpt", "value": "Ada did."}]
LONG = "The report was written by Ada Byron in 1843."

CHINESE = "\u8fd9\u4efd\u62a5\u544a\u662f\u7531\u827e\u8fbe\u4e8e1843\u5e74\u5199\u7684"


def convert(row, ignored=(), preference="stop", columns=None):
    ignored = frozenset(ignored)
    return to_conversation(row, detect_layout(row, "auto", columns, ignored, preference))


def texts(row, **options):
    return [(m["role"], m["content"]) for m in convert(row, **options).messages]


def problem(row, **options):
    with pytest.raises(NeedsDecision) as error:
        convert(row, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


QA = {"question": "Who wrote it?", "answer": "Ada did."}
ALPACA = {"instruction": "Who wrote it?", "output": "Ada did."}
PROMPT = {"prompt": "Who wrote it?", "completion": "Ada did."}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (QA | {"context": LONG}, [("user", f"{LONG}\n\nWho wrote it?")]),
        (QA | {"passage": LONG}, [("user", f"{LONG}\n\nWho wrote it?")]),
        (QA | {"system_prompt": LONG}, [("system", LONG), ("user", "Who wrote it?")]),
        (PROMPT | {"context": LONG}, [("user", f"{LONG}\n\nWho wrote it?")]),
        (PROMPT | {"system": LONG}, [("system", LONG), ("user", "Who wrote it?")]),
        (ALPACA | {"context": LONG, "category": "qa"}, [("user", f"Who wrote it?\n{LONG}")]),
        (ALPACA | {"input": LONG}, [("user", f"Who wrote it?\n{LONG}")]),
        ({"messages": PAIR, "system": LONG}, [("system", LONG), ("user", "Who wrote it?")]),
        ({"conversations": SHAREGPT, "system_prompt": LONG}, [("system", LONG), ("user", "Who wrote it?")]),
        (
            ALPACA | {"history": [["Hi.", "Hello."]]},
            [("user", "Hi."), ("assistant", "Hello."), ("user", "Who wrote it?")],
        ),
        (
            QA | {"history": json.dumps([["Hi.", "Hello."]])},
            [("user", "Hi."), ("assistant", "Hello."), ("user", "Who wrote it?")],
        ),
        (
            PROMPT
            | {"history": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]},
            [("user", "Hi."), ("assistant", "Hello."), ("user", "Who wrote it?")],
        ),
    ],
)
def test_columns_that_belong_to_the_prompt(row, prompt) -> None:
    assert texts(row) == [*prompt, ("assistant", "Ada did.")]
    empty = {
        name: value if name in QA | ALPACA | PROMPT or value in (PAIR, SHAREGPT) else ""
        for name, value in row.items()
    }
    assert texts(empty) == [("user", "Who wrote it?"), ("assistant", "Ada did.")]


def test_a_system_column_and_a_system_message() -> None:
    row = {"messages": [{"role": "system", "content": LONG}, *PAIR], "system": LONG}
    assert len(texts(row)) == 3
    with pytest.raises(BadRow, match=r"two system prompts: column system .*--ignore-column system"):
        convert(row | {"system": "Be brief."})
    assert texts(row | {"system": "Be brief."}, ignored=["system"])[0] == ("system", LONG)


@pytest.mark.parametrize(
    ("row", "name", "take"),
    [
        ({"messages": PAIR, "context": "By Bob."}, "context", None),
        ({"messages": PAIR, "context": LONG}, "context", "--column system=context"),
        ({"messages": PAIR, "persona": "A pirate"}, "persona", "--column system=persona"),
        ({"messages": PAIR, "documents": [LONG, LONG]}, "documents", "--column system=documents"),
        ({"messages": PAIR, "history": [["Hi.", "Hello."]]}, "history", "--column"),
        ({"messages": PAIR, "more": LONG}, "more", "--column"),
        ({"messages": PAIR, "more": json.dumps([{"role": "user", "content": "Hi"}])}, "more", "--column"),
        ({"messages": PAIR, "more": [{"from": "human", "value": "Hi"}]}, "more", "--column"),
        ({"messages": PAIR, "\u80cc\u666f": CHINESE}, "\u80cc\u666f", "--column"),
        (QA | {"choices": ["Ada", "Bob"]}, "choices", "--column context=choices"),
        (QA | {"rationale": "Because."}, "rationale", "--column reasoning=rationale"),
        (ALPACA | {"response": "Bob."}, "response", "--column"),
        (ALPACA | {"my_functions": [{"name": "f"}]}, "my_functions", "--column tools=my_functions"),
        ({"messages": [PAIR[0], PAIR[1] | {"analysis": LONG}]}, "analysis", None),
    ],
)  # fmt: skip
def test_text_beside_the_conversation_stops_the_run(row, name, take) -> None:
    told = problem(row)
    assert f"--ignore-column {name}" in told
    assert take is None or take in told
    found = convert(row, ignored=[name])
    assert [unused.rpartition(".")[2] for unused in found.unused] == [name]


def test_what_the_line_says_works() -> None:
    row = {"messages": PAIR, "background": LONG}
    assert "--column system=background" in problem(row)
    assert texts(row, columns={"system": "background"})[0] == ("system", LONG)
    row = QA | {"rationale": "Because."}
    assert convert(row, columns={"reasoning": "rationale"}).messages[1]["reasoning_content"] == "Because."


@pytest.mark.parametrize(
    "row",
    [
        # OpenHermes, UltraChat, Tulu, SlimOrca, ShareGPT, Dolly, Alpaca, LMSYS, WildChat, OpenOrca, MetaMath, Magpie
        {"conversations": SHAREGPT, "custom_instruction": None, "topic": None, "model_name": "gpt-4", "idx": None,
         "skip_prompt_formatting": False, "category": "orca", "views": 3.0, "language": "en", "id": "a1", "hash": None,
         "title": "Who wrote the first report on the engine?", "avatarUrl": "https://x.y/z.png", "source": "airoboros",
         "system_prompt": None, "model": None},
        {"prompt": "Who wrote it?", "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
         "messages": PAIR},
        {"messages": PAIR, "id": "tulu-1", "source": "ai2-adapt-dev/oasst1_converted", "dataset": "flan_v2"},
        {"conversations": [t | {"weight": None if t["from"] == "human" else 1.0} for t in SHAREGPT]},
        {"conversations": [t | {"markdown": None, "text": None} for t in SHAREGPT], "id": "QWJhYvA_0"},
        {"instruction": "Who wrote it?", "context": "", "response": "Ada did.", "category": "open_qa"},
        ALPACA | {"input": "", "text": "Below is an instruction.\n### Who wrote it?\n### Response:\nAda did."},
        {"conversation": PAIR, "conversation_id": "x", "model": "vicuna-13b", "turn": 1, "language": "English",
         "openai_moderation": [{"categories": {"hate": False}, "flagged": False}], "redacted": False},
        {"conversation": [t | {"country": "Norway", "hashed_ip": "ab12", "timestamp": "2023-04-09 00:01:27",
                               "header": {"user-agent": "Mozilla/5.0 (X11; Linux x86_64) like Gecko"}, "toxic": False}
                          for t in PAIR], "conversation_hash": "cf1267", "turn": 1, "state": "Oslo"},
        {"id": "niv.1", "system_prompt": "", "question": "Who wrote it?", "response": "Ada did."},
        {"query": "Who wrote it?", "response": "Ada did.", "type": "GSM_Rephrased",
         "original_question": "Who was it that wrote the report then?"},
        {"conversations": SHAREGPT, "instruction": "Who wrote it?", "response": "Ada did.", "difficulty": "easy",
         "intent": "The user wants to know who wrote it.", "task_category": "Information seeking",
         "quality_explanation": "The instruction is clear and it is specific.", "instruct_reward": -1.2},
        QA | {"final_answer": "42", "level": "Level 5", "subject": "Number theory of the integers of Gauss"},
        {"messages": PAIR, "problem": "Who wrote it?", "solution": "Ada did.", "uuid": "x", "is_right": [True, False]},
        QA | {"url": "https://en.wikipedia.org/wiki/Ada_Lovelace", "license": "CC BY-SA 4.0 by its many authors there",
              "date": "Mon Nov 24 2026 at noon or so", "score": 4.5, "tags": ["history of computing and its people"]},
        {"messages": PAIR, "metadata": {"annotator": "a1", "note": LONG}},
        {"messages": PAIR, "label": 3}, {"messages": PAIR, "label": "positive"}, {"messages": PAIR, "images": []},
        {"messages": PAIR, "images": None, "image": "", "has_image": False, "num_videos": 0},
    ],
)  # fmt: skip
def test_ordinary_data_goes_through(row) -> None:
    assert texts(row) == [("user", "Who wrote it?"), ("assistant", "Ada did.")]


def test_what_is_left_out_is_named() -> None:
    turns = [turn | {"timestamp": 5} for turn in PAIR]
    assert convert({"messages": turns, "source": "x", "id": 1, "empty": None, "none": ""}).unused == (
        "source",
        "id",
        "messages[].timestamp",
    )


CHOSEN, REJECTED = PAIR[1], {"role": "assistant", "content": "A chair did."}
FINAL = [("user", "Who wrote it?"), ("assistant", "Ada did.")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Who wrote it?", "chosen": "Ada did.", "rejected": "A chair did."},
        {"prompt": PAIR[:1], "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"prompt": "Who wrote it?", "chosen": PAIR, "rejected": [PAIR[0], REJECTED], "score_rejected": 1.0},
        {"prompt": "Who wrote it?", "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"chosen": PAIR, "rejected": [PAIR[0], REJECTED]},
        {"chosen": json.dumps(PAIR), "rejected": json.dumps([PAIR[0], REJECTED])},
        {"chosen_messages": PAIR, "rejected_messages": [PAIR[0], REJECTED]},
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "A chair did."}},
        {"conversations": SHAREGPT[:1], "chosen": "Ada did.", "rejected": "A chair did."},
        {"instruction": "Who wrote it?", "input": "", "chosen": "Ada did.", "rejected": "A chair did."},
        {"question": "Who wrote it?", "chosen": [CHOSEN], "rejected": [REJECTED]},
        {"question": "Who wrote it?", "response_chosen": "Ada did.", "response_rejected": "A chair did."},
        {"messages": PAIR, "rejected_response": "A chair did."},
        {"prompt": "Who wrote it?", "response": "Ada did.", "rejected": "A chair did."},
        {"input": {"messages": PAIR[:1]}, "preferred_output": [CHOSEN], "non_preferred_output": [REJECTED]},
        PROMPT | {"label": True},
        {"messages": PAIR, "label": "True"},
        {"messages": PAIR, "kto_tag": True},
        {"messages": PAIR, "kto_tag": 1},
        ALPACA | {"desirable": True},
    ],
)  # fmt: skip
def test_preference_rows(row) -> None:
    assert "--preference take" in problem(row)
    found = convert(row, preference="take")
    assert [(m["role"], m["content"]) for m in found.messages] == FINAL
    assert found.notes == (WANTED,)
    assert "A chair" not in json.dumps(found.messages)


def test_unwanted_answers_are_passed_over() -> None:
    with pytest.raises(PassedOver, match="unwanted answer"):
        convert({"messages": PAIR, "label": False}, preference="take")


def test_only_the_wanted_answer_is_a_demonstration() -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, PAIR[0]]
    found = convert({"messages": turns, "chosen": CHOSEN, "rejected": REJECTED}, preference="take")
    assert found.untrained == {1}
    assert found.notes == (WANTED, EARLIER)


def test_a_column_can_be_said_to_be_no_preference() -> None:
    assert texts({"messages": PAIR, "label": False}, ignored=["label"]) == FINAL
    assert texts(PROMPT | {"rejected": "A chair."}, ignored=["rejected"]) == FINAL


def test_preference_rows_without_a_prompt() -> None:
    with pytest.raises(SstokenError, match="there is no prompt beside chosen"):
        convert({"chosen": "Human: a", "rejected": "Human: b"}, preference="take")


@pytest.mark.parametrize(
    "column",
    [
        {"images": ["table.jpg"]},
        {"image": "table.jpg"},
        {"videos": ["a.mp4"], "audios": ["a.mp3"]},
        {"image": {"bytes": b"x", "path": None}},
        {"image_url": "https://x.y/z.png"},
        {"imagePaths": "['a.png']"},
        {"audio": {"array": [0.1], "sampling_rate": 8000}},
    ],
)
def test_media_rows(column) -> None:
    row = {"messages": [{"role": "user", "content": "<image>Who wrote it?"}, PAIR[1]]} | column
    with pytest.raises(BadRow, match=r"^media: .*--ignore-column") as error:
        convert(row)
    assert not isinstance(error.value, NeedsDecision)  # rows of their own kind: skipped by --on-bad-row skip
    assert texts(row, ignored=list(column))[0] == ("user", "<image>Who wrote it?")


def test_a_column_with_the_whole_row_as_one_text_is_no_loss() -> None:
    row = {"instruction": "Say who wrote it.", "input": "The report.", "output": LONG}
    text = "Below is an instruction.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n{}"
    whole = text.format(*row.values())
    assert convert(row | {"text": whole}).unused == ("text",)
    assert "text would be lost" in problem(row | {"text": whole.replace("The report.", "Another one.")})


def test_arguments_for_the_chat_template_are_not_passed_over() -> None:
    row = {"messages": PAIR, "chat_template_kwargs": {"enable_thinking": False, "custom_instructions": ""}}
    assert "chat_template_kwargs would be lost, being part of no message; leave it out with" in problem(row)
    assert convert(row, ignored=["chat_template_kwargs"]).unused == ("chat_template_kwargs",)
    assert convert({"messages": PAIR, "chat_template_kwargs": {"enable_thinking": None}}).unused == ()


@pytest.mark.parametrize(
    "row", [QA | {"answer": ["Ada", "Ada Byron"]}, ALPACA | {"output": ["Ada", "Byron"]}]
)
def test_several_answers_are_not_run_together(row) -> None:
    with pytest.raises(BadRow, match="a list of 2 strings"):
        convert(row)


@pytest.mark.parametrize("answer", ['[{"name": "Ada"}]', '{"name": "Ada"}', "[1, 2]"])
def test_an_answer_in_json_is_text(answer) -> None:
    expected = [("user", "As JSON."), ("assistant", answer)]
    assert texts({"prompt": "As JSON.", "completion": answer}) == expected
    assert texts({"prompt": "As JSON.", "chosen": answer, "rejected": "x"}, preference="take") == expected
    assert texts({"prompt": answer, "completion": "x"})[0] == ("user", answer)


@pytest.mark.parametrize("label", [0, 1, "0", False])
def test_the_label_of_a_completion_is_a_verdict(label) -> None:
    assert "--preference take" in problem({"prompt": "Q", "completion": "A", "label": label})
    assert label is False or convert({"question": "Q", "answer": "A", "label": label}).unused == ("label",)


@pytest.mark.parametrize("column", ["tool_schema", "api_config"])
def test_tool_definitions_under_another_name_are_not_lost(column) -> None:
    assert "would be lost" in problem(QA | {column: [{"name": "f", "parameters": {"type": "object"}}]})
    assert convert(QA | {column: "v2"}).unused == (column,)
