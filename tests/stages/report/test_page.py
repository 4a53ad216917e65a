"""The page as a file: complete in itself, small, and safe whatever the dataset says."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.report import examples
from sstoken.stages.report.drawing import FORMATS, save
from sstoken.stages.report.figures import charts, check_name, pick
from sstoken.stages.report.folders import open_folders
from sstoken.stages.report.page import TEMPLATES, write_page
from sstoken.stages.report.statistics import measure
from tests.stages.report.small_folders import (
    TOKENIZER,
    tokens_table,
    write_masked,
    write_signals,
    write_tokens,
)

EVIL = "</script><script>alert(1)</script><!-- {{ 7*7 }} & \u2028 <b onclick=x>\u202etxt"
CONVERSATIONS = [
    [(f"Question {n}: {EVIL}", f"Answer {n} é 🎉 👩‍👩‍👧 שלום {EVIL}")] for n in range(6)
] + [[("Hi ", "One"), ("More ", "Two and " * 30)]]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    tokens = write_tokens(folder / "tokens", [tokens_table(CONVERSATIONS)])
    for seed, name in enumerate(("base", "step-1")):
        write_signals(folder / "scores" / name, tokens, seed, "loss", "rank" if seed else "entropy")
    write_masked(folder / "masked", tokens, weight=True)
    write_masked(folder / "other", tokens, seed=1, drop=("e1",))
    write_masked(folder / "lean", tokens, lean=True)
    return folder


class Page(HTMLParser):
    """Elements, ids and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script" and data.strip():
            self.scripts.append(data)

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


@pytest.fixture(scope="module")
def page(place: Path) -> Page:
    facts = write_page({"masked": place / "masked", "the <other>": place / "other"}, place / "page.html")
    assert facts["shown"] == facts["examples"] == 7
    return Page((place / "page.html").read_text())


def test_it_loads_nothing(place: Path, page: Page) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
        assert tag not in ("link", "iframe", "object", "embed", "base")
    assert not re.search(r"url\((?!#)|@import", (place / "page.html").read_text())
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy


def test_text_of_the_dataset_makes_no_markup(page: Page) -> None:
    assert len(page.scripts) == len([t for t, _ in page.elements if t == "script"]) == 2
    assert not [a for t, a in page.elements if "onclick" in a]
    first = "".join(page.data["examples"][0]["text"])
    assert first.startswith(
        "Question 0: </script><script>alert(1)</script><!-- {{ 7*7 }} & \\u2028 <b onclick=x>\\u202etxt"
    )
    assert "e\u0301" not in first
    assert "é 🎉 👩‍👩‍👧 שלום" in first


def test_ids_are_unique_and_labels_lead_somewhere(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "for"):
            assert not attributes.get(name) or attributes[name] in ids
        if (attributes.get("href") or "").startswith("#") and not attributes["href"].startswith("#row-"):
            assert attributes["href"][1:] in ids
        if attributes.get("xlink:href", "#")[0] == "#" and attributes.get("xlink:href"):
            assert attributes["xlink:href"][1:] in ids


def test_examples_hold_what_was_recorded(page: Page, place: Path) -> None:
    for example in page.data["examples"]:
        size, inside = len(example["ids"]), example["response"].count("1")
        assert len(example["text"]) == len(example["response"]) == len(example["special"]) == size
        assert (
            "".join(example["text"]).count("<eos>")
            == example["special"].count("1")
            == example["ids"].count(TOKENIZER.eos_token_id)
        )
        assert all(len(bits) == size for bits in example["keep"] if bits)
        for values in (
            *example["signals"].values(),
            *filter(None, example["score"]),
            *filter(None, example["weight"]),
        ):
            assert len(values) == inside
        assert set(example["signals"]) == {
            "rel",
            "attention",
            "base.loss",
            "base.entropy",
            "step-1.loss",
            "step-1.rank",
        }
    (missing,) = [e for e in page.data["examples"] if e["id"] == "e1"]
    assert missing["keep"][1] is None
    assert missing["kept"][1] is None


def test_links_go_to_examples_on_the_page(page: Page) -> None:
    rows = {f"#row-{e['row']}" for e in page.data["examples"]}
    links = [a["href"] for t, a in page.elements if t == "a" and (a["href"] or "").startswith("#row-")]
    assert links
    assert set(links) <= rows


def test_long_examples_and_large_sets_stay_small(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "MOST_TOKENS", 60)
    monkeypatch.setattr(examples, "_BEFORE", 10)
    stats = measure(open_folders({"masked": place / "masked"}))
    whole = examples.gather(stats, {"random": [0, 3, 6], "flag": [5]})
    assert [e["row"] for e in whole] == [0, 3, 5, 6]
    for example in whole:
        assert len(example["ids"]) == 60
        assert "1" in example["response"]
        assert example["first"] + 60 <= example["tokens"]
    size = len(json.dumps(whole[0]))
    few = examples.gather(stats, {"flag": [5], "random": [0, 3, 6]}, budget=int(2.5 * size))
    assert [e["row"] for e in few] == [0, 5]


def test_the_same_data_give_the_same_bytes(place: Path) -> None:
    for name in ("a.html", "b.html"):
        write_page({"masked": place / "masked"}, place / name)
    assert (place / "a.html").read_bytes() == (place / "b.html").read_bytes()


def test_tokens_and_lean_folders_have_a_page(place: Path) -> None:
    facts = write_page({"tokens": place / "tokens"}, place / "tokens.html")
    assert facts["kept_share"] is None
    assert "Nothing has been selected yet" in (place / "tokens.html").read_text()
    facts = write_page({"lean": place / "lean"}, place / "lean.html")
    assert "lean" in facts["notes"][0]


def test_a_file_that_cannot_be_written_is_one_line(place: Path) -> None:
    with pytest.raises(SstokenError, match="cannot be written"):
        write_page({"masked": place / "masked"}, place / "page.html" / "x.html")


def test_every_figure_is_drawn_in_every_format(place: Path) -> None:
    stats = measure(open_folders({"a": place / "masked", "b": place / "other"}))
    found = charts(stats)
    assert {
        "positions",
        "classes",
        "density",
        "rho",
        "snapshots",
        "agreement",
        "histogram:score",
        "histogram:rel",
    } <= set(found)
    starts = {".svg": b"<?xml", ".pdf": b"%PDF", ".png": b"\x89PNG"}
    for name, ending in zip(found, FORMATS * 9, strict=False):
        for copy in "ab":
            save(found[name], place / f"{copy}{ending}")
        drawn = (place / f"a{ending}").read_bytes()
        assert drawn.startswith(starts[ending])
        assert drawn == (place / f"b{ending}").read_bytes(), name
    with pytest.raises(UsageError, match=r"no figure 'histogram:x'.*legal: positions, classes"):
        pick(stats, "histogram:x")
    with pytest.raises(UsageError, match="no figure 'x'; legal"):
        check_name("x", Path("x.svg"))
    with pytest.raises(UsageError, match=r"must end in \.svg"):
        check_name("rho", Path("x.jpg"))


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_every_text_has_the_contrast_of_wcag_aa(theme: int) -> None:
    css = (TEMPLATES / "page.css").read_text()
    of = {n: c for n, *c in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)}
    on_steps = re.search(r"\.d6 \{ color: light-dark\((#\w{6}), (#\w{6})\)", css)
    assert on_steps is not None
    steps = re.findall(r"\.[sd]\d \{ background: light-dark\((#\w{6}), (#\w{6})\)", css)
    assert len(steps) == 14
    for step in steps:
        assert contrast(step[theme], on_steps[theme + 1]) >= 4.5, step
    for text in ("ink", "muted", "link"):
        for ground in ("bg", "surface"):
            assert contrast(of[text][theme], of[ground][theme]) >= 4.5, (text, ground)
    lightness = [luminance(step[theme]) for step in steps[:7]]
    assert lightness == sorted(lightness, reverse=theme == 0), "told apart without any colour"
