"""Chat templates as they are met in the wild, on a tokenizer built here."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sstoken.errors import SstokenError
from stages.encoding.chat import DEFAULT_MAX_LENGTH, PLAIN_CHAT_TEMPLATE, ChatEncoder
from stages.encoding.conversations import BadRow
from stages.encoding.spans import close_spans

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
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
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["user assistant model system hello there \n\n my friend's answer is 42.\n"] * 4, trainer
    )
    if trim_offsets:
        from tokenizers import processors

        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def conversation(*turns: str, system: str | None = None) -> list[dict]:
    roles = ("user", "assistant")
    start = [{"role": "system", "content": system}] if system is not None else []
    return start + [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]


def said(encoder: ChatEncoder, messages: list[dict]) -> list[str]:
    """The runs of response tokens, decoded."""
    encoded = encoder.encode(messages)
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
    marked = ChatEncoder(tokenizer, chat_template=STYLES[style]).encode(TALK)
    free = ChatEncoder(tokenizer, chat_template=unmarked(STYLES[style])).encode(TALK)
    assert free == marked
    assert sum(marked.response_mask) > 10
    assert marked.response_mask[-1]
    assert not marked.response_mask[0]


@pytest.mark.parametrize(
    ("style", "first"),
    [
        ("chatml", " My answer is 42.\n<|im_end|>"),
        ("llama3", "My answer is 42.<|eot_id|>"),
        ("llama2", "My answer is 42. </s>"),
        ("gemma", "My answer is 42.<end_of_turn>"),
        ("zephyr", " My answer is 42.\n</s>"),
    ],
)
def test_every_assistant_turn_is_a_response_with_its_end(style: str, first: str, tokenizer) -> None:
    runs = said(ChatEncoder(tokenizer, chat_template=unmarked(STYLES[style])), TALK)
    assert len(runs) == 2
    assert runs[0] == first


def test_markers_around_the_content_alone_take_the_end_of_turn_in(tokenizer) -> None:
    inner = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        + G + "{{ m['content'] }}" + END
        + "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    )  # fmt: skip
    a = ChatEncoder(tokenizer, chat_template=inner).encode(TALK)
    assert a == ChatEncoder(tokenizer, chat_template=CHATML).encode(TALK)


def test_close_spans_leaves_a_closed_span_and_an_empty_one_goes() -> None:
    assert close_spans("ab<e><e>c", [(0, 5), (8, 8), (8, 9)], "<e>") == [(0, 5), (8, 9)]


def test_templates_that_raise_make_a_bad_row(tokenizer) -> None:
    gemma = ChatEncoder(tokenizer, chat_template=unmarked(GEMMA))
    with pytest.raises(BadRow, match="System role not supported") as error:
        gemma.encode(conversation("hello", "there", system="be kind"))
    assert error.value.reason == "template refuses"
    llama = ChatEncoder(tokenizer, chat_template=LLAMA2)
    two_users = [{"role": "user", "content": "a"}, *conversation("b", "c")]
    with pytest.raises(BadRow, match="must alternate"):
        llama.encode(two_users)


def test_thinking_of_the_last_turn_is_proven_by_its_prefix(tokenizer) -> None:
    encoder = ChatEncoder(tokenizer, chat_template=QWEN3)
    runs = said(encoder, conversation("hello", "<think>\nhm\n</think>\n\nthere"))
    assert runs == ["<think>\nhm\n</think>\n\nthere<|im_end|>"]
    # Without thinking the template writes an empty one: the model did not say that.
    assert said(encoder, conversation("hello", "there")) == ["there<|im_end|>"]


def test_thinking_that_the_template_drops_is_uncertain(tokenizer) -> None:
    encoder = ChatEncoder(tokenizer, chat_template=QWEN3)
    with pytest.raises(BadRow) as error:
        encoder.encode(conversation("hello", "<think>\nhm\n</think>\n\nthere", "my", "friend"))
    assert error.value.reason == "uncertain mask"


def test_tool_calls_are_part_of_the_response(tokenizer) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "wait", "tool_calls": [call]},
    ]
    (run,) = said(ChatEncoder(tokenizer, chat_template=QWEN3), messages)
    assert run.startswith("<think>\n\n</think>\n\nwait\n<tool_call>")
    assert '"name": "add"' in run
    assert run.endswith("</tool_call><|im_end|>")


def test_a_template_without_end_of_turn_is_refused(tokenizer) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    with pytest.raises(SstokenError, match="--chat-template") as error:
        ChatEncoder(tokenizer, chat_template=template).encode(TALK)
    assert not isinstance(error.value, BadRow)


def test_a_turn_left_open_in_the_middle_is_uncertain(tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}{{ eos_token }}"
    )
    encoder = ChatEncoder(tokenizer, chat_template=template)
    assert said(encoder, conversation("hello", "there")) == [" there\n</s>"]
    with pytest.raises(BadRow, match="uncertain mask"):
        encoder.encode(TALK)


def test_a_template_that_repeats_the_answer_is_uncertain(tokenizer) -> None:
    template = unmarked(CHATML) + "{{ messages[-1]['content'] }}"
    with pytest.raises(BadRow, match="uncertain mask"):
        ChatEncoder(tokenizer, chat_template=template).encode(TALK)


def test_a_token_of_prompt_and_response_is_uncertain(tokenizer) -> None:
    template = "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else m['content'] + '</s>' }}{% endfor %}"
    with pytest.raises(BadRow, match="prompt and response alike"):
        ChatEncoder(tokenizer, chat_template=template).encode(conversation("ans", "wer"))


def test_no_chat_template_uses_the_plain_one(tokenizer) -> None:
    encoder = ChatEncoder(tokenizer)
    text, spans = encoder.render(conversation("hello", "there", "my", "friend", system="be kind"))
    assert text == "be kind\n\nUser: hello\nAssistant: there</s>\nUser: my\nAssistant: friend</s>\n"
    assert [text[a:b] for a, b in spans] == ["there</s>", "friend</s>"]
    free = ChatEncoder(tokenizer, chat_template=unmarked(PLAIN_CHAT_TEMPLATE))
    assert free.encode(TALK) == encoder.encode(TALK)


def test_plain_template_starts_with_bos_where_the_tokenizer_does() -> None:
    from tokenizers import processors

    tokenizer = build_tokenizer()
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[bos]
    )
    assert ChatEncoder(tokenizer).render(conversation("hello", "there"))[0].startswith("<s>User: hello")


def test_truncation_keeps_the_start(tokenizer) -> None:
    whole = ChatEncoder(tokenizer, chat_template=CHATML).encode(TALK)
    first = whole.response_mask.index(True)
    cut = ChatEncoder(tokenizer, first + 3, CHATML).encode(TALK)
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[: first + 3]
    assert sum(cut.response_mask) == 3
    nothing = ChatEncoder(tokenizer, first, CHATML).encode(TALK)
    assert (nothing.input_ids, nothing.response_mask, nothing.truncated) == ([], [], True)
    assert not ChatEncoder(tokenizer, len(whole.input_ids), CHATML).encode(TALK).truncated


def test_max_length_is_what_the_tokenizer_declares(tokenizer) -> None:
    assert ChatEncoder(tokenizer).max_length == DEFAULT_MAX_LENGTH
    assert ChatEncoder(tokenizer, 7).max_length == 7
    short = build_tokenizer()
    short.model_max_length = 33
    assert ChatEncoder(short).max_length == 33


def test_a_dated_template_gives_the_same_text_on_any_day(tokenizer) -> None:
    encoder = ChatEncoder(tokenizer, chat_template="{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert encoder.render(TALK)[0].startswith("26 Jul 2024")


texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    style=st.sampled_from(sorted(STYLES)),
)
def test_any_text_is_masked_alike_with_and_without_markers(turns, style, tokenizer) -> None:
    messages = conversation(*(text for turn in turns for text in turn))
    marked = ChatEncoder(tokenizer, chat_template=STYLES[style])
    free = ChatEncoder(tokenizer, chat_template=unmarked(STYLES[style]))
    assert free.encode(messages) == marked.encode(messages)
    text, spans = free.render(messages)
    assert len(spans) == len(turns)
    for (start, end), (_, answer) in zip(spans, turns, strict=True):
        assert answer.strip() in text[start:end]


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
@pytest.mark.parametrize("markers", [True, False])
def test_golden_tokens(markers: bool) -> None:
    import pyarrow.parquet as pq

    from stages.checkpoints import load_tokenizer

    tokenizer = load_tokenizer(str(SHARED / "models/base"))
    template = None if markers else unmarked(str(tokenizer.chat_template))
    encoder = ChatEncoder(tokenizer, chat_template=template)
    columns = ["example_id", "messages", "input_ids", "response_mask"]
    for row in pq.read_table(SHARED / "golden/tokens.parquet", columns=columns).to_pylist():
        encoded = encoder.encode(json.loads(row["messages"]))
        assert encoded.input_ids == row["input_ids"], row["example_id"]
        assert encoded.response_mask == row["response_mask"], row["example_id"]
