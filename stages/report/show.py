"""`sstoken-curate show`: print kept and dropped tokens in the terminal, coloured by score.

Text from a dataset is untrusted: control characters, terminal escape sequences and rich markup are shown as text, never
interpreted.
"""

import io
import math
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from rich.console import Console
from rich.style import Style
from rich.text import Text

from sstoken.errors import SstokenError, UsageError
from sstoken.methods import METHODS
from sstoken.methods.presets import shown_name
from sstoken.stages import tables
from sstoken.stages.checkpoints import load_tokenizer
from sstoken.stages.manifest import finished_inside
from sstoken.stages.report.choosing import choose, signal_values
from sstoken.stages.report.drawing import write_file
from sstoken.stages.token_text import token_texts, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Viridis without its darkest third: even steps of lightness, visible on dark and on light terminals.
RAMP = ("#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725")
PROMPT_STYLE = Style(dim=True)
DROPPED_STYLE = Style(color="#8a8a8a", strike=True)
DROPPED_MARKS = ("[-", "-]")
RESPONSE_MARKS = ("«", "»")
"""Marks that replace colours; `[-...-]` as in `wdiff` and `git diff --word-diff`."""

_ROW_COLUMNS = ("example_id", "input_ids", "response_mask", "keep_mask", "score")


@dataclass(frozen=True)
class MaskedExample:
    """One row of a masked dataset; per-token sequences are as long as `input_ids`."""

    row: int
    example_id: str
    input_ids: list[int]
    response_mask: list[bool] | None
    """None in a lean dataset, where dropped tokens cannot be told from the prompt."""
    keep_mask: list[bool]
    """In a tokens folder, where nothing is selected yet, the response mask."""
    scores: list[float | None]
    provenance: dict[str, Any]

    @property
    def response(self) -> list[bool]:
        """The response mask, or the keep mask where the dataset does not tell."""
        return self.keep_mask if self.response_mask is None else self.response_mask


def show(
    masked: Path,
    row: int | None = None,
    num_examples: int = 1,
    console: Console | None = None,
    *,
    search: str | None = None,
    sort: str = "row",
    signal: str | None = None,
    pager: bool = False,
) -> None:
    """Print `num_examples` rows of a masked or tokens folder from `row` (default: the first), with a legend.

    `search` and `sort` are as in `choose`. `signal` (`rel`, `attention`, `weight`, or `CHECKPOINT.SIGNAL`) replaces the
    score in the colours. With `pager`, a terminal shows a screen at a time.

    Raises:
        SstokenError: the folder is unfinished, `row` is out of range, no row was found, or there is no such signal.
    """
    console = console or default_console()
    if search is None and sort == "row":
        examples = read_examples(masked, 0 if row is None else row, num_examples)
    else:
        if row is not None:
            raise UsageError(f"row is {row}, but rows are chosen by search or sort; leave one of them out")
        examples = [e for r in choose(masked, num_examples, search, sort) for e in read_examples(masked, r)]
    if signal is not None:
        values = signal_values(masked, [e.row for e in examples], signal)
        examples = [replace(example, scores=values[example.row]) for example in examples]
    tokenizer = load_tokenizer(str(masked / "tokenizer"))
    lean, selected = examples[0].response_mask is None, examples[0].provenance.get("kind") != "tokens"
    paged = pager and console.is_terminal
    if paged:
        os.environ.setdefault("LESS", "-FRX")
    with console.pager(styles=not is_plain(console)) if paged else nullcontext():
        for example in examples:
            print_example(example, tokenizer, console)
            _print(console, Text())
        print_legend(console, lean=lean, of=signal or "score", selected=selected)


def save_svg(masked: Path, file: Path, row: int | None = None, num_examples: int = 1, **options: Any) -> None:
    """Save the output of `show`, with its `options`, as an SVG picture; the same rows give the same bytes.

    Raises:
        SstokenError: as for `show`; or the file cannot be written.
    """
    console = Console(
        record=True, file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor",
        no_color=False, legacy_windows=False,
    )  # fmt: skip
    show(masked, row, num_examples, console, **options)
    svg = console.export_svg(title="sstoken", unique_id="sstoken", code_format=_SVG)
    write_file(file, svg)


def print_example(example: MaskedExample, tokenizer: "PreTrainedTokenizerBase", console: Console) -> None:
    """Print a header line, then the tokens."""
    facts = example.provenance
    kept, response = sum(example.keep_mask), sum(example.response_mask or ())
    if facts.get("kind") == "tokens":
        counts = f"{response} response tokens, nothing is selected yet"
    elif response:
        counts = f"kept {kept} of {response} response tokens ({kept / response:.0%})"
    else:
        counts = f"kept {kept} tokens"
    name = str(facts.get("method", ""))
    ranked = name not in METHODS or METHODS[name].selective
    method = shown_name(facts)
    kept_by = [key for key in ("budget", "rho") if facts.get(key) is not None]  # a budget replaces the share
    if ranked and kept_by:
        method += f" {kept_by[0]} {facts[kept_by[0]]}"
    header = Text(f"row {example.row}  ", style="bold")
    header.append(visible(example.example_id, newline="\\n"))
    for part in filter(None, (counts, visible(method, newline="\\n"))):
        header.append(f"  ·  {part}", style="not bold")
    texts, plain = token_texts(tokenizer, example.input_ids), is_plain(console)
    text = render_example(texts, example.response, example.keep_mask, example.scores, plain=plain)
    if text.plain.endswith("\n"):
        text.right_crop(1)
    _print(console, header)
    _print(console, text)


def print_legend(console: Console, *, lean: bool = False, of: str = "score", selected: bool = True) -> None:
    """Print the meaning of the colours, or of the marks that replace them."""
    legend = Text()
    if is_plain(console):
        marked = "prompt «kept [-dropped-]»" if selected else "prompt «response»"
        legend.append("prompt or dropped «kept»" if lean else marked)
    else:
        legend.append("prompt" if not lean else "prompt or dropped", style=PROMPT_STYLE)
        legend.append(f"   {'kept' if selected else 'response'}, {visible(of)} low ")
        for color in RAMP:
            legend.append("  ", style=Style(bgcolor=color))
        legend.append(" high   ")
        if not lean and selected:
            legend.append("dropped", style=DROPPED_STYLE)
    _print(console, legend)


def render_example(
    tokens: Sequence[str],
    response_mask: Sequence[bool],
    keep_mask: Sequence[bool],
    scores: Sequence[float | None],
    *,
    plain: bool = False,
) -> Text:
    """Style the tokens of one example: prompt dim, kept on a background by score, dropped struck out.

    Args:
        tokens: T strings (see `token_texts`), unescaped; control characters are made visible here.
        response_mask: T flags.
        keep_mask: T flags, true only on response tokens.
        scores: T values, None for no score; the colour shows their rank among the kept tokens.
        plain: use marks instead of colours.
    """
    kinds = [
        ("kept" if keep else "dropped") if response else "prompt"
        for response, keep in zip(response_mask, keep_mask, strict=True)
    ]
    if plain:
        return Text(_marked([visible(token) for token in tokens], kinds))
    text = Text(overflow="fold")
    shades = ranks([s if kind == "kept" else None for s, kind in zip(scores, kinds, strict=True)])
    for token, kind, shade in zip(tokens, kinds, shades, strict=True):
        style = {"prompt": PROMPT_STYLE, "dropped": DROPPED_STYLE}.get(kind) or _shade(shade)
        text.append(visible(token), style=style)
    return text


def read_examples(masked: Path, row: int, num_examples: int = 1) -> list[MaskedExample]:
    """Return `num_examples` rows of a masked folder from `row` on, or fewer at its end, reading only their row groups.

    Raises:
        UsageError: there is no such folder, it is not a masked one, or `row` is out of range.
        SstokenError: the folder is unfinished or damaged.
    """
    parts = tables.parts(masked)
    if not (masked / "manifest.json").is_file():
        if parts:
            raise SstokenError(f"{masked}: unfinished (no manifest.json); run its select again")
        why = "is a file" if masked.exists() else "no such folder"
        why = "not a masked dataset" if masked.is_dir() else why
        if inside := ", ".join(finished_inside(masked)):
            why = f"a folder of several, {inside}"
        raise UsageError(f"{masked}: {why}; name the folder that select or encode wrote")
    footers = [_footer(part) for part in parts]
    total = sum(footer.num_rows for footer in footers)
    if not 0 <= row < total:
        legal = f"legal are 0 to {total - 1}" if total else "the dataset is empty"
        raise UsageError(f"row {row} is not in {masked}: {legal}")
    examples, first = [], 0
    for part, footer in zip(parts, footers, strict=True):
        for group in range(footer.num_row_groups):
            after = first + footer.row_group(group).num_rows
            low, high = max(row, first), min(row + num_examples, after)
            if low < high:
                examples += _read_rows(part, group, range(low - first, high - first), first)
            first = after
    return examples


def _footer(part: Path) -> Any:
    try:
        footer = tables.footer(part)
    except (pa.ArrowInvalid, OSError) as error:
        raise SstokenError(f"{part}: not a readable Parquet file; run its select again") from error
    names = set(footer.schema.to_arrow_schema().names)
    if not {"example_id", "input_ids"} <= names or not names & {"keep_mask", "response_mask"}:
        raise UsageError(f"{part.parent}: not a masked dataset; name the folder that select or encode wrote")
    return footer


def _read_rows(part: Path, group: int, local: Iterable[int], first: int) -> list[MaskedExample]:
    """Read rows of one row group, whose first row is row `first` of the folder."""
    provenance = tables.read_metadata(part)
    table = tables.read_row_group(part, group, _ROW_COLUMNS)
    found = []
    for i in local:
        (row,) = table.slice(i, 1).to_pylist()
        ids, response = row["input_ids"], row.get("response_mask")
        keep, scores = row.get("keep_mask", response), row.get("score") or [None] * len(ids)
        found.append(MaskedExample(first + i, row["example_id"], ids, response, keep, scores, provenance))
    return found


def ranks(scores: Sequence[float | None]) -> list[float]:
    """Return each score's rank among all scores, in [0, 1]; ties share a rank; None gets 0.5."""
    order = sorted({s for s in scores if s is not None and not math.isnan(s)})
    rank = {s: i / (len(order) - 1) if len(order) > 1 else 0.5 for i, s in enumerate(order)}
    return [rank.get(s, 0.5) if s is not None else 0.5 for s in scores]


def _shade(rank: float) -> Style:
    """Return a background from the ramp, with black or white text, whichever contrasts better."""
    background = RAMP[min(int(rank * len(RAMP)), len(RAMP) - 1)]
    red, green, blue = (int(background[i : i + 2], 16) / 255 for i in (1, 3, 5))
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return Style(color="#000000" if luminance > 0.18 else "#ffffff", bgcolor=background)


def _marked(texts: Sequence[str], kinds: Sequence[str]) -> str:
    """Join the texts, with marks around each response and around dropped stretches within it."""
    pairs = [(text, kind) for text, kind in zip(texts, kinds, strict=True) if text]
    marked = ""
    for prompt, turn in groupby(pairs, key=lambda pair: pair[1] == "prompt"):
        inner = ""
        for dropped, run in groupby(turn, key=lambda pair: pair[1] == "dropped"):
            inner += "".join(text for text, _ in run).join(DROPPED_MARKS if dropped else ("", ""))
        marked += inner if prompt else inner.join(RESPONSE_MARKS)
    return marked


def default_console() -> Console:
    """Return a console for standard output that escapes characters which its encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console()


def is_plain(console: Console) -> bool:
    """Return whether the console shows no colours: no terminal, a dumb one, or NO_COLOR."""
    return console.no_color or console.color_system is None


def _print(console: Console, text: Text) -> None:
    """Print one paragraph; wrap lines only on a terminal, so that a pipe gets the text unchanged."""
    console.print(text, soft_wrap=not console.is_terminal)


# rich's own template loads a font from the network; this one uses a local font.
_SVG = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: "Fira Code", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font: bold 18px sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix" xml:space="preserve">
{matrix}
</g>
</g>
</svg>
"""
