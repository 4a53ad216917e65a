"""`sstoken.load` against the files, and the rows that it chooses and shows."""

import re
from pathlib import Path

import pytest

import sstoken
from sstoken.errors import SstokenError, UsageError
from sstoken.stages import tables
from sstoken.stages.report.choosing import choose, signal_values
from tests.stages.report.small_folders import tokens_table, write_masked, write_signals, write_tokens

EVIL = "<script>alert(1)</script>"
CONVERSATIONS = [[(f"Q{n} ", f"Answer {n} & {EVIL} é")] for n in range(9)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loaded")
    table = tokens_table(CONVERSATIONS)
    tokens = write_tokens(folder / "tokens", [table.slice(0, 4), table.slice(4)])
    write_signals(folder / "scores" / "base", tokens, 0, "loss", "entropy")
    write_masked(folder / "masked", tokens)
    return folder


def test_tables_are_those_of_the_files(place: Path) -> None:
    masked = sstoken.load(place / "masked")
    frame, dataset = masked.to_polars(), masked.to_datasets(["input_ids", "labels"])
    assert len(masked) == frame.height == len(dataset) == 9
    assert frame.columns == tables.MASKED.names
    assert dataset[5] == {name: frame[name][5].to_list() for name in ("input_ids", "labels")}
    assert masked.facts["method"] == "sstoken"
    with pytest.raises(UsageError, match=r"no column 'x'.*legal: example_id"):
        masked.to_polars(["x"])


def test_a_row_shows_its_tokens_and_runs_nothing(place: Path) -> None:
    row = sstoken.load(place / "masked").row(-1)
    assert row.text == f"Q8 Answer 8 & {EVIL} é<eos>"
    assert repr(row).startswith("<row 8, 'e8': ")
    shown = row._repr_html_()
    assert "<script" not in shown
    assert re.sub(
        r"&lt;", "<", "".join(re.findall(r'<span style="[^"]*" title="[^"]*">([^<]*)</span>', shown))
    ).startswith("Q8 ")
    struck, coloured = shown.count("line-through"), shown.count("background:#") - 1
    assert coloured == sum(row.example.keep_mask)
    assert struck == sum(row.example.response_mask or ()) - coloured
    with pytest.raises(IndexError, match="legal: 0 to 8"):
        sstoken.load(place / "masked").row(9)


def test_a_sequence_of_rows(place: Path) -> None:
    tokens = sstoken.load(str(place / "tokens"))
    assert [row.example.example_id for row in tokens] == [f"e{n}" for n in range(9)]
    assert [row.example.row for row in tokens[2:8:3]] == [2, 5]
    assert "9 rows" in repr(tokens)
    with pytest.raises(UsageError, match="a folder of scores"):
        sstoken.load(place / "scores" / "base")


def test_rows_by_text_and_by_surprise(place: Path) -> None:
    assert choose(place / "masked", 5, "ANSWER 7", "row") == [7]
    assert choose(place / "masked", 3, "answer", "row") == [0, 1, 2]
    ranked = choose(place / "tokens", 9, None, "surprise")
    assert sorted(ranked) == list(range(9))
    assert choose(place / "tokens", 2, None, "surprise") == ranked[:2]
    with pytest.raises(SstokenError, match="no row holds 'xyz'"):
        choose(place / "masked", 1, "xyz", "row")


def test_signals_by_name(place: Path) -> None:
    (values,) = signal_values(place / "masked", [6], "base.loss").values()
    wanted = tables.read_table(place / "scores/base" / tables.part_name(1))["loss"][2].as_py()
    assert values == wanted
    with pytest.raises(UsageError, match=r"legal: rel, attention, base\.loss, base\.entropy, score"):
        signal_values(place / "masked", [6], "rank")
