"""What goes to PyPI: the README without dead links, one version everywhere, files that parse."""

import re
import runpy
import subprocess
import sys
import tarfile
import tomllib

import pytest
import yaml

from sstoken.version import __version__
from tests.support import PATIENCE, ROOT

RELATIVE = re.compile(r"\]\((?!https?:)")
readme_for_pypi = runpy.run_path(str(ROOT / "setup.py"))["readme_for_pypi"]


def test_pypi_gets_no_relative_link_or_picture():
    readme = (ROOT / "README.md").read_text()
    assert RELATIVE.search(readme)  # else there is nothing to test
    given = readme_for_pypi(readme)
    assert not RELATIVE.search(given)
    for target in re.findall(r"(?<!!)\[[^]]*\]\((?!https?:)([^)#]+)", readme):
        assert target in given, target
    assert re.findall(r"\]\(https?:[^)]*\)", given) == re.findall(r"\]\(https?:[^)]*\)", readme)


def test_links_are_written_out():
    text = "![A picture](docs/a.svg)\n\nSee [docs/a.md](docs/a.md), [how](docs/b.md#c), [web](https://example.org/a)."
    assert readme_for_pypi(text) == "See docs/a.md, how (docs/b.md), [web](https://example.org/a)."


def test_citation_and_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_lowest_versions_are_those_that_are_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    allowed = dict(
        dependency.split(">=") for dependency in [*project["dependencies"], *extras["lora"], *extras["trl"]]
    )
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert tested.pop("torch") == "2.13.0"
    del allowed["torch"]
    assert tested == allowed


def test_an_install_of_minutes_says_so_first():
    """pip is quiet: each environment that make sets up is announced before it is made."""
    makefile = (ROOT / "Makefile").read_text()
    before = re.findall(r"^(.*)\n\t\$\(PYTHON\) -m venv ", makefile, re.MULTILINE)
    assert len(before) == 4
    for line in before:
        assert re.fullmatch(r"\t@echo 'installing .* into .*: minutes, and .* of disk.*'", line), line


def test_issue_templates_are_forms():
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert templates
    for path in templates:
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= set(form), path
        ids = [part["id"] for part in form["body"]]
        assert len(ids) == len(set(ids)), path


@pytest.mark.slow
def test_the_source_distribution_is_complete(tmp_path):
    build = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=ROOT, check=True, timeout=PATIENCE)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
        described = files.extractfile(f"{archive.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()
    assert {
        "docs/data.md",
        "configs/demo.yaml",
        "CHANGELOG.md",
        "sstoken/stages/score.py",
        "setup.py",
    } <= names
    assert not any(name.startswith("tests/") for name in names)
    assert "Description-Content-Type: text/markdown" in described
    assert not RELATIVE.search(described)
