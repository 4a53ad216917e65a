"""Every figure of the quality benchmark's pages has an interval that a kept result of the command beside it has."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.quality.page import told_apart
from benchmarks.quality.settings import STUDIES, read_study

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "quality" / "results"
PAGES = (ROOT / "benchmarks" / "README.md", ROOT / "docs" / "choosing.md")
NUMBER = r"[-+]?\d+(?:\.\d+)?"
INTERVAL = re.compile(
    rf"({NUMBER})(?: (%|points)| nats a token| nats)?\** \(({NUMBER})(?: %)? to ({NUMBER})(?: %)?\)"
)
COMMAND = re.compile(r"python benchmarks/quality ([a-z][\w-]*)")
LINK = re.compile(r"\]\([^)]*\)")
SETTINGS = {"0.4", "0.5", "0.6", "0.7", "0.8", "2.75", "95 %"}
"""What may stand alone: rho, gamma, chance, millions of parameters, the level of the intervals."""


@cache
def intervals(study):
    """Every [value, low, high] of a result, wherever it stands in it."""
    found = []

    def walk(node):
        if isinstance(node, dict):
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            if len(node) == 3 and all(isinstance(x, float) for x in node):
                found.append(tuple(node))
            else:
                for value in node:
                    walk(value)

    walk(json.loads((RESULTS / f"{study}.json").read_text(encoding="utf-8")))
    return found


def is_kept(given, unit, study):
    """Whether a result has these three numbers, rounded as they are; a difference may be turned round."""
    factor = 100 if unit else 1
    digits = [len(text.partition(".")[2]) for text in given]

    def same(three):
        return all(
            abs(factor * x - float(t)) <= 0.5001 * 10**-d
            for x, t, d in zip(three, given, digits, strict=True)
        )

    return any(same((v, a, b)) or same((-v, -b, -a)) for v, a, b in intervals(study))


def unwrapped(text):
    """A paragraph or a list's item on one line; tables, headings and code as they are."""
    return re.sub(r"(?<!\n)\n *(?![ \n|#]|- |```)", " ", text)


def sections(text):
    """Lines by heading; what stands before the second one may cite every study of the page."""
    parts = re.split(r"^(?=##+ )", text, flags=re.M)
    return [(part, COMMAND.findall(part) or COMMAND.findall(text)) for part in parts]


def problems(text):
    """What is wrong with a page, one line a figure."""
    found = []
    for part, studies in sections(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        for line in part.splitlines():
            row = re.match(r"\| `([\w-]+)` \|", line)
            own = [row[1]] if row and (STUDIES / f"{row[1]}.yaml").exists() else studies
            for match in INTERVAL.finditer(line):
                value, unit, low, high = match.groups()
                if not any(is_kept((value, low, high), unit, study) for study in own):
                    found.append(f"in no result of {', '.join(own)}: {match[0]}")
            rest = LINK.sub("]", re.sub(r"`[^`]*`", "", INTERVAL.sub("", line)))
            alone = re.findall(r"(?<![\w.])(\d+(?:\.\d+)? %|\d+\.\d+)", rest)
            found += [f"no interval: {number} in {line}" for number in alone if number not in SETTINGS]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_figure_has_an_interval_and_a_command(page):
    text = page.read_text(encoding="utf-8")
    assert not problems(unwrapped(text))
    for study in COMMAND.findall(text):
        assert (STUDIES / f"{study}.yaml").exists(), study
        assert (RESULTS / f"{study}.json").exists(), study


def test_the_check_of_the_pages_finds_what_is_wrong():
    study = "noisy-families"
    value, low, high = intervals(study)[0]
    good = f"## One\nGains {value:.3f} ({low:.3f} to {high:.3f}). `python benchmarks/quality {study}`\n"
    assert not problems(good)
    assert problems(good.replace(f"{value:.3f}", f"{value + 0.002:.3f}"))
    assert problems(good.replace(f"({low:.3f} to {high:.3f})", ""))
    assert problems(good.replace(study, "found-gsm8k"))
    assert problems(good.replace("Gains", "For 42 %, gains"))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_is_of_the_study_as_it_stands(path):
    study, figures = read_study(path.stem), json.loads(path.read_text(encoding="utf-8"))
    assert list(figures["methods"]) == [method.key for method in study.methods]
    assert figures["seeds"] == sorted(
        list(seed.model_dump(exclude_none=True).values()) for seed in study.seeds
    )
    assert figures["command"].split()[-1] in (path.stem, "--quick")
    assert {"torch", "transformers"} <= set(figures["versions"])
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert figures["command"] in page
    if len(figures["seeds"]) < 5:
        assert "nothing here is a claim" in page


def test_the_readme_repeats_what_is_kept():
    text = unwrapped((ROOT / "README.md").read_text(encoding="utf-8"))
    studies = [path.stem for path in RESULTS.glob("*.json")]
    found = INTERVAL.findall(text)
    assert found
    assert len(found) == len(re.findall(rf"{NUMBER} to {NUMBER}\)", text)), "an interval without its value"
    for value, unit, low, high in found:
        assert any(is_kept((value, low, high), unit, study) for study in studies), (value, low, high)


def test_the_small_table_is_of_one_run_within_its_time():
    lines = (RESULTS / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    [run] = [run for run in map(json.loads, lines) if run["command"] == "python benchmarks/quality"]
    assert run["cores"] == 2
    assert run["seconds"] < 90 * 60
    minutes, of_cpu = (f"{run[name] / 60:.0f} minutes" for name in ("seconds", "cpu_seconds"))
    assert f"{minutes} ({of_cpu} of CPU time)" in unwrapped(PAGES[0].read_text(encoding="utf-8"))
    table = (RESULTS / "small-table.md").read_text(encoding="utf-8")
    for text in ("(4, 4, 4)", run["versions"]["torch"], f"`{run['command']}`"):
        assert text in table


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_what_holds_for_all_methods_at_once_holds_for_each(path):
    for figures in json.loads(path.read_text(encoding="utf-8"))["methods"].values():
        own = {"full": figures["loss"]["all"], **figures.get("loss_less", {})}
        for reference, (value, low, high) in figures["at_once"].items():
            assert value == own[reference][0]
            assert low <= own[reference][1] <= own[reference][2] <= high


def test_the_table_of_every_method_is_that_of_its_result():
    methods = json.loads((RESULTS / "every-method.json").read_text(encoding="utf-8"))["methods"]
    for group, names in told_apart(methods, "full").items():
        [row] = re.findall(rf"^\| {group} \| (.*) \|$", PAGES[1].read_text(encoding="utf-8"), re.M)
        for cell, how in zip(row.split("|"), ("published ", "in-loop "), strict=True):
            own = [name.removeprefix(how) for name in names if name.startswith(how)]
            assert re.findall(r"`([^`]+)`", cell) == own, (group, how)


def test_worst_is_told_from_random():
    told = {
        path.stem: figures["methods"]["worst 0.6 global protected"]["loss_less"]["random 0.6 protected"]
        for path in RESULTS.glob("*.json")
        if "worst 0.6 global protected" in (figures := json.loads(path.read_text()))["methods"]
    }
    assert {"noisy-families", "weak-base"} <= {study for study, (_, low, _) in told.items() if low > 0}


def test_sources_of_variance_are_apart():
    of_methods = json.loads((RESULTS / "variance.json").read_text(encoding="utf-8"))["variance"]
    assert set(of_methods["full"]) >= {"data", "noise", "order", "all"}
    assert "drawn" in of_methods["random 0.6 protected"]
    assert all(source["runs"] >= 5 for method in of_methods.values() for source in method.values())
    assert of_methods["full"]["drawn"]["sd"][0] == 0, "more differed than the mask of `random`"
