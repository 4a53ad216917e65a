"""Prints the first example of a tokens folder after `encode`: prompt and response as the trainer will see them."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console

from sstoken.stages import tables
from sstoken.stages.checkpoints import load_tokenizer
from sstoken.stages.report.show import default_console, is_plain, render_example
from sstoken.stages.token_text import token_texts

_HEAD, _TAIL = 60, 20
"""Tokens to show at the start and the end of each stretch of prompt or response."""


def print_first_example(tokens: Path, console: Console | None = None) -> None:
    """Print the first example of a finished tokens folder with its response marked; shortens long stretches."""
    console = console or default_console()
    filled = next((part for part in tables.parts(tokens) if tables.num_rows(part)), None)
    if filled is None:
        return
    (row,) = tables.read_row_group(filled, 0, ("input_ids", "response_mask")).slice(0, 1).to_pylist()
    texts = token_texts(load_tokenizer(str(tokens / "tokenizer")), row["input_ids"])
    shown, mask = _cut(texts, row["response_mask"])
    plain = is_plain(console)
    marks = "response between « and »" if plain else "response on a background"
    text = render_example(shown, mask, mask, [None] * len(mask), plain=plain)
    console.print(f"  the first example, {marks}:", highlight=False, soft_wrap=True)
    console.print(text, soft_wrap=not console.is_terminal)


def _cut(texts: Sequence[str], mask: Sequence[bool]) -> tuple[list[str], list[bool]]:
    """Replace the middle of a long stretch with the number of tokens left out."""
    shown: list[str] = []
    kept: list[bool] = []
    for response, group in groupby(zip(texts, mask, strict=True), key=lambda pair: pair[1]):
        stretch = [text for text, _ in group]
        left_out = len(stretch) - _HEAD - _TAIL
        if left_out > 1:
            stretch = [*stretch[:_HEAD], f" [... {left_out:,} tokens ...] ", *stretch[-_TAIL:]]
        shown += stretch
        kept += [response] * len(stretch)
    return shown, kept
