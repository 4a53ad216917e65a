"""The demo end to end, at a small size, and the classes that its table counts."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from sstoken.errors import UsageError
from sstoken.pipeline.demo.data import KINDS, generate
from sstoken.pipeline.demo.model import build_model
from sstoken.pipeline.demo.run import (
    CLASSES,
    METHODS,
    PRETRAINED_METHODS,
    SMOLLM2,
    place_of,
    run_demo,
    token_classes,
)

SIZES = {"num_base": 24, "num_pipeline": 24}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    out = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO(), width=100)
    found = run_demo(out, console=console, **SIZES)
    return out, found, console.file.getvalue()  # type: ignore[attr-defined]


def test_finds_a_share_for_every_method_and_class(demo: tuple[Path, dict[str, Any], str]) -> None:
    _, found, _ = demo
    assert list(found["kept"]) == list(METHODS)
    assert all(found["tokens"][kind] > 0 for kind in CLASSES)
    total = sum(found["tokens"].values())
    for method, shares in found["kept"].items():
        kept = sum(shares[kind] * found["tokens"][kind] for kind in CLASSES)
        assert set(shares) == set(CLASSES)
        if method == "full":
            assert kept == pytest.approx(total)
        else:  # ceil(rho n) of each example
            assert 0.6 * total - 1e-6 <= kept < 0.6 * total + SIZES["num_pipeline"]


def test_prints_the_table_three_examples_and_what_was_planted(demo: tuple[Path, dict[str, Any], str]) -> None:
    out, found, text = demo
    assert f"{found['kept']['sstoken']['boilerplate']:.1%}" in text
    assert text.count("response tokens (") == 3
    assert text.count("planted: ") == 3
    assert f"sstoken-curate show {out / 'masked-sstoken'}" in text


def test_running_again_does_nothing_and_finds_the_same(demo: tuple[Path, dict[str, Any], str]) -> None:
    out, found, _ = demo
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert run_demo(out, console=Console(file=io.StringIO()), **SIZES) == found
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_refuses_a_folder_that_is_not_its_own(demo: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds the demo of seed 0"):
        run_demo(demo[0], seed=1)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty, and not a demo"):
        run_demo(tmp_path)


def test_token_classes_cover_the_planted_text_and_nothing_else(tmp_path: Path) -> None:
    examples = list(generate(300, 5))
    build_model(tmp_path, examples[:100], seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for example in examples:
        encoded = tokenizer.apply_chat_template(
            list(example.messages), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, response = encoded["input_ids"], [bool(m) for m in encoded["assistant_masks"]]
        classes = token_classes(tokenizer, example, ids, response)
        assert [kind is not None for kind in classes] == response
        for kind in KINDS:
            planted = [
                example.messages[n.message]["content"][n.start : n.end]
                for n in example.noise
                if n.kind == kind
            ]
            found = tokenizer.decode([i for i, c in zip(ids, classes, strict=True) if c == kind])
            planted, found = [text.replace(" ", "") for text in planted], found.replace(" ", "")
            if kind == "wrong":  # a token can reach over the edge of a wrong value
                assert all(text in found for text in planted)
            else:
                assert "".join(planted) == found


def test_building_the_model_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    examples = list(generate(30, 0))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        build_model(tmp_path / name, examples, seed=3)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "model.safetensors" in files
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in files)


def test_with_a_model_nothing_is_trained(demo: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    found = run_demo(tmp_path / "own", console=console, num_pipeline=12, model=str(demo[0] / "base"))
    assert list(found["kept"]) == list(PRETRAINED_METHODS)
    assert found["kept"]["full"]["content"] == 1
    assert all(found["tokens"][kind] > 0 for kind in CLASSES)
    assert not (tmp_path / "own" / "history").exists()
    assert "The last two columns" not in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="holds the demo of seed 0 with "):
        run_demo(tmp_path / "own", model="smollm2")


def test_smollm2_is_the_local_copy_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_of("smollm2") == SMOLLM2
    assert place_of("mine") == "mine"
    (tmp_path / ".models" / "smollm2").mkdir(parents=True)
    (tmp_path / ".models" / "smollm2" / "config.json").write_text("{}")
    assert place_of("smollm2") == ".models/smollm2"
