"""`compare` against counting in plain Python, and what it refuses."""

import json
from pathlib import Path

import polars as pl
import pytest

from sstoken import curate
from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline.printing import print_comparison
from sstoken.stages.report.token_classes import CLASSES
from tests.pipeline.worlds import CommandLine, World


@pytest.fixture(scope="module")
def folders(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compare")
    made = {"sstoken": {}, "rel": {"method": "rel"}, "class": {"method": "random", "rho": 0.3}}
    return {
        name: curate.select(tokens=world.tokens, scores=world.scores, out=root / name, **fields).folder
        for name, fields in made.items()
    }


def flat(folder: Path) -> list[tuple[str, int, float, bool]]:
    """Example, token id, place in the response in [0, 1), kept: of each response token."""
    rows = []
    for row in pl.read_parquet(folder / "part-*.parquet").iter_rows(named=True):
        inside = [i for i, r in enumerate(row["response_mask"]) if r]
        rows += [
            (row["example_id"], row["input_ids"][i], n / len(inside), row["keep_mask"][i])
            for n, i in enumerate(inside)
        ]
    return rows


def test_the_figures_are_those_of_counting(folders: dict[str, Path]) -> None:
    facts = curate.compare([*folders.values()], examples=3)
    assert [(p["first"], p["second"]) for p in facts["pairs"]] == [
        ("sstoken", "rel"),
        ("sstoken", "class"),
        ("rel", "class"),
    ]
    for pair in facts["pairs"]:
        a, b = flat(folders[pair["first"]]), flat(folders[pair["second"]])
        kept = [(x[3], y[3]) for x, y in zip(a, b, strict=True)]
        n, both = len(kept), sum(x and y for x, y in kept)
        only = sum(x and not y for x, y in kept), sum(y and not x for x, y in kept)
        assert facts["response_tokens"] == n
        assert (pair["only_first"], pair["only_second"]) == only
        assert pair["jaccard"] == pytest.approx(both / (both + sum(only)))
        share_a, share_b = sum(x for x, _ in kept) / n, sum(y for _, y in kept) / n
        chance = share_a * share_b + (1 - share_a) * (1 - share_b)
        assert pair["kappa"] == pytest.approx(((n - sum(only)) / n - chance) / (1 - chance))
        differing = [0] * 10
        for (_, _, place, x), (*_, y) in zip(a, b, strict=True):
            differing[int(place * 10 + 1e-9)] += x != y
        assert differing != [0] * 10
        by_tenth = {row["tenth"]: row["only_first"] + row["only_second"] for row in pair["by_tenth"]}
        assert [by_tenth.get(t, 0) for t in range(10)] == differing
        assert sum(row["tokens"] for row in pair["by_class"]) == n
        assert {row["class"] for row in pair["by_class"]} <= set(CLASSES)
        examples = {}
        for (name, *_, x), (*_, y) in zip(a, b, strict=True):
            examples.setdefault(name, []).append(x != y)
        worst = max(sum(d) / len(d) for d in examples.values())
        listed = pair["by_example"]["most_different"]
        assert len(listed) == 3
        assert listed[0]["differ"] == pytest.approx(worst)
        assert sum(examples[listed[0]["example_id"]]) / len(examples[listed[0]["example_id"]]) == worst


def test_a_mask_agrees_with_itself(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    facts = curate.compare([folders["rel"], f"again={folders['rel']}"])
    [pair] = facts["pairs"]
    assert (pair["jaccard"], pair["kappa"], pair["only_first"], pair["only_second"]) == (1.0, 1.0, 0, 0)
    assert pair["by_example"]["most_different"] == []
    print_comparison(facts | {"pairs": [pair | {"kappa": -1e-9}]})
    assert "kappa 0.000;" in capsys.readouterr().out


def test_the_command_prints_and_gives_json(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cli = CommandLine(capsys)
    given = ["compare", *map(str, folders.values())]
    assert json.loads(cli.works(*given, "--json"))["pairs"][0]["first"] == "sstoken"
    text = cli.works(*given)
    assert "sstoken and rel: Jaccard 0." in text
    assert "differ by class:" in text


def test_what_cannot_be_compared(world: World, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name two or more"):
        curate.compare([folders["rel"]])
    with pytest.raises(UsageError, match="two masked datasets are called 'rel'; name one of them: NAME="):
        curate.compare([folders["rel"], folders["rel"]])
    with pytest.raises(SstokenError, match="not a masked dataset"):
        curate.compare([folders["rel"], world.tokens])
    with pytest.raises(SstokenError, match=r"not a masked dataset \(no part-"):
        curate.compare([folders["rel"], tmp_path])
    lean = curate.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "lean", lean=True).folder
    with pytest.raises(SstokenError, match="without --lean"):
        curate.compare([folders["rel"], lean])
