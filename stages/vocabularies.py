"""Check that a checkpoint's tokenizer gives token ids the meaning that they were encoded with."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sstoken.errors import SstokenError
from sstoken.stages import tables
from sstoken.stages.checkpoints import load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MADE_WITH = "tokenizer"
"""Folder of the tokenizer, beside the shards of tokens."""


def check_vocabulary(ref: str, own: "PreTrainedTokenizerBase | None", tokens: Path) -> None:
    """Refuse a checkpoint whose own tokenizer gives an id in the tokens another meaning.

    Extra tokens in one of the tokenizers (trainers add `<pad>`) are harmless if no example uses them. Examples are
    read only if the vocabularies differ.

    Args:
        ref: the checkpoint, for messages.
        own: its tokenizer; None if it has none, and nothing can be checked.
        tokens: a folder of tokens, with the tokenizer that made them.

    Raises:
        SstokenError: an id in the examples has another meaning, or none.
    """
    parts = tables.parts(tokens)
    expected = tables.read_metadata(parts[0])["tokenizer"]
    if own is None or tokenizer_fingerprint(own) == expected["fingerprint"]:
        return
    mine, differing = {}, {}
    if (tokens / _MADE_WITH).is_dir():
        mine = {i: token for token, i in own.get_vocab().items()}
        theirs = {i: token for token, i in load_tokenizer(str(tokens / _MADE_WITH)).get_vocab().items()}
        differing = {i: token for i, token in theirs.items() if mine.get(i) != token}
        used = _used_ids(parts, max(theirs) + 1)
        differing = {i: token for i, token in differing.items() if used[i]}
        if not differing:
            return
    problem = f"{ref}: its tokenizer is not the one that made the tokens ({expected['name']})"
    if differing:
        first = min(differing)
        meaning = f"{mine[first]!r}" if first in mine else "nothing"
        problem += (
            f": id {first} is {differing[first]!r} there and {meaning} here, and example {_first_with(parts, first)!r} "
            f"has it ({len(differing)} of {int(used.sum())} used ids differ)"
        )
    raise SstokenError(
        f"{problem}; encode with this checkpoint's tokenizer, or take a checkpoint that shares the vocabulary"
    )


def _used_ids(parts: list[Path], size: int) -> NDArray[np.bool_]:
    """Return which ids below `size` occur in the examples, [size]."""
    used = np.zeros(size, np.bool_)
    for part in parts:
        ids, _ = tables.flatten(tables.read_table(part, ["input_ids"])["input_ids"])
        used[ids[ids < size]] = True
    return used


def _first_with(parts: list[Path], token_id: int) -> str:
    shards = (tables.read_table(part, ["example_id", "input_ids"]) for part in parts)
    return next(
        str(example_id)
        for table in shards
        for example_id, ids in zip(table["example_id"], tables.rows(table["input_ids"]), strict=True)
        if (ids == token_id).any()
    )
