"""Real chat templates over ordinary and over random conversations: nothing lost, the right tokens trained."""

import importlib.metadata
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sstoken.errors import UsageError
from sstoken.stages import tables
from sstoken.stages.encode import Encode
from sstoken.stages.encoding.chat import ChatEncoder, EncoderOptions
from sstoken.stages.encoding.messages import BadRow, Conversation
from sstoken.stages.encoding.rendering import DETAILS_LOST, NO_END, OUT_OF_ORDER
from sstoken.stages.encoding.templates import template_file, training_variant
from sstoken.stages.encoding.tracing import OTHER_HEADER, SPLIT
from tests.stages.context import make_context
from tests.stages.encoding import real_templates, template_table
from tests.stages.encoding.conversation_kinds import MORE, SHOWN
from tests.support import ROOT

PAGE = ROOT / "docs" / "templates.md"
ORIGINALS, TRAINING = real_templates.names(), real_templates.names(training=True)
pytestmark = pytest.mark.skipif(not ORIGINALS, reason="the installed TRL ships no chat templates")


def encoder(name: str, stop_tokens=(), **options: Any) -> ChatEncoder:
    return ChatEncoder(real_templates.tokenizer(name), EncoderOptions(**options), stop_tokens)


def runs(encoded, tokenizer) -> list[str]:
    """The responses, decoded."""
    found: list[list[int]] = [[]]
    for token, trained in zip(encoded.input_ids, encoded.response_mask, strict=True):
        if trained:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(run) for run in found if run]


def leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (key, *leaves(inner))]
    if isinstance(value, list):
        return [text for inner in value for text in leaves(inner)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


def words(text: str) -> list[str]:
    """What no template and no JSON alters; markup goes."""
    return re.findall(r"\w+", re.sub(r"</?think>", " ", text))


def assistant_words(talk: Conversation, indices: list[int]) -> list[str]:
    found = []
    for message in (talk.messages[i] for i in indices):
        found += words(message.get("reasoning_content", "")) + words(message["content"])
        for call in message.get("tool_calls", ()):
            found += [
                w
                for text in leaves([call["function"]["name"], call["function"]["arguments"]])
                for w in words(text)
            ]
    return found


def check(name: str, talk: Conversation, turns: str = "all") -> bool:
    """Whether the template takes the conversation; if so, its responses are checked without the code under test."""
    tokenizer = real_templates.tokenizer(name)
    try:
        examples = encoder(name, turns=turns).encode(talk)
    except BadRow as error:
        if error.reason not in ("template refuses", "lost by the template", SPLIT, OTHER_HEADER):
            raise
        return False
    answers = [i for i, m in enumerate(talk.messages) if m["role"] == "assistant"]
    for encoded, indices in zip(
        examples, [answers] if turns == "all" else [[i] for i in answers], strict=True
    ):
        responses = runs(encoded, tokenizer)
        assert len(responses) == len(indices)
        text = " ".join(responses)
        lacking = [word for word in assistant_words(talk, indices) if word not in text]
        assert not lacking, (name, lacking, responses)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        for response in responses:
            # ends with a special token, or that none does was noted
            last = tokenizer(response, add_special_tokens=False)["input_ids"][-1]
            assert last in special or NO_END in encoded.notes, (name, response)
            others = [m for i, m in enumerate(talk.messages) if i not in indices]
            for message in (m for m in others if m["role"] in ("user", "system")):
                said = [
                    w for w in words(message["content"]) if len(w) > 4 and w not in text_of(talk, indices)
                ]
                assert not any(word in response for word in said), (name, response, said)
        start = encoded.response_mask.index(True)
        if turns == "each" and not talk.tools:
            # What stands before the response is what the model sees at inference.
            prompt = tokenizer.apply_chat_template(
                plain(name, talk.messages[: indices[0]]), add_generation_prompt=True, tokenize=False
            )
            shown = tokenizer.decode(encoded.input_ids[:start])
            assert undated(prompt).startswith(undated(shown).rstrip()), name
    return True


def undated(text: str) -> str:
    return re.sub(r"(Today Date: |date: ).*", r"\1", text)


def text_of(talk: Conversation, indices: list[int]) -> str:
    return " ".join(assistant_words(talk, indices))


def plain(name: str, messages: list[dict]) -> list[dict]:
    """Messages as `apply_chat_template` wants them for this template."""
    if name in ("idefics3", "smolvlm", "llava_next"):
        return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return messages


@pytest.mark.parametrize("name", ORIGINALS)
def test_ordinary_conversations(name: str) -> None:
    taken = {kind: check(name, talk) for kind, talk in (SHOWN | MORE).items()}
    assert taken["one turn"]
    assert taken["turns"]
    assert all(
        taken[kind] for kind in ("blanks", "code", "marks alone", "answers of marks", "numbers", "same text")
    )


@pytest.mark.parametrize("name", TRAINING)
def test_ordinary_conversations_with_marked_responses(name: str) -> None:
    for kind, talk in (SHOWN | MORE).items():
        taken = check(name, talk)
        assert taken or kind not in ("one turn", "turns", "code", "numbers", "answers of marks")
    original = name.removesuffix("_training")
    if original in ("glm4moe",):  # closes its turns in another way
        return
    for kind in ("one turn", "turns", "marks alone"):
        (marked,), (free,) = (
            encoder(name).encode(SHOWN.get(kind) or MORE[kind]),
            encoder(original).encode(SHOWN.get(kind) or MORE[kind]),
        )
        tokenizers = real_templates.tokenizer(name), real_templates.tokenizer(original)
        if "".join(tokenizers[0].decode(marked.input_ids)) == tokenizers[1].decode(free.input_ids):
            assert runs(marked, tokenizers[0]) == runs(free, tokenizers[1]), (name, kind)


@pytest.mark.parametrize("name", ORIGINALS)
def test_each_turn_is_shown_as_at_inference(name: str) -> None:
    for kind, talk in (SHOWN | MORE).items():
        taken = check(name, talk, turns="each")
        assert taken or kind not in ("one turn", "turns", "numbers")


texts = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co")), min_size=1, max_size=30).filter(
    str.strip
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcdef"), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """A legal conversation, every message with a word of its own."""
    messages: list[dict] = []
    number = 0

    def text(blank: bool = False) -> str:
        nonlocal number
        number += 1
        if blank and draw(st.booleans()):
            return ""
        return f"{draw(texts)} zq{number}zq {draw(texts)}"

    if draw(st.booleans()):
        messages.append({"role": "system", "content": text()})
    called = False
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": text()})
        if draw(st.integers(0, 3)) == 0:
            called = True
            arguments = {"key": text(), "other": draw(values)}
            call = {
                "id": "call12345",
                "type": "function",
                "function": {"name": "look_up", "arguments": arguments},
            }
            messages.append({"role": "assistant", "content": text(blank=True), "tool_calls": [call]})
            messages.append(
                {"role": "tool", "name": "look_up", "tool_call_id": "call12345", "content": text()}
            )
        answer: dict[str, Any] = {"role": "assistant", "content": text()}
        if draw(st.integers(0, 3)) == 0:
            answer["reasoning_content"] = text()
        messages.append(answer)
    parameters = {"type": "object", "properties": {"key": {"type": "string", "description": "what zqtoolzq"}}}
    tool = {
        "type": "function",
        "function": {"name": "look_up", "description": "Looks up.", "parameters": parameters},
    }
    return Conversation(messages, [tool] if called else None)


@settings(max_examples=200, deadline=None)
@given(
    talk=conversations(),
    name=st.sampled_from(ORIGINALS + TRAINING or ["none"]),
    turns=st.sampled_from(["all", "each"]),
)
def test_random_conversations(talk: Conversation, name: str, turns: str) -> None:
    tokenizer = real_templates.tokenizer(name)
    fresh = encoder(name, turns=turns, keep_special_tokens=True)
    try:
        examples = fresh.encode(talk)
    except BadRow as error:
        if error.reason == "changed by the tokenizer":
            raise
        return
    assert fresh.encode(talk) == examples  # now from the scaffold learned, where there is one
    answers = [i for i, m in enumerate(talk.messages) if m["role"] == "assistant"]
    own = [re.findall(r"zq\d+zq", json.dumps(message)) for message in talk.messages]
    for encoded, indices in zip(
        examples, [answers] if turns == "all" else [[i] for i in answers], strict=True
    ):
        trained = tokenizer.decode(
            [t for t, m in zip(encoded.input_ids, encoded.response_mask, strict=True) if m]
        )
        assert sorted(re.findall(r"zq\w+?zq", trained)) == sorted(word for i in indices for word in own[i])
        for content in (talk.messages[i]["content"].strip() for i in indices):
            assert content in trained


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(talks=st.lists(conversations(), min_size=2, max_size=4), name=st.sampled_from(ORIGINALS or ["none"]))
def test_what_was_encoded_before_changes_nothing(talks: list[Conversation], name: str) -> None:
    def outcome(made: ChatEncoder, talk: Conversation) -> Any:
        try:
            return made.encode(talk)
        except BadRow as error:
            return error.reason

    used = encoder(name, keep_special_tokens=True)
    for talk in (*talks, *(replace(t, tools=None) for t in talks)):
        assert outcome(used, talk) == outcome(encoder(name, keep_special_tokens=True), talk)


def test_the_table_in_the_documentation_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    made = re.search(r"^TRL ([\d.]+)\.$", page, re.MULTILINE)
    assert made is not None
    if made[1] != importlib.metadata.version("trl"):
        pytest.skip(f"the page is about TRL {made[1]}")
    assert page == "\n".join(template_table.lines()) + "\n"


def test_a_template_of_trl_by_name(tmp_path: Path) -> None:
    model = real_templates.write_model("qwen3", tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": SHOWN["reasoning in turns"].messages}) + "\n")
    out = tmp_path / "tokens"
    Encode(data=str(data), model=str(model), chat_template="trl:qwen3_training").run(make_context(out))
    (row,) = tables.read_table(out / "part-00000.parquet").to_pylist()
    kept = [t for t, m in zip(row["input_ids"], row["response_mask"], strict=True) if m]
    text = real_templates.tokenizer("qwen3").decode(kept)
    assert "Think of orchards." in text
    assert "Citrus comes to mind." in text
    with pytest.raises(UsageError, match="the installed TRL has cohere, "):
        template_file("trl:no_such")
    assert training_variant(real_templates.source("qwen3")) == "trl:qwen3_training"
    assert training_variant("{{ messages }}") is None


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}},
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "Tells the time.", "parameters": {
    "type": "object", "properties": {}}}}  # fmt: skip


def called(*calls: tuple[str, dict], tools: list[dict]) -> Conversation:
    """A question, calls in one turn, a result for each, and an answer."""
    function = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    return Conversation(
        [
            {"role": "user", "content": "Look it up."},
            {"role": "assistant", "content": "", "tool_calls": function},
            *({"role": "tool", "content": f"result {i}", "name": n} for i, (n, _) in enumerate(calls)),
            {"role": "assistant", "content": "Done."},
        ],
        tools,
    )


@pytest.mark.parametrize("turns", ["all", "each"])
@pytest.mark.parametrize(
    "calls",
    [
        [("weather", {"city": "Oslo"})] * 2,
        [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})],
        [("weather", {"city": "Oslo"}), ("now", {})],
        [("now", {}), ("now", {})],
    ],
)
def test_calls_of_which_the_template_prints_one(calls: list, turns: str) -> None:
    """It prints the name of a call in the header of its result too, which is no part of the turn that called."""
    talk = called(*calls, tools=[WEATHER, NOW])
    with pytest.raises(BadRow, match="tool_calls of turn 2"):
        encoder("gptoss", turns=turns).encode(talk)
    taking = encoder("gptoss", turns=turns, allow_lost=["tool_calls"])
    if not calls[0][1]:
        with pytest.raises(BadRow, match="all of turn 2"):
            taking.encode(talk)
        return
    first = next(run for e in taking.encode(talk) for run in runs(e, taking.tokenizer))
    assert first == ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
    assert runs(encoder("qwen3").encode(talk)[0], encoder("qwen3").tokenizer)[0].count("<tool_call>") == 2


@pytest.mark.parametrize(
    ("parameters", "extra", "where"),
    [
        ({"type": "object", "properties": {"days": {"type": "array", "description": "When", "items": {
            "type": "string", "description": "A date"}}}}, {}, "weather.days"),
        ({"city": {"type": "str", "description": "Which city"}}, {}, "weather"),
        (WEATHER["function"]["parameters"], {"return": {"type": "string", "description": "Degrees"}}, "weather"),
        ({"city": {"type": "str"}}, {}, "weather.city"),
        ([{"name": "city"}], {}, "weather.city"),
    ],
)  # fmt: skip
def test_every_description_of_a_tool_is_accounted_for(parameters: dict, extra: dict, where: str) -> None:
    function = WEATHER["function"] | {"parameters": parameters} | extra
    talk = Conversation(
        [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello there."}],
        [{"type": "function", "function": function}],
    )
    with pytest.raises(BadRow, match=rf"tools \({where}\); take --allow-lost tools"):
        encoder("gptoss").encode(talk)
    encoder("qwen3").encode(talk)


def test_results_that_only_their_ids_assign_are_noted() -> None:
    names = {"call00001": "Oslo", "call00002": "Rome"}
    calls = [{"id": i, "function": {"name": "weather", "arguments": {"city": c}}} for i, c in names.items()]
    results = [{"role": "tool", "tool_call_id": i, "content": f"Rain in {c}."} for i, c in names.items()]
    for order, notes in ((results, ()), (results[::-1], (OUT_OF_ORDER,))):
        talk = [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        (found,) = encoder("qwen3").encode(
            Conversation([*talk, *order, {"role": "assistant", "content": "Rain."}])
        )
        assert found.notes == notes


def test_details_of_tools_that_the_template_leaves_out_are_noted() -> None:
    said = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello there."}]
    city = {"type": "string", "minLength": 31, "pattern": "^[A-Z]"}
    function = {"name": "weather", "description": "Of a place.", "parameters": {"properties": {"city": city}}}
    talk = Conversation(said, [{"type": "function", "function": function}])
    assert [encoder(name).encode(talk)[0].notes for name in ("gptoss", "qwen3")] == [(DETAILS_LOST,), ()]


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_reasoning_that_says_what_the_answer_says_is_accounted_for(name: str) -> None:
    talk = [
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four", "reasoning_content": "Four"},
        {"role": "user", "content": "And two?"},
        {"role": "assistant", "content": "Six"},
    ]
    with pytest.raises(BadRow, match="reasoning of turn 2; take --turns each"):
        encoder(name).encode(Conversation(talk))
    (alone,) = encoder(name).encode(Conversation(talk[:2]))
    assert runs(alone, encoder(name).tokenizer)[0].count("Four") == 2


def test_turns_that_no_token_ends_are_noted() -> None:
    (called,) = encoder("gptoss").encode(SHOWN["tool call"])
    assert called.notes == ()  # `<|call|>` ends the call
    (open_ended,) = encoder("glm4moe").encode(SHOWN["turns"])
    assert open_ended.notes == (NO_END, NO_END)
    # What generation stops on opens the user's turn: it ends the turn before.
    (ended,) = encoder("glm4moe", stop_tokens=["<|user|>"]).encode(SHOWN["turns"])
    assert ended.notes == (NO_END,)
    assert runs(ended, real_templates.tokenizer("glm4moe"))[0].endswith("A cherry is red.<|user|>")
