"""What `show` prints: the right tokens, marked right, and nothing that drives a terminal."""

import io
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import tables
from sstoken.stages.masked_card import decisive_settings
from sstoken.stages.report.show import DROPPED_STYLE, RAMP, read_examples, render_example, save_svg, show
from sstoken.stages.token_text import token_texts, visible
from tests.factories import byte_tokenizer

TOKENIZER = byte_tokenizer(["<eos>"], eos_token="<eos>")
"""Every byte is a token, so most characters take several."""


def row(example_id: str, prompt: str, response: str, keep: list[int]) -> dict[str, Any]:
    """`keep` counts response tokens; a token's score is its place."""
    a, b = TOKENIZER(prompt).input_ids, TOKENIZER(response).input_ids
    response_mask = [False] * len(a) + [True] * len(b)
    keep_mask = [False] * len(a) + [i in keep for i in range(len(b))]
    scores = [None] * len(a) + [float(i) for i in range(len(b))]
    return {
        "example_id": example_id,
        "input_ids": a + b,
        "labels": [i if k else -100 for i, k in zip(a + b, keep_mask, strict=True)],
        "keep_mask": keep_mask,
        "response_mask": response_mask,
        "rel": scores,
        "attention": scores,
        "score": scores,
    }


def write_masked(folder: Path, shards: list[list[dict[str, Any]]], lean: bool = False, **facts: Any) -> Path:
    folder.mkdir()
    TOKENIZER.save_pretrained(folder / "tokenizer")
    for i, rows in enumerate(shards):
        table = pa.Table.from_pylist(rows, schema=tables.MASKED_LEAN if lean else tables.MASKED)
        metadata = {"method": "sstoken", "rho": 0.6, **facts}
        tables.write_part(folder / tables.part_name(i), table, metadata)
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    first = [row(f"e{i}", f"q{i}", f"answer{i}", [0, 1]) for i in range(3)]
    second = [row(f"e{i}", f"q{i}", f"answer{i}", [0, 1]) for i in range(3, 5)]
    return write_masked(tmp_path / "masked", [first, second])


def printed(folder: Path, *args: Any, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=80, **options)
    show(folder, *args, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_plain_text_marks_the_response_and_what_was_dropped(masked: Path) -> None:
    text = printed(masked, 0)
    assert "row 0  e0  ·  kept 2 of 7 response tokens (29%)  ·  sstoken rho 0.6\nq0«an[-swer0-]»\n" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("number", range(5))
def test_rows_count_over_all_parts(masked: Path, number: int) -> None:
    (example,) = read_examples(masked, number)
    assert (example.row, example.example_id) == (number, f"e{number}")


def test_several_rows_go_on_to_the_end(masked: Path) -> None:
    assert [e.example_id for e in read_examples(masked, 2, 2)] == ["e2", "e3"]
    assert [e.example_id for e in read_examples(masked, 2, 99)] == ["e2", "e3", "e4"]


def test_only_the_row_group_that_holds_the_row_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_masked(tmp_path / "masked", [[row("e0", "q", "a", [0])]])
    part = folder / tables.part_name(0)
    rows = [row(f"e{i}", "q", "a", [0]) for i in range(6)]
    table = pa.Table.from_pylist(rows, schema=tables.MASKED).replace_schema_metadata(
        pq.read_schema(part).metadata
    )
    pq.write_table(table, part, row_group_size=2)
    groups = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda f, g, *a, **k: groups.append(g) or read(f, g, *a, **k)
    )
    assert [e.example_id for e in read_examples(folder, 3)] == ["e3"]
    assert groups == [1]


def test_colours_follow_the_rank_of_the_score() -> None:
    text = render_example(
        ["p", "a", "b", "c"], [False, True, True, True], [False, True, True, False], [None, -7, 3, 9]
    )
    styles = [span.style for span in text.spans]
    assert text.plain == "pabc"
    assert [s.bgcolor and s.bgcolor.name for s in styles] == [None, RAMP[0], RAMP[-1], None]
    assert styles[0].dim
    assert styles[3] == DROPPED_STYLE


def test_a_method_without_scores_still_shows(tmp_path: Path) -> None:
    rows = [{**row("e", "q", "ab", [0]), "score": None, "rel": None}]
    folder = write_masked(tmp_path / "masked", [rows], method="full")
    text = printed(folder, 0, force_terminal=True, color_system="truecolor", no_color=False)
    assert "\x1b[9;" in text
    assert "rho" not in text


def test_no_color_marks_like_a_pipe(masked: Path) -> None:
    text = printed(masked, 0, force_terminal=True, color_system="truecolor", no_color=True)
    assert "«an[-swer0-]»" in text


def test_lean_data_shows_what_was_kept(tmp_path: Path) -> None:
    lean = {k: v for k, v in row("e", "q", "ab", [0]).items() if k in tables.MASKED_LEAN.names}
    text = printed(write_masked(tmp_path / "masked", [[lean]], lean=True), 0)
    assert "kept 1 tokens" in text
    assert "q«a»b" in text
    assert "prompt or dropped" in text


EVIL = "\x1b[31m\x1b]0;title\x07\x9b2J [red]x[/red] [/] \u202etxt\r\b\x00\u2028 a\tb"


@pytest.mark.parametrize("terminal", [True, False])
def test_text_never_drives_the_terminal(tmp_path: Path, terminal: bool) -> None:
    folder = write_masked(tmp_path / "masked", [[row("id" + EVIL, EVIL, EVIL, [1, 2])]], method="m" + EVIL)
    options = {"force_terminal": True, "color_system": "truecolor"} if terminal else {}
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed(folder, 0, **options))  # our own colours
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", text)
    for spelled in (r"\x1b", r"\x07", r"\x9b", r"\u202e", r"\r", r"\x00", "⇥"):
        assert spelled in text
    assert re.search(r"\[red\]x\[/red\]", text.replace("\n", ""))


def test_an_encoding_that_lacks_characters_is_no_error(masked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    show(masked, 0)
    stdout.flush()
    assert rb"\xaban[-swer0-]\xbb" in stdout.buffer.getvalue()  # type: ignore[attr-defined]


def test_newlines_are_seen() -> None:
    assert visible("a\nb") == "a⏎\nb"
    assert visible("a\nb", newline="\\n") == "a\\nb"
    assert visible("naïve 日本 🎉 👩‍👧") == "naïve 日本 🎉 👩‍👧"


def test_a_character_of_several_tokens_stands_whole() -> None:
    texts = token_texts(TOKENIZER, TOKENIZER("é🎉a").input_ids)
    assert texts == ["", "é", "", "", "", "🎉", "a"]


@given(st.lists(st.integers(0, 255), max_size=40))
def test_token_texts_join_to_the_whole_text(ids: list[int]) -> None:
    assert "".join(token_texts(TOKENIZER, ids)) == TOKENIZER.decode(ids)


def test_svg_bytes_are_deterministic_and_need_no_network(masked: Path, tmp_path: Path, monkeypatch) -> None:
    save_svg(masked, tmp_path / "a.svg", 1, 3)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    save_svg(masked, tmp_path / "b.svg", 1, 3)
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.svg").read_text()
    assert RAMP[0] in svg
    assert "line-through" in svg
    assert re.findall(r"https?://[^\"' )]+", svg) == ["http://www.w3.org/2000/svg"]


def test_svg_that_cannot_be_written_is_one_line(masked: Path, tmp_path: Path) -> None:
    (tmp_path / "no").touch()
    with pytest.raises(SstokenError, match="cannot be written"):
        save_svg(masked, tmp_path / "no" / "a.svg")


def test_a_budget_stands_in_the_place_of_the_share(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "masked", [[row("e", "q", "answer", [0])]], budget=1)
    assert "sstoken budget 1" in printed(folder)
    assert "rho" not in printed(folder)
    assert decisive_settings({"params": {"rho": 0.6, "gamma": 0.5}, "budget": 1}) == {
        "gamma": 0.5,
        "budget": 1,
    }


@pytest.mark.parametrize("number", [5, -1])
def test_row_out_of_range_says_the_range(masked: Path, number: int) -> None:
    with pytest.raises(UsageError, match=rf"row {number} .*legal are 0 to 4$"):
        show(masked, number)


def test_empty_dataset(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="empty"):
        show(write_masked(tmp_path / "masked", [[]]))


def test_unfinished_folder(masked: Path) -> None:
    (masked / "manifest.json").unlink()
    with pytest.raises(SstokenError, match=r"unfinished \(no manifest.json\)"):
        show(masked)


def test_folders_that_are_not_masked(masked: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        show(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="not a masked dataset"):
        show(tmp_path / "empty")
    with pytest.raises(
        UsageError, match=r"a folder of several, .*masked; name the folder that select or enc"
    ):
        show(masked.parent)
    table = pa.table({"example_id": pa.array([], pa.string()), "loss": pa.array([], tables.VALUES)})
    tables.write_part(masked / tables.part_name(0), table, {})
    with pytest.raises(UsageError, match="not a masked dataset"):
        show(masked)


def test_damaged_part(masked: Path) -> None:
    (masked / tables.part_name(1)).write_bytes(b"PAR1 not really")
    with pytest.raises(SstokenError, match=r"part-00001\.parquet: not a readable"):
        show(masked)
