"""`from sstoken import curate`: as a user's program sees it, in a folder that holds files called as our packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """\
from sstoken import curate
from sstoken.pipeline import api

result = curate.select(tokens="t", scores="s", out="o", method="random", rho=0.4)
print(result.folder, result.skipped)
curate.score(tokens="t", checkpoints=["a", "b"], out="o", listener=lambda name, result: None)
api.anchor(tokens="t", model="m", out="o", epochs=2)
steps = curate.run("run.yaml", overrides=["select.rho=0.4"])
print(steps["select"].metrics)
"""
WRONG = {
    'curate.select(tokens="t", scores="s", out="o", gama=3)': 'did you mean "gamma"?',
    'curate.select(tokens="t", scores="s", out="o", gamma="high")': 'expected "float"',
    'curate.select(scores="s", out="o")': 'Missing named argument "tokens"',
    'curate.encode(data="d", model="m", out="o", format="chatml")': 'Argument "format"',
    'curate.run("run.yaml", untl="score")': 'Unexpected keyword argument "untl"',
    'curate.score(tokens="t", checkpoints=["a"], out="o").metrix': 'no attribute "metrix"',
    "curate.frobnicate()": 'no attribute "frobnicate"',
}
"""A line, and what mypy has to say of it."""
CONFIG = """\
[mypy]
[mypy-torch.*,numpy.*,transformers.*,pyarrow.*,datasets.*,click.*,huggingface_hub.*,rich.*]
follow_imports = skip
"""
"""Only for speed: what our signatures do not mention."""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    for name in ("pipeline.py", "stages.py"):
        (tmp_path / name).write_text("raise RuntimeError('this is not sstoken')\n")
    return tmp_path


def python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_mypy_knows_every_argument(hostile: Path) -> None:
    pytest.importorskip("mypy")
    (hostile / "mypy.ini").write_text(CONFIG)
    (hostile / "program.py").write_text(PROGRAM + "\n".join(WRONG) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "program.py"],
        cwd=hostile,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    found = dict(line.split(": error: ", 1) for line in done.stdout.splitlines() if ": error: " in line)
    first = len(PROGRAM.splitlines()) + 1
    assert set(found) == {f"program.py:{first + i}" for i in range(len(WRONG))}, done.stdout
    for line, expected in zip(
        sorted(found, key=lambda at: int(at.split(":")[1])), WRONG.values(), strict=True
    ):
        assert expected in found[line]


def test_it_is_loaded_when_it_is_used(hostile: Path) -> None:
    heavy = "{'torch', 'transformers', 'pydantic', 'pyarrow', 'numpy', 'click'} & set(sys.modules)"
    code = f"""
import sys
from sstoken import curate
from sstoken.pipeline import api
assert api is curate
assert {{'anchor', 'encode', 'export', 'run', 'score', 'select'}} <= set(curate.__all__)
assert not {heavy}, {heavy}
for name in curate.__all__:
    assert getattr(curate, name).__doc__, name
assert 'torch' not in sys.modules
"""
    python(code, hostile)


def test_functions_describe_themselves(hostile: Path) -> None:
    code = """
import inspect
from sstoken import curate
for name in ("anchor", "encode", "export", "observed", "publish", "pull", "score", "select"):
    function = getattr(curate, name)
    signature = inspect.signature(function)
    assert function.__name__ == name
    assert all(p.kind is p.KEYWORD_ONLY for p in signature.parameters.values()), signature
    assert signature.return_annotation.__name__ == ("Published" if name == "publish" else "Result")
    for parameter in signature.parameters:
        assert f"    {parameter}: " in function.__doc__, (name, parameter)
    assert inspect.signature(curate.select).parameters["gamma"].default == 0.5
"""
    python(code, hostile)


def test_a_wrong_name_at_run_time_is_one_line(hostile: Path) -> None:
    code = """
from sstoken import UsageError, curate
try:
    curate.select(tokens="t", scores="s", out="o", gama=3)
except UsageError as error:
    print(error)
"""
    assert python(code, hostile) == "select: unknown key 'gama'; did you mean 'gamma'?\n"
