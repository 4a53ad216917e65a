"""The README's commands, those of further pages and every verb's example run as they are printed."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from sstoken.pipeline.cli import VERBS, cli
from tests import documented
from tests.support import PATIENCE, ROOT

README = documented.text_of(documented.README)
NEEDS_THE_HUB = ("pull",)
"""tests/pipeline/hub runs them; here there is no network, which they have to say."""
STAND_INS = {
    "Qwen/Qwen3-0.6B": "runs/demo/base",
    "tokenised/": "runs/export-axolotl",
    "rows.jsonl": "my.jsonl",
}
"""What pages name and nobody has here, and what takes its place."""


def run_page(page, folder):
    """Run what a page prints and `documented.ELSEWHERE` does not except; return how many pieces that are."""
    run = [piece for piece in documented.pieces(page) if piece.runs]
    for piece in run:
        text = piece.text
        for name, here in STAND_INS.items():
            text = text.replace(name, here)
        if piece.language == "bash":
            shell(text, folder)
        else:
            program(text, folder)
    return len(run)


def example(verb):
    command = cli.get_command(click.Context(cli), verb)
    found = re.search(r"Example:\n\s+(sstoken-curate .*)", command.help)
    assert found, f"{verb} has no example"
    return found[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with what a clone has, and the demo run in it."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shell("sstoken-curate demo", folder)
    rows = (folder / "runs/demo/data.jsonl").read_text().splitlines(keepends=True)
    (folder / "my.jsonl").write_text("".join(rows[:20]))
    (folder / ".models").mkdir()
    (folder / ".models/smollm2").symlink_to("../runs/demo/base")  # the real one takes minutes
    return folder


def shell(command, folder):
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def program(text, folder):
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, f"{text}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
@pytest.mark.parametrize("page", documented.RUN)
def test_a_page_runs_as_written_after_the_readme(clone, page):
    assert run_page(page, clone)


@pytest.mark.parametrize("page", documented.pages())
def test_each_block_is_run_or_says_why_not(page):
    used = set()
    for piece in documented.pieces(page):
        assert piece.language in (*documented.PROGRAMS, "text"), (
            f"{page}: a block without its language: {piece.text}"
        )
        if piece.language in documented.PROGRAMS and not piece.runs:
            why = piece.excepted
            assert why is not None, f"{page}: nothing runs {piece.text!r}; see tests/documented.py"
            used.add(why)
            if re.fullmatch(r"tests/\S+\.py", why):
                assert (ROOT / why).is_file(), why
    listed = documented.ELSEWHERE.get(page, {})
    assert used == set(listed.values()), f"{page}: what is excepted is no longer there"


@pytest.mark.parametrize("page", documented.pages())
def test_each_command_has_the_options_that_its_verb_has(page):
    for piece in documented.pieces(page):
        if not piece.text.startswith("sstoken-curate ") or piece.language != "bash":
            continue
        words = shlex.split(piece.text.partition(" > ")[0], comments=True)[1:]
        command = cli.get_command(click.Context(cli), words[0])
        assert command is not None, piece.text
        command.make_context(words[0], words[1:])  # refuses what it does not have


def test_the_readme_outgrows_a_machine_as_the_page_does():
    """tests/ray runs the page's first block."""
    commands = [piece.text for piece in documented.pieces("scale.md")][:4]
    assert commands[-1] == "ray stop"
    section = README.partition("## Outgrow your machine\n")[2].partition("\n## ")[0]
    assert len(section.strip().splitlines()) <= 20
    for command in commands:
        assert f"\n{command}\n" in section


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"- {page.name}\n" in menu, page.name


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
def test_the_example_of_each_verb_runs_as_printed(clone):
    (clone / "mine.yaml").unlink(missing_ok=True)  # `init` writes over nothing, and the README's has made it
    for verb in VERBS:  # in the order in which each finds what it reads
        if verb == "layers":  # what its help says to do before
            shell(
                f"{example('score')} --signal attention@0 --signal attention@-1".replace(
                    "/scores", "/layers"
                ),
                clone,
            )
        if verb in NEEDS_THE_HUB:
            shell(f"{example(verb)} 2>&1 | grep '^error: HF_HUB_OFFLINE is set'", clone)
        else:
            shell(example(verb), clone)


def test_the_readme_names_every_verb():
    for verb in VERBS:
        assert f"`{verb}`" in README, verb


def test_the_readme_points_at_what_is_there():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_pages_point_at_what_is_there():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
def test_the_notebook_runs_after_the_demo(clone):
    cells = json.loads((ROOT / "examples/look_at_a_mask.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in code[:-1]), "it is kept executed"
    program = "\n".join("".join(cell["source"]) for cell in code)
    program += "\nassert '<script' not in masked.row(3)._repr_html_()"
    program += "\nassert facts['signals'][:2] == ['rel', 'attention']"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=clone, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (clone / "runs/rho.svg").is_file()
