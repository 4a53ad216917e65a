"""Small tokenised datasets: sound ones, and those with one fault each."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.factories import byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and m.get('reasoning_content') %}"
    "{{ '<think>\\n' + m['reasoning_content'] + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] or '' }}"
    "{% for call in m.get('tool_calls') or [] %}"
    "{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_TOOLS = (
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% if tools and m == asked[-1] %}"
    "{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'tool' %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + (m['content'] | tojson) + '}[/TOOL_RESULTS]' }}"
    "{% elif m.get('tool_calls') %}{{ '[TOOL_CALLS] [' }}{% for call in m['tool_calls'] %}"
    "{{ (call['function'] | tojson) + (']' if loop.last else ', ') }}{% endfor %}{{ eos_token }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""Calls, results and definitions in brackets, as Mistral has them: the definitions stand before the last question."""
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
GLM4 = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{{ '<think>\\n' + (m.get('reasoning_content') or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
"""The generation prompt opens the reasoning, as in Qwen3.5."""
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


@cache
def chatml() -> PreTrainedTokenizerFast:
    """ChatML with a pad token of its own, and BOS that only Llama's template prints."""
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<s>", "<|odd|>"]
    return byte_tokenizer(
        special, eos_token="<|im_end|>", pad_token="<|pad|>", bos_token="<s>", chat_template=CHATML
    )


@cache
def thinking() -> PreTrainedTokenizerFast:
    """Two line breaks are one token: it holds the end of the generation prompt and the start of empty reasoning."""
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", chat_template=THINKING)
    tokenizer.add_tokens(["\n\n", "<think>", "</think>"])
    return tokenizer


@cache
def phi3() -> PreTrainedTokenizerFast:
    special = ["<|user|>", "<|end|>", "<s>", "<|assistant|>"]
    return byte_tokenizer(special, eos_token="<|end|>", bos_token="<s>", chat_template=PHI3)


@cache
def qwen() -> PreTrainedTokenizerFast:
    """ChatML whose pad token ends documents, as Qwen's."""
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    return byte_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML)


@cache
def llama3() -> PreTrainedTokenizerFast:
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return byte_tokenizer(
        special, eos_token="<|eot_id|>", bos_token="<|begin_of_text|>", chat_template=LLAMA3
    )


@cache
def llama3_base() -> PreTrainedTokenizerFast:
    special = [
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|end_of_text|>",
    ]
    return byte_tokenizer(
        special, eos_token="<|end_of_text|>", bos_token="<|begin_of_text|>", chat_template=LLAMA3
    )


@cache
def mistral_unknown() -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        ["<s>", "</s>", "<unk>"],
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=MISTRAL,
    )


@cache
def mistral() -> PreTrainedTokenizerFast:
    return byte_tokenizer(["<s>", "</s>"], bos_token="<s>", eos_token="</s>", chat_template=MISTRAL)


@cache
def mistral_tools() -> PreTrainedTokenizerFast:
    names = ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS")
    special = ["<s>", "</s>", "[TOOL_CALLS]", *(f"[{slash}{name}]" for name in names for slash in ("", "/"))]
    return byte_tokenizer(special, bos_token="<s>", eos_token="</s>", chat_template=MISTRAL_TOOLS)


@cache
def phi4() -> PreTrainedTokenizerFast:
    special = ["<|im_start|>", "<|im_sep|>", "<|im_end|>"]
    return byte_tokenizer(special, eos_token="<|im_end|>", chat_template=PHI4)


@cache
def llama2() -> PreTrainedTokenizerFast:
    """Pieces with a mark for blanks, as SentencePiece has them; letters that it lacks become bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = [message["content"] for i in range(10) for message in talk(i, 2)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.train_from_iterator([f"▁{t.replace(' ', '▁')}▁[INST]▁[/INST]" for t in text], trainer)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=MISTRAL, **settings)
    for byte in range(256):  # bytes are ordinary tokens
        assert tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") == 3 + byte
    return tokenizer


@cache
def glm4() -> PreTrainedTokenizerFast:
    special = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"]
    return byte_tokenizer(special, eos_token="<|user|>", pad_token="<|endoftext|>", chat_template=GLM4)


Row = dict[str, Any]
Edit = Callable[[list[int], list[int]], Any]


def talk(number: int = 0, turns: int = 1) -> list[dict[str, str]]:
    """A conversation; each number has other words."""
    messages = []
    for turn in range(turns):
        asked, said = WORDS[(number + turn) % len(WORDS)], WORDS[(number + 3 * turn + 5) % len(WORDS)]
        messages += [
            {"role": "user", "content": f"What do you think of {asked} number {number}?"},
            {
                "role": "assistant",
                "content": f"I like {said} {number}-{turn}, since it is {asked} and {said}.",
            },
        ]
    return messages


WORDS = (
    "plums",
    "rivers",
    "old maps",
    "chess",
    "granite",
    "violins",
    "autumn",
    "bread",
    "lighthouses",
    "ferns",
)


def sound_row(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, str]]) -> Row:
    """Token ids and labels: the assistant's text with what ends it."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(coded["input_ids"]), coded["offset_mapping"]
    labels = [-100] * len(ids)
    place = 0
    for message in messages:
        start = text.index(message["content"], place)
        place = start + len(message["content"])
        if message["role"] != "assistant":
            continue
        inside = [i for i, (a, _) in enumerate(offsets) if start <= a < place]
        end = inside[-1] + 2  # with the token that ends it
        for i in (*inside, *range(inside[-1] + 1, min(end, len(ids)))):
            labels[i] = ids[i]
    return {"input_ids": ids, "labels": labels}


def sound(tokenizer: PreTrainedTokenizerFast, rows: int = 6, turns: int = 1) -> list[Row]:
    """Rows without a fault."""
    return [sound_row(tokenizer, talk(i, turns)) for i in range(rows)]


def spans(labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and stop of what is trained."""
    start = None
    for i, label in enumerate([*labels, -100]):
        if label != -100 and start is None:
            start = i
        if label == -100 and start is not None:
            yield start, i
            start = None


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    """A folder that --tokenizer takes."""
    tokenizer.save_pretrained(folder)
    return str(folder)
