"""A person's way through the page of a report, in a real browser."""

import json
import re
from typing import Any

import pytest

from tests.browser.conftest import CONVERSATIONS, EVIL, FAMILY, SIZES
from tests.stages.report.small_folders import TOKENIZER

pytestmark = pytest.mark.browser
COLOURED = ".text .t.dropped:is(.s0, .s1, .s2, .s3, .s4, .s5, .s6)"


def examples(page: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(page.locator("#data").text_content())["examples"]
    return found


def rows(page: Any) -> list[int]:
    """Rows in the list, in the order of the list."""
    return [
        int(text.split()[1]) for text in page.locator("#list .facts span:first-child").all_text_contents()
    ]


def test_examples_are_shown_as_they_are(visit: Any) -> None:
    page = visit()
    assert page.locator("#heading").text_content().startswith("Row 0 ")
    whole = "".join(f"{asked}{answer}<eos>" for asked, answer in CONVERSATIONS[0])
    assert page.locator(".text").text_content() == whole
    units = page.locator(".text .t").all_text_contents()
    assert FAMILY in units
    assert "e\u0301" in units
    selected = page.evaluate(
        "(getSelection().selectAllChildren(document.querySelector('.text')), String(getSelection()))"
    )
    assert selected == whole
    assert page.locator(".text").get_attribute("dir") == "auto"


def test_dropped_tokens_are_struck_and_kept_ones_coloured(visit: Any) -> None:
    page = visit()
    (example,) = [e for e in examples(page) if e["row"] == 4]
    page.locator('#list button[data-example="4"]').click()
    kept = page.locator(".text .t.kept").count()
    assert kept == sum(k == "1" for k in example["keep"][0])
    assert page.locator(".text s.t.dropped").count() == example["response"].count("1") - kept
    line = "getComputedStyle(document.querySelector('.text .t.dropped')).textDecorationLine"
    assert page.evaluate(line) == "line-through"
    page.locator("#strike").uncheck()
    assert page.evaluate(line) == "none"
    assert page.locator(COLOURED).count() == 0
    page.locator("#all").check()
    assert page.locator(COLOURED).count() == page.locator(".text .t.dropped").count()


def test_every_signal_colours(visit: Any) -> None:
    page = visit()
    names = page.locator("#colour option").evaluate_all("all => all.map(o => o.value)")
    assert names == ["score", "keep", "weight", "rel", "attention"] + [
        f"{c}.{n}" for c in ("base", "step-2") for n in ("loss", "entropy", "rank")
    ]
    painted = set()
    for name in names:
        page.locator("#colour").select_option(name)
        painted.add(tuple(page.locator(".text .t").evaluate_all("all => all.map(t => t.className)")))
        assert page.locator("#legend").text_content()
    assert len(painted) == len(names)


def test_search_filters_and_marks(visit: Any) -> None:
    page = visit()
    page.locator("#search").fill("שלום")
    assert rows(page) == [1]
    assert page.locator("#heading").text_content().startswith("Row 1 ")
    assert page.evaluate("CSS.highlights.get('found').size") == 1
    page.locator("#search").fill("nowhere")
    assert rows(page) == []
    assert page.locator("#found").text_content() == "0 of 12 examples"
    page.locator("#search").fill("e11")
    assert rows(page) == [11]


def test_kept_share_filters_and_orders(visit: Any) -> None:
    page = visit()
    share = {e["row"]: e["kept"][0] for e in examples(page)}
    page.locator("#sort").select_option("low")
    assert [share[r] for r in rows(page)] == sorted(share.values())
    middle = round(100 * sorted(share.values())[6])
    page.locator("#low").fill(str(middle))
    assert set(rows(page)) == {r for r, s in share.items() if 100 * s >= middle - 0.5}
    page.locator("#high").fill(str(middle))
    assert set(rows(page)) == {r for r, s in share.items() if abs(100 * s - middle) <= 0.5}


def test_the_most_surprising_come_first(visit: Any) -> None:
    page = visit()
    surprise = {e["row"]: e["surprise"] for e in examples(page)}
    page.locator("#sort").select_option("surprise")
    values = [surprise[r] for r in rows(page)]
    assert values == sorted(values, reverse=True)
    assert page.locator("#heading").text_content().startswith(f"Row {rows(page)[0]} ")


def test_a_token_tells_what_was_recorded(visit: Any) -> None:
    page = visit()
    example = examples(page)[0]
    first = example["response"].index("1")
    page.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    details = page.locator("#details")
    assert details.locator(".what").text_content() == example["text"][first]
    names = details.locator("tr:not(.group) th").all_text_contents()
    values = details.locator("tr td:nth-child(2)").all_text_contents()
    cells = dict(zip(names, values, strict=True))
    assert cells["id"] == str(example["ids"][first])
    assert cells["mask"] == ("kept" if example["keep"][0][first] == "1" else "dropped")
    assert float(cells["score"]) == pytest.approx(example["score"][0][0], rel=1e-3)
    assert float(cells["REL (nats)"]) == pytest.approx(example["signals"]["rel"][0], rel=1e-3)
    assert example["text"][first] in page.locator("#spoken").text_content()
    page.keyboard.press("ArrowRight")
    assert details.locator(".what").text_content() == example["text"][first + 1]
    page.keyboard.press("End")
    assert details.locator(".what").text_content() == "<eos>"
    page.keyboard.press("Escape")
    assert details.locator(".what").count() == 0
    page.locator(".text .t", has_text=FAMILY).hover()
    parts = details.locator(".state").all_text_contents()
    assert parts[0] == f"part 1 of {len(TOKENIZER(FAMILY).input_ids)} of this character"


def test_keys(visit: Any) -> None:
    page = visit()
    page.keyboard.press("j")
    assert page.locator("#heading").text_content().startswith("Row 1 ")
    page.keyboard.press("k")
    assert page.locator("#heading").text_content().startswith("Row 0 ")
    page.keyboard.press("c")
    assert page.locator("#colour").input_value() == "keep"
    page.keyboard.press("d")
    assert not page.locator("#strike").is_checked()
    page.keyboard.press("/")
    page.keyboard.type("jcd")
    assert page.locator("#search").input_value() == "jcd"
    page.locator("#search").fill("")
    page.locator(".keys summary").click()
    page.locator("#shortcuts").uncheck()
    page.locator(".text").focus()
    page.keyboard.press("j")
    assert page.locator("#heading").text_content().startswith("Row 0 ")


def test_a_script_in_the_data_is_text(visit: Any) -> None:
    page = visit(more="#row-2")
    assert page.locator("#heading").text_content().startswith("Row 2 ")
    assert EVIL in page.locator(".text").text_content()
    assert page.locator(".text script, .text img").count() == 0


def test_links_open_their_example(visit: Any) -> None:
    page = visit()
    link = page.locator(".ngrams a").last
    row = link.text_content()
    link.click()
    heading = re.compile(rf"^{row}\b", re.IGNORECASE)
    page.locator("#heading", has_text=heading).wait_for()  # the page follows its address a little later


def test_folders_stand_side_by_side(visit: Any) -> None:
    page = visit("two")
    assert page.locator(".pane h4").all_text_contents()[0].startswith("ours")
    texts = page.locator(".text").all_text_contents()
    assert texts[0] == texts[1]
    example = examples(page)[0]
    differ = [
        i
        for i, r in enumerate(example["response"])
        if r == "1" and example["keep"][0][i] != example["keep"][1][i]
    ]
    assert page.locator(".pane").nth(0).locator(".t.differs").count() > 0
    assert page.locator(".pane").nth(0).locator(".t.differs").count() <= len(differ)
    page.locator("#differ").uncheck()
    assert page.locator(".t.differs").count() == 0
    page.locator("#sort").select_option("differ")
    share = {e["row"]: e["differ"] for e in examples(page)}
    assert [share[r] for r in rows(page)] == sorted(share.values(), reverse=True)
    page.goto(page.url + "#row-1")
    page.locator(".pane h4", has_text="does not have this example").wait_for()
    assert "does not have this example" in page.locator(".pane h4").nth(1).text_content()


def test_the_theme_follows_the_system_until_it_is_chosen(visit: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = visit(), visit(scheme="dark")
    colours = light.evaluate(ground), dark.evaluate(ground)
    assert colours[0] != colours[1]
    light.locator("#theme").click()
    assert light.evaluate(ground) == colours[1]
    assert light.locator("#theme").get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_nobody_is_kept_out(visit: Any, size: str, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    for name in ("one", "two", "tokens") if size == "desktop" else ("two",):
        page = visit(name, size, scheme)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
        page.locator(".made summary").click()
        page.locator(".text").first.focus()
        page.keyboard.press("ArrowRight")
        found = axe.Axe().run(page).response["violations"]
        grave = [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]
        assert grave == []


def test_a_phone_shows_the_token_beside_the_text(visit: Any) -> None:
    page = visit(size="phone")
    page.locator(".text .t.kept").first.click()
    token, details = page.locator(".text .t.now").bounding_box(), page.locator("#details").bounding_box()
    assert token["y"] + token["height"] <= details["y"]
    page.locator("#details .close").click()
    assert not page.locator("#details").is_visible()
