"""The README's commands, those of further pages and every verb's example run as they are printed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from sstoken.pipeline.cli import VERBS, cli
from tests.support import PATIENCE, ROOT

README = (ROOT / "README.md").read_text()
NOT_HERE = ("make ", "pip install ", "ray ")
"""They set up what these tests run in; CI runs the make targets themselves."""
NEEDS_THE_HUB = ("pull",)
"""tests/pipeline/hub runs them; here there is no network, which they have to say."""


PAGES = ("choosing.md", "critical-tokens.md", "faq.md", "report.md", "runs.md")
"""Pages of docs/ whose commands go on from the README's."""
PROGRAMS = ("api.md",)
"""Pages whose Python does."""
RUN_ELSEWHERE = {
    "audit.md": "tests/stages/auditing, with datasets in memory",
    "in-loop.md": "tests/sstoken/in_loop/test_recipe.py",
    "methods.md": "tests/sstoken/test_third_party.py",
    "scale.md": "tests/pipeline/test_slurm.py, test_ranks.py, tests/ray",
    "storage.md": "tests/pipeline/test_object_stores.py, against a server here",
    "vllm.md": "tests/vllm, in an environment of its own",
}
"""Pages with programs or commands that other tests run."""
NEEDS_YOUR_OWN = (
    "runs/good-tokens",
    "runs/reference",
    "history=ref",
    "configs/self-evolving.yaml",
    "engine=ray",
)
"""Data that a clone does not have; what takes long or needs a cluster, and has a test of its own."""


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run_commands(text, folder):
    """Run a page's commands, but those that need something else, and return how many they are."""
    lines = [line for block in blocks("bash", text) for line in block.strip().splitlines()]
    lines = [
        line
        for line in lines
        if not line.startswith(NOT_HERE) and not any(own in line for own in NEEDS_YOUR_OWN)
    ]
    for line in lines:
        shell(line, folder)
    return len(lines)


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


def run_programs(text, folder):
    programs = blocks("python", text)
    assert programs
    for program in programs:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, f"{program}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
def test_the_readme_runs_as_written(clone):
    assert run_commands(README, clone)
    run_programs(README, clone)


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
@pytest.mark.parametrize("page", PROGRAMS)
def test_a_page_of_programs_runs_after_the_readme(clone, page):
    run_programs((ROOT / "docs" / page).read_text(), clone)


def test_every_page_with_commands_is_run():
    found = {
        page.name
        for page in (ROOT / "docs").glob("*.md")
        if blocks("bash", page.read_text()) or blocks("python", page.read_text())
    }
    assert found == {*PAGES, *PROGRAMS, *RUN_ELSEWHERE}


def test_the_readme_outgrows_a_machine_as_the_page_does():
    """tests/ray runs the page's first block."""
    assert blocks("bash", (ROOT / "docs" / "scale.md").read_text())[0] in blocks("bash")


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"- {page.name}\n" in menu, page.name


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_as_written_after_the_readme(clone, page):
    assert run_commands((ROOT / "docs" / page).read_text(), clone) > 1


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
    run_programs((ROOT / "docs/report.md").read_text(), clone)
