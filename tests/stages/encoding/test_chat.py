"""Chat templates as they are met in the wild, on a tokenizer built here."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sstoken.stages.encoding.chat import (
    DEFAULT_MAX_LENGTH,
    PROMPT_CHANGED,
    ChatEncoder,
    Encoded,
    EncoderOptions,
)
from sstoken.stages.encoding.messages import BadRow, Conversation
from sstoken.stages.encoding.rendering import NO_END, SPEAKERS_LOST, TOOLS_IN_SYSTEM, TRIMMED
from sstoken.stages.encoding.templates import PLAIN_CHAT_TEMPLATE
from tests.factories import byte_tokenizer
from tests.support import SHARED, needs_shared

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "[/INST]"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<bos>", "<start_of_turn>", "<end_of_turn>"),
]
G, END = "{% generation %}", "{% endgeneration %}"

# Each with markers around what is a response; without them it is what one meets on the Hub.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    + G + "{{ m['content'] + '<|im_end|>' }}" + END
    + "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)  # fmt: skip
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ '<|begin_of_text|>' }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}{% if m['role'] == 'assistant' %}"
    + G + "{{ m['content'] | trim + '<|eot_id|>' }}" + END
    + "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)  # fmt: skip
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% set content = system + m['content'] if loop.first else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' }}" + G + "{{ content | trim + ' ' + eos_token }}" + END + "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' }}{% if role == 'model' %}"
    + G + "{{ m['content'] | trim + '<end_of_turn>' }}" + END
    + "{{ '\\n' }}{% else %}{{ m['content'] | trim + '<end_of_turn>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)  # fmt: skip
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}{% if m['role'] == 'assistant' %}"
    + G + "{{ m['content'] + eos_token }}" + END
    + "{{ '\\n' }}{% else %}{{ m['content'] + eos_token + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)  # fmt: skip
# As Qwen 3: thinking is kept in the last turn alone, which gets an empty one where it has none.
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% set thought = '' %}{% set said = m['content'] %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + said.lstrip('\\n') }}"
    "{% else %}{{ said }}{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '\\n<tool_call>' + c | tojson + '</tool_call>' }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STYLES = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "gemma": GEMMA, "zephyr": ZEPHYR}


def unmarked(template: str) -> str:
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def build_tokenizer(
    bos: str = "<s>", eos: str = "</s>", trim_offsets: bool = False
) -> PreTrainedTokenizerFast:
    text = ["user assistant model system hello there \n\n my friend's answer is 42.\n"] * 4
    tokenizer = byte_tokenizer(SPECIAL, text, bos_token=bos, eos_token=eos)
    if trim_offsets:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def conversation(*turns: str, system: str | None = None) -> list[dict]:
    roles = ("user", "assistant")
    start = [{"role": "system", "content": system}] if system is not None else []
    return start + [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]


def make(tokenizer: PreTrainedTokenizerFast, template: str, stop_tokens=(), **options) -> ChatEncoder:
    """An encoder that takes special tokens in texts, which many tests put there on purpose."""
    options = {"keep_special_tokens": True, **options}
    return ChatEncoder(tokenizer, EncoderOptions(chat_template=template, **options), stop_tokens)


def encode(encoder: ChatEncoder, messages: list[dict]) -> Encoded:
    (encoded,) = encoder.encode(Conversation(messages))
    return encoded


def said(encoder: ChatEncoder, messages: list[dict]) -> list[str]:
    """The runs of response tokens, decoded."""
    encoded = encode(encoder, messages)
    runs: list[list[int]] = []
    previous = False
    for token, response in zip(encoded.input_ids, encoded.response_mask, strict=True):
        if response:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = response
    return [encoder.tokenizer.decode(run) for run in runs]


TALK = conversation(
    "Hello there?", " My answer is 42.\n", "Say <|im_end|> </s> [/INST]!", "</s> it is, friend"
)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("trim_offsets", [False, True])
def test_mask_without_markers_equals_mask_with_markers(style: str, trim_offsets: bool) -> None:
    tokenizer = build_tokenizer(trim_offsets=trim_offsets)
    marked = encode(make(tokenizer, STYLES[style]), TALK)
    free = encode(make(tokenizer, unmarked(STYLES[style])), TALK)
    assert free == marked
    assert sum(marked.response_mask) > 10
    assert marked.response_mask[-1]
    assert not marked.response_mask[0]


@pytest.mark.parametrize(
    ("style", "first"),
    [
        ("chatml", " My answer is 42.\n<|im_end|>"),
        ("llama3", "My answer is 42.<|eot_id|>"),
        ("llama2", " My answer is 42. </s>"),  # no generation prompt: a blank before the answer is its own
        ("gemma", "My answer is 42.<end_of_turn>"),
        ("zephyr", " My answer is 42.\n</s>"),
    ],
)
def test_every_assistant_turn_is_a_response_with_its_end(style: str, first: str, tokenizer) -> None:
    runs = said(make(tokenizer, unmarked(STYLES[style])), TALK)
    assert len(runs) == 2
    assert runs[0] == first


def test_markers_around_the_content_alone_take_the_end_of_turn_in(tokenizer) -> None:
    inner = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        + G + "{{ m['content'] }}" + END
        + "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    )  # fmt: skip
    a = encode(make(tokenizer, inner), TALK)
    assert a == encode(make(tokenizer, CHATML), TALK)


def test_templates_that_raise_make_a_bad_row(tokenizer) -> None:
    gemma = make(tokenizer, unmarked(GEMMA))
    with pytest.raises(BadRow, match="System role not supported") as error:
        encode(gemma, conversation("hello", "there", system="be kind"))
    assert error.value.reason == "template refuses"
    llama = make(tokenizer, LLAMA2)
    two_users = [{"role": "user", "content": "a"}, *conversation("b", "c")]
    with pytest.raises(BadRow, match="must alternate"):
        encode(llama, two_users)


def test_a_response_starts_after_the_generation_prompt(tokenizer) -> None:
    encoder = make(tokenizer, QWEN3)
    runs = said(encoder, conversation("hello", "<think>\nhm\n</think>\n\nthere"))
    assert runs == ["<think>\nhm\n</think>\n\nthere<|im_end|>"]
    # Without thinking the template writes an empty one, which is no part of the generation prompt.
    assert said(encoder, conversation("hello", "there")) == ["<think>\n\n</think>\n\nthere<|im_end|>"]
    not_thinking = QWEN3.replace(
        "assistant\\n' }}{% endif %}", "assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    )
    assert said(make(tokenizer, not_thinking), conversation("hello", "there")) == ["there<|im_end|>"]


def test_thinking_that_the_template_drops_makes_a_bad_row_that_names_the_ways_out(tokenizer) -> None:
    messages = conversation("hello", "<think>\nhm\n</think>\n\nthere", "my", "friend")
    with pytest.raises(
        BadRow, match=r"reasoning of turn 2; take --turns each, or --allow-lost reasoning"
    ) as error:
        encode(make(tokenizer, QWEN3), messages)
    assert error.value.reason == "lost by the template"
    allowed = encode(make(tokenizer, QWEN3, allow_lost=["reasoning"]), messages)
    assert allowed.notes == ("examples whose reasoning the chat template leaves out",)
    first, second = make(tokenizer, QWEN3, turns="each").encode(Conversation(messages))
    assert (first.turn, second.turn) == (2, 4)
    decoded = tokenizer.decode([i for i, m in zip(first.input_ids, first.response_mask, strict=True) if m])
    assert decoded == "<think>\nhm\n</think>\n\nthere<|im_end|>"
    assert second.notes == (
        "examples whose earlier turns are shown without their reasoning, as at inference",
    )


def test_tool_calls_are_part_of_the_response(tokenizer) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "wait", "tool_calls": [call]},
    ]
    (run,) = said(make(tokenizer, QWEN3), messages)
    assert run.startswith("<think>\n\n</think>\n\nwait\n<tool_call>")
    assert '"name": "add"' in run
    assert run.endswith("</tool_call><|im_end|>")


def test_a_response_that_no_token_ends_is_noted(tokenizer) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    talk = conversation("hello", "there", "my", "friend")
    encoded = encode(make(tokenizer, template), talk)
    assert encoded.notes == (NO_END, NO_END)
    assert said(make(tokenizer, template), talk) == [" there", " friend"]
    ended_at_last = make(tokenizer, template + "{{ eos_token }}")
    assert said(ended_at_last, talk) == [" there", " friend\n</s>"]
    assert encode(ended_at_last, talk).notes == (NO_END,)


def test_what_ends_a_response_goes_up_to_the_token_that_stops(tokenizer) -> None:
    two = unmarked(CHATML).replace("<|im_end|>' }}{% endif %}", "<|im_end|></s>' }}{% endif %}")
    two = two.replace(
        "{{ m['content'] + '<|im_end|>' }}{% else %}", "{{ m['content'] + '<|im_end|></s>' }}{% else %}"
    )
    assert said(make(tokenizer, two), conversation("hello", "there")) == ["there<|im_end|></s>"]
    # The token that stops generation opens the next turn: it is the response's where it stands.
    opening = (
        "{% for m in messages %}{{ '<start_of_turn>' if m['role'] == 'user' else '<|im_start|>' }}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    encoder = make(tokenizer, opening, stop_tokens=["<start_of_turn>"])
    talk = conversation("hello", "there", "my", "friend")
    assert said(encoder, talk) == ["there<start_of_turn>", "friend"]
    assert encode(encoder, talk).notes == (NO_END,)


def test_a_template_that_repeats_the_answer_is_refused(tokenizer) -> None:
    template = unmarked(CHATML) + "{{ messages[-1]['content'] }}"
    with pytest.raises(BadRow, match="turn 4 more than once"):
        encode(make(tokenizer, template), TALK)


def test_special_tokens_in_a_text_make_a_bad_row_or_are_noted(tokenizer) -> None:
    with pytest.raises(BadRow, match=r"turn 3 holds '<\|im_end\|>'.*--keep-special-tokens") as error:
        encode(ChatEncoder(tokenizer, EncoderOptions(chat_template=CHATML)), TALK)
    assert error.value.reason == "special token in the text"
    assert encode(make(tokenizer, CHATML), TALK).notes == ("examples with special tokens in their text",)


@pytest.mark.parametrize("place", ["the tools hold", "turn 2 holds"])
def test_special_tokens_in_calls_and_tools_make_a_bad_row(place, tokenizer) -> None:
    call = {
        "function": {"name": "f", "arguments": {"x": ["<|im_end|>" if place != "the tools hold" else ""]}}
    }
    tools = [{"function": {"name": "f", "description": "<|im_end|>"}}] if place == "the tools hold" else None
    talk = Conversation([*conversation("hello"), {"role": "assistant", "tool_calls": [call]}], tools)
    with pytest.raises(BadRow, match=rf"{place} '<\|im_end\|>'"):
        ChatEncoder(tokenizer, EncoderOptions(chat_template=CHATML)).encode(talk)


def test_turns_that_a_row_marks_are_no_response(tokenizer) -> None:
    talk = Conversation(conversation("hello", "there", "my", "friend"), untrained=frozenset([1]))
    for template in (CHATML, unmarked(CHATML)):
        (encoded,) = make(tokenizer, template).encode(talk)
        trained = [i for i, m in zip(encoded.input_ids, encoded.response_mask, strict=True) if m]
        assert tokenizer.decode(trained) == "friend<|im_end|>"
    with pytest.raises(BadRow, match="every assistant turn is marked"):
        make(tokenizer, CHATML).encode(Conversation(conversation("a", "b"), untrained=frozenset([1])))


def test_a_token_of_prompt_and_response_is_uncertain(tokenizer) -> None:
    template = "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else m['content'] + '</s>' }}{% endfor %}"
    with pytest.raises(BadRow, match="prompt and response alike"):
        encode(make(tokenizer, template), conversation("ans", "wer"))


def test_no_chat_template_uses_the_plain_one(tokenizer) -> None:
    encoder = ChatEncoder(tokenizer, EncoderOptions(keep_special_tokens=True))
    rendered = encoder.renderer.render(
        Conversation(conversation("hello", "there", "my", "friend", system="be kind"))
    )
    assert rendered.text == "be kind\n\nUser: hello\nAssistant: there</s>\nUser: my\nAssistant: friend</s>\n"
    assert [rendered.text[a:b].strip() for a, b in rendered.spans] == ["there</s>", "friend</s>"]
    free = make(tokenizer, unmarked(PLAIN_CHAT_TEMPLATE))
    assert encode(free, TALK) == encode(encoder, TALK)


def test_plain_template_starts_with_bos_where_the_tokenizer_does() -> None:
    tokenizer = build_tokenizer()
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )
    rendered = ChatEncoder(tokenizer).renderer.render(Conversation(conversation("hello", "there")))
    assert rendered.text.startswith("<s>User: hello")


def test_truncation_keeps_the_start(tokenizer) -> None:
    whole = encode(make(tokenizer, CHATML), TALK)
    first = whole.response_mask.index(True)
    cut = encode(make(tokenizer, CHATML, max_length=first + 3), TALK)
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[: first + 3]
    assert sum(cut.response_mask) == 3
    nothing = encode(make(tokenizer, CHATML, max_length=first), TALK)
    assert (nothing.input_ids, nothing.response_mask, nothing.truncated) == ([], [], True)
    assert not encode(make(tokenizer, CHATML, max_length=len(whole.input_ids)), TALK).truncated


def test_max_length_is_what_the_tokenizer_declares(tokenizer) -> None:
    assert ChatEncoder(tokenizer).max_length == DEFAULT_MAX_LENGTH
    assert ChatEncoder(tokenizer, EncoderOptions(7)).max_length == 7
    short = build_tokenizer()
    short.model_max_length = 33
    assert ChatEncoder(short).max_length == 33


def test_a_dated_template_gives_the_same_text_on_any_day(tokenizer) -> None:
    encoder = make(tokenizer, "{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert encoder.renderer.render(Conversation(TALK)).text.startswith("26 Jul 2024")


texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=60)
@given(
    turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    style=st.sampled_from(sorted(STYLES)),
)
def test_any_text_is_masked_alike_with_and_without_markers(turns, style, tokenizer) -> None:
    messages = conversation(*(text for turn in turns for text in turn))
    marked = make(tokenizer, STYLES[style])
    free = make(tokenizer, unmarked(STYLES[style]))
    assert encode(free, messages) == encode(marked, messages)
    rendered = free.renderer.render(Conversation(messages))
    assert len(rendered.spans) == len(turns)
    for (start, end), (_, answer) in zip(rendered.spans, turns, strict=True):
        assert answer.strip() in rendered.text[start:end]


@needs_shared
@pytest.mark.parametrize("markers", [True, False])
def test_golden_tokens(markers: bool) -> None:
    import pyarrow.parquet as pq

    from sstoken.stages.checkpoints import load_tokenizer

    tokenizer = load_tokenizer(str(SHARED / "models/base"))
    template = None if markers else unmarked(str(tokenizer.chat_template))
    encoder = ChatEncoder(tokenizer, EncoderOptions(chat_template=template))
    columns = ["example_id", "messages", "input_ids", "response_mask"]
    for row in pq.read_table(SHARED / "golden/tokens.parquet", columns=columns).to_pylist():
        encoded = encode(encoder, json.loads(row["messages"]))
        assert encoded.input_ids == row["input_ids"], row["example_id"]
        assert encoded.response_mask == row["response_mask"], row["example_id"]


def test_tool_definitions_without_a_place_go_into_the_system_prompt(tokenizer) -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [*conversation("hello"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    encoder = make(tokenizer, QWEN3)
    (encoded,) = encoder.encode(Conversation(messages, [tool]))
    assert encoded.notes == (TOOLS_IN_SYSTEM,)
    text = tokenizer.decode(encoded.input_ids)
    assert text.startswith(
        "<|im_start|>system\n# Tools\n\n" + json.dumps(tool) + "<|im_end|>\n<|im_start|>user"
    )
    with pytest.raises(BadRow, match=r"lost by the template: tools \(add\)"):
        make(tokenizer, unmarked(CHATML)).encode(Conversation(conversation("hello", "there"), [tool]))


def test_what_follows_the_last_response_is_left_out(tokenizer) -> None:
    """So that the turn is shown as the last one, with its thinking."""
    messages = [*conversation("hello", "there", "my", "friend"), {"role": "user", "content": "bye"}]
    messages[1]["reasoning_content"] = "hm"
    template = QWEN3.replace("{% set thought = '' %}", "{% set thought = m.reasoning_content or '' %}")
    (encoded,) = make(tokenizer, template).encode(Conversation(messages, untrained=frozenset([3])))
    assert tokenizer.decode(encoded.input_ids).endswith("<think>\nhm\n</think>\n\nthere<|im_end|>")


def test_equal_texts_are_each_accounted_for(tokenizer) -> None:
    messages = conversation("two and two", "<think>\nfour\n</think>\n\nfour", "and two", "six")
    with pytest.raises(BadRow, match="reasoning of turn 2; take --turns each"):
        encode(make(tokenizer, QWEN3), messages)
    allowed = encode(make(tokenizer, QWEN3, allow_lost=["reasoning"]), messages)
    assert allowed.notes == ("examples whose reasoning the chat template leaves out",)


def test_what_follows_the_last_trained_answer_is_not_shown(tokenizer) -> None:
    encoder = make(tokenizer, QWEN3)
    thinking = conversation("two and two", "<think>\nhm\n</think>\n\nfour")
    following = conversation("sure", "no")
    alone = encode(encoder, thinking)
    (unwanted,) = encoder.encode(Conversation(thinking + following, untrained=frozenset({3})))
    asked_again = encode(encoder, thinking + following[:1])
    assert unwanted.input_ids == asked_again.input_ids == alone.input_ids
    assert unwanted.response_mask == asked_again.response_mask == alone.response_mask
    assert tokenizer.decode(alone.input_ids).endswith("<think>\nhm\n</think>\n\nfour<|im_end|>")
    note = "examples without the messages after the last answer that is trained on"
    assert (alone.notes, unwanted.notes, asked_again.notes) == ((), (note,), (note,))
    for turns in ("each", "last"):
        assert encode(make(tokenizer, QWEN3, turns=turns), thinking + following[:1]).notes == (note,)


def test_blanks_that_the_template_trims_are_noted(tokenizer) -> None:
    indented = conversation("hello", "    there\n")
    assert encode(make(tokenizer, CHATML), indented).notes == ()
    trimming = CHATML.replace("m['content']", "m['content'] | trim")
    for turns in ("all", "each"):
        assert encode(make(tokenizer, trimming, turns=turns), indented).notes == (TRIMMED,)


def test_prompts_that_the_tokenizer_cannot_spell_are_noted() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "hello": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    encoder = make(words, "{% for m in messages %}{{ m.content }} {% endfor %}</s>")
    assert encode(encoder, conversation("hello", "hello")).notes == ()
    assert encode(encoder, conversation("\u6771", "hello")).notes == (PROMPT_CHANGED,)
    with pytest.raises(BadRow, match="changed by the tokenizer"):
        encode(encoder, conversation("hello", "\u6771"))


def test_names_of_speakers_that_the_template_leaves_out_are_noted(tokenizer) -> None:
    messages = conversation("hello", "there")
    messages[0]["name"] = "Bob"
    assert encode(make(tokenizer, unmarked(CHATML)), messages).notes == (SPEAKERS_LOST,)
    naming = unmarked(CHATML).replace(
        "m['role'] + '\\n'", "m['role'] + (' ' + m['name'] if m['name'] else '') + '\\n'"
    )
    encoded = encode(make(tokenizer, naming), messages)
    assert encoded.notes == ()
    assert "user Bob" in tokenizer.decode(encoded.input_ids)


def test_an_answer_of_marks_beside_the_word_that_is_put_in_its_place(tokenizer) -> None:
    talk = conversation("hello", "Wqxreply", "Wqxreply0", "{}")
    assert said(make(tokenizer, unmarked(CHATML)), talk) == ["Wqxreply<|im_end|>", "{}<|im_end|>"]


def test_messages_that_share_a_replacement_are_told_apart(tokenizer) -> None:
    """Letters beyond ASCII have seven replacements: those of the first and the eighth message are the same."""
    talk = conversation("0", "\x1b", "\x1b", "\x1b", "\x1b", "\x1b", "\xd0", "\u0400")
    for template in (CHATML, unmarked(CHATML)):
        assert said(make(tokenizer, template), talk)[-1] == "\u0400<|im_end|>"
        digits = conversation("1", *["?"] * 8, "1")
        assert said(make(tokenizer, template), digits)[-1] == "1<|im_end|>"


def test_a_turn_whose_end_nothing_shows_is_uncertain(tokenizer) -> None:
    """No token ends it, and the template refuses the conversation that stops there: not even the full stop is sure."""
    template = (
        "{% if messages | length == 2 and '.' in messages[1].content %}{{ raise_exception('too short') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    )
    with pytest.raises(BadRow, match=r"nothing shows where turn 2 ends .*too short"):
        encode(make(tokenizer, template), conversation("Hello?", "There it is.", "Now?", "Here it is."))
