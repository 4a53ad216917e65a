"""Methods of other packages, by entry point; and docs/methods.md."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sstoken.errors import SstokenError
from sstoken.methods import METHODS, get_method, registry
from sstoken.methods.listing import page
from tests.support import PATIENCE

DOCS = Path(__file__).parents[2] / "docs/methods.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)


def install(folder: Path, module: str, project: str) -> None:
    """What an installer leaves of a package: its module and its entry points."""
    about = tomllib.loads(project)["project"]
    (folder / f"{about['name']}.py").write_text(module)
    info = folder / f"{about['name']}-{about['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n"
    )
    lines = [f"{k} = {v}" for k, v in about["entry-points"]["sstoken.methods"].items()]
    (info / "entry_points.txt").write_text("[sstoken.methods]\n" + "\n".join(lines) + "\n")


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    paths = [str(folder), *(p for p in sys.path if p)]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


VERB = "from sstoken.pipeline.cli import main; main({})"


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    install(tmp_path, blocks("python")[0], blocks("toml")[0])
    listed = run(tmp_path, VERB.format(["methods", "--json"]))
    assert listed.returncode == 0, listed.stderr
    [facts] = [m for m in json.loads(listed.stdout) if m["name"] == "surprise"]
    assert facts["signals"] == ["current.loss", "current.entropy"]
    assert facts["roles"] == ["current"]
    assert facts["parameters"][0]["range"] == "0 < rho <= 1"
    decided = run(
        tmp_path,
        "import numpy as np; from sstoken.methods import decide\n"
        "signals = {'current.loss': np.array([3.0, 1.0, 2.0]), 'current.entropy': np.array([2.5, 2.0, 0.0])}\n"
        "print(decide('surprise', np.array([0, 3]), signals, rho=0.3).keep.tolist())",
    )
    assert decided.stdout == "[False, False, True]\n", decided.stderr


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Install a module as the docs' example package, for this process."""

    def forget() -> None:
        sys.modules.pop("surprise", None)
        registry._found.cache_clear()
        registry._installed.cache_clear()

    with pytest.MonkeyPatch.context() as patch:

        def add(module: str) -> None:
            install(tmp_path, module, blocks("toml")[0])
            patch.syspath_prepend(tmp_path)
            forget()

        yield add
    forget()


def test_methods_of_a_package_come_after_ours(installed: Callable[[str], None]) -> None:
    ours = list(METHODS)
    installed(f"{blocks('python')[0]}\nMETHOD = [METHOD]")
    assert list(METHODS) == [*ours, "surprise"]
    assert [m.name for m in registry.own_methods()] == ours
    assert get_method("surprise").family == "examples"
    assert registry.broken_entry_points() == []


BROKEN = [
    ("import no_such_module", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
    ("METHOD = 3", "is no Method, nor a list of them"),
    ("METHOD = [3]", "is no Method, nor a list of them"),
    ("raise ValueError('a\\nb')", "cannot be imported (ValueError: a b)"),
]


@pytest.mark.parametrize(("module", "message"), BROKEN)
def test_a_broken_package_is_one_line_and_hides_no_other_method(
    module: str, message: str, installed: Callable[[str], None]
) -> None:
    ours = list(METHODS)
    installed(module)
    line = (
        f"method 'surprise' of entry point 'surprise:METHOD' {message}; "
        "mend or uninstall the package that offers it"
    )
    assert list(METHODS) == ours == [m.name for m in registry.own_methods()]
    assert registry.broken_entry_points() == [line]
    with pytest.raises(SstokenError) as raised:
        get_method("surprise")
    assert str(raised.value) == line


def test_the_command_line_names_a_broken_package(tmp_path: Path) -> None:
    module, message = BROKEN[-1]
    install(tmp_path, module, blocks("toml")[0])
    listed = run(tmp_path, VERB.format(["methods", "--json"]))
    assert listed.returncode == 0, listed.stderr
    assert len(json.loads(listed.stdout)) > 30
    assert message in listed.stderr
    assert listed.stderr.count("\n") == 1
    out = str(tmp_path / "out")
    selected = ["select", "--tokens", "t", "--scores", "s", "--out", out, "--method", "surprise"]
    asked = run(tmp_path, VERB.format(selected))
    assert asked.returncode == 1
    assert message in asked.stderr
    assert asked.stderr.count("\n") == 1


def test_a_name_that_is_taken(installed: Callable[[str], None]) -> None:
    ours = list(METHODS)
    installed("from sstoken.methods import rank\nMETHOD = rank.METHODS[0]")
    assert list(METHODS) == ours
    assert registry.broken_entry_points() == [
        "method 'ranktuner' of an installed package has the name of one here; rename it"
    ]


def test_the_page_is_current() -> None:
    written = DOCS.read_text()
    assert written == page(written), "write it again: python -m sstoken.methods.listing"


def test_the_page_names_every_policy_option() -> None:
    text = DOCS.read_text()
    assert all(f"--{name}" in text for name in ("scope", "budget", "pool", "protect", "example"))
    assert all(f"### {name}\n" in text for name in ("sstoken", "eaft-axolotl", "p-q"))
