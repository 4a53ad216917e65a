"""A masked or tokens folder in Python: as a table, or as rows that a notebook shows in colour."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sstoken.errors import UsageError
from sstoken.stages import storage, tables
from sstoken.stages.checkpoints import load_tokenizer
from sstoken.stages.report.folders import OpenedFolder, open_folders
from sstoken.stages.report.show import MaskedExample, ranks, read_examples
from sstoken.stages.token_text import token_texts, visible

if TYPE_CHECKING:
    import datasets
    import polars as pl

_STEPS = ("#f0f5fa", "#dfebf6", "#cbdff1", "#b3d0ea", "#98bfe2", "#7aacd8", "#5b98cd")
"""Colours from a low score to a high one, all light enough for dark text."""


@dataclass(frozen=True)
class Row:
    """One example. A notebook shows its tokens in colour."""

    example: MaskedExample
    texts: list[str]
    """The text that each token adds."""

    @property
    def text(self) -> str:
        """The text, including the prompt."""
        return "".join(self.texts)

    @property
    def kept(self) -> list[str]:
        """The text of each kept token."""
        return [text for text, keep in zip(self.texts, self.example.keep_mask, strict=True) if keep]

    def __repr__(self) -> str:
        kept = sum(self.example.keep_mask)
        return (
            f"<row {self.example.row}, {self.example.example_id!r}: {kept} of {len(self.texts)} tokens kept>"
        )

    def _repr_html_(self) -> str:
        example = self.example
        scores = [s if keep else None for s, keep in zip(example.scores, example.keep_mask, strict=True)]
        pieces = []
        for i, (text, rank) in enumerate(zip(self.texts, ranks(scores), strict=True)):
            shown = html.escape(visible(text, newline="⏎\n"))
            if not example.response[i]:
                style = "color:#56626f"
            elif not example.keep_mask[i]:
                style = "color:#56626f;text-decoration:line-through"
            else:
                colour = _STEPS[min(int(rank * len(_STEPS)), len(_STEPS) - 1)]
                style = f"background:{colour};border-radius:3px"
            score = example.scores[i]
            title = str(example.input_ids[i]) + ("" if score is None else f", score {score:z.4g}")
            pieces.append(f'<span style="{style}" title="{title}">{shown}</span>')
        name = html.escape(visible(example.example_id, newline=" "))
        return (
            f'<div style="background:#fff;color:#121a23;padding:12px 16px;border-radius:8px;line-height:1.8">'
            f'<div style="color:#56626f;font-size:90%">row {example.row} · {name}</div>'
            f'<div style="white-space:pre-wrap">{"".join(pieces)}</div></div>'
        )


class Loaded(Sequence[Row]):
    """A finished masked or tokens folder."""

    def __init__(self, opened: OpenedFolder) -> None:
        self._opened = opened
        self._parts = tables.parts(opened.path)
        self._tokenizer: Any = None

    @property
    def facts(self) -> dict[str, Any]:
        """How it was made: method, parameters, checkpoints, tokenizer."""
        return dict(self._opened.facts)

    @property
    def columns(self) -> list[str]:
        """Its columns."""
        return list(self._opened.columns)

    def __len__(self) -> int:
        return sum(tables.num_rows(part) for part in self._parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.row(i) for i in range(len(self))[index]]
        return self.row(index)

    def __repr__(self) -> str:
        columns = ", ".join(self.columns)
        return f"<{self._opened.kind} {str(self._opened.path)!r}: {len(self):,} rows, {columns}>"

    def row(self, number: int) -> Row:
        """Read one row, from 0; a negative number counts from the end.

        Raises:
            IndexError: there is no such row.
        """
        size = len(self)
        if not -size <= number < size:
            raise IndexError(f"row {number} is not in {self._opened.path}; legal: 0 to {size - 1}")
        (example,) = read_examples(self._opened.path, number % size)
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(str(self._opened.path / "tokenizer"))
        return Row(example, token_texts(self._tokenizer, example.input_ids))

    def to_polars(self, columns: Sequence[str] | None = None) -> "pl.DataFrame":
        """Read it into a table in memory, with a row for each example and all or some columns."""
        import polars as pl

        found = pl.from_arrow(self._table(columns))
        assert isinstance(found, pl.DataFrame)
        return found

    def to_datasets(self, columns: Sequence[str] | None = None) -> "datasets.Dataset":
        """Like `to_polars`, as a dataset for trainers."""
        from datasets import Dataset

        return Dataset(self._table(columns))

    def _table(self, columns: Sequence[str] | None) -> Any:
        import pyarrow as pa

        wanted = self.columns if columns is None else list(columns)
        unknown = [name for name in wanted if name not in self.columns]
        if unknown:
            raise UsageError(
                f"no column {unknown[0]!r} in {self._opened.path}; legal: {', '.join(self.columns)}"
            )
        return pa.concat_tables(
            [tables.read_table(part, wanted) for part in self._parts]
        ).replace_schema_metadata(None)


def load(folder: str | Path) -> Loaded:
    """Open a finished masked or tokens folder, local or in an object store.

        masked = sstoken.load("runs/demo/masked-sstoken")
        masked.row(0)  # in a notebook: its tokens in colour

    Raises:
        UsageError: there is no such folder, or it is of another kind.
        SstokenError: it is unfinished or damaged.
    """
    place = storage.address(str(folder))
    return Loaded(open_folders({place.name or str(folder): storage.local(place)}).first)
