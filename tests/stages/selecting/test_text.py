"""Words, sentences and protected tokens of real texts, by a byte-level tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sstoken.errors import UsageError
from sstoken.stages.selecting.text import ResponseText, check_protect

TEXTS = [
    'Add 3.79 to 2. "Is that 5?" It is! So:\n#### 5<|im_end|>\n',
    "Here:\n```python\nprint(1)\n```\nDone.<|im_end|>",
    'Look it up. <tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>',
    "数えます。三つです！ 🙂 naïve<|im_end|>",
    "no end",
    "```\nunclosed fence",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    core.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    place = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>").save_pretrained(place)
    return place


def response(folder: Path, *texts: str) -> ResponseText:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    turns = [tokenizer.encode(text) for text in texts]
    ids = np.array([i for turn in turns for i in turn], dtype=np.int32)
    return ResponseText(ids, np.cumsum([0, *(len(turn) for turn in turns)]).astype(np.int64), folder)


def kept(text: ResponseText, mask: np.ndarray) -> str:
    return "".join(piece for piece, keep in zip(text.pieces, mask, strict=True) if keep)


def parts(text: ResponseText, pool: str) -> list[str]:
    spans = text.spans(pool)
    return ["".join(text.pieces[a:b]) for a, b in zip(spans[:-1], spans[1:], strict=True)]


def test_pieces_give_the_text_back(folder: Path) -> None:
    assert "".join(response(folder, *TEXTS).pieces) == "".join(TEXTS)


def test_another_tokenizer_at_the_same_place_is_read_anew(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "own")
    text = response(tmp_path / "own", "no end")
    assert "".join(text.pieces) == "no end"
    file = tmp_path / "own/tokenizer.json"
    vocabulary = json.loads(file.read_bytes())
    swapped = vocabulary["model"]["vocab"]
    swapped["no"], swapped["end"] = swapped["end"], swapped["no"]
    file.write_text(json.dumps(vocabulary))
    again = ResponseText(text.ids, text.turns, text.tokenizer)
    assert "".join(again.pieces) == "end no"


def test_words(folder: Path) -> None:
    words = parts(response(folder, TEXTS[0]), "word")
    assert words[:10] == ["Add", " 3.79", " to", " 2.", ' "Is', " that", ' 5?"', " It", " is!", " So:"]


def test_sentences(folder: Path) -> None:
    assert parts(response(folder, TEXTS[0]), "sentence")[:4] == [
        "Add 3.79 to 2.",
        ' "Is that 5?"',
        " It is!",
        " So:\n",
    ]
    assert parts(response(folder, TEXTS[3]), "sentence")[:2] == ["数えます。", "三つです！"]


@pytest.mark.parametrize("pool", ["word", "sentence"])
@settings(deadline=None, max_examples=30)
@given(texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4))
def test_spans_cover_the_turns_and_cross_none(folder: Path, pool: str, texts: list[str]) -> None:
    text = response(folder, *texts)
    spans = text.spans(pool)
    assert spans[0] == 0
    assert spans[-1] == len(text.ids)
    assert (np.diff(spans) > 0).all()
    assert set(text.turns.tolist()) <= set(spans.tolist())


@pytest.mark.parametrize(
    ("text", "name", "wanted"),
    [
        (TEXTS[0], "end_of_turn", "<|im_end|>\n"),
        (TEXTS[1], "end_of_turn", "<|im_end|>"),
        (TEXTS[4], "end_of_turn", None),
        (TEXTS[1], "code", "```python\nprint(1)\n```"),
        (TEXTS[5], "code", TEXTS[5]),
        (TEXTS[0], "code", ""),
        (TEXTS[2], "tool_calls", '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
        (
            '{"name": "f", "parameters": {"x": 1}}<|im_end|>',
            "tool_calls",
            '{"name": "f", "parameters": {"x": 1}}',
        ),
        (TEXTS[4], "tool_calls", ""),
        (TEXTS[0], r"regex:^#### \d+", "#### 5"),
        (TEXTS[3], "regex:naïve", "naïve"),
        (TEXTS[3], "regex:🙂", "🙂"),
    ],
)
def test_what_is_protected(folder: Path, text: str, name: str, wanted: str | None) -> None:
    # a token that holds more than the match is kept whole
    found = response(folder, "Before. ", text, " after")
    mask = found.protected([name])[name]
    inside = slice(found.turns[1], found.turns[2])
    own = ResponseText(found.ids[inside], np.array([0, mask[inside].size]), folder)
    got = kept(own, mask[inside])
    if wanted is None:
        assert mask[inside].tolist() == [*([False] * (mask[inside].size - 1)), True]
    elif not wanted:
        assert got == ""
    else:
        assert wanted in got
        assert len(got) <= len(wanted) + 3
    if name != "end_of_turn":
        assert not mask[: found.turns[1]].any()


def test_unknown_names_and_broken_patterns_are_refused() -> None:
    with pytest.raises(
        UsageError, match="protect is 'eos'; legal is end_of_turn, tool_calls, code or regex:PATTERN"
    ):
        check_protect(["code", "eos"])
    with pytest.raises(UsageError, match="not a regular expression"):
        check_protect(["regex:("])
