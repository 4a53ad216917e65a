"""The wheel holds the three folders under one name, and a user's own files of those names stay theirs."""

import subprocess
import sys

import pytest

from tests.support import ROOT

PROGRAM = """
import pipeline, stages
assert pipeline.MINE and stages.MINE
import sstoken.pipeline.api, sstoken.stages.encode
assert {place!r} in sstoken.pipeline.api.__file__
assert {place!r} in sstoken.stages.encode.__file__
"""


@pytest.mark.slow
def test_a_wheel_beside_files_of_the_same_names(tmp_path):
    wheels, place, own = tmp_path / "wheels", tmp_path / "installed", tmp_path / "own"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT], check=True, timeout=600)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", place, wheel], check=True, timeout=600)
    assert {path.name for path in place.iterdir()} - {"bin"} == {"sstoken", wheel.name[:13] + ".dist-info"}
    assert (place / "sstoken" / "py.typed").is_file()
    for name in ("page.html", "page.css", "page.js"):
        assert (place / "sstoken/stages/report/page" / name).is_file()
    own.mkdir()
    for name in ("pipeline", "stages"):
        (own / f"{name}.py").write_text("MINE = True\n")
    (own / "program.py").write_text(PROGRAM.format(place=str(place)))
    environment = {"PYTHONPATH": str(place)}
    subprocess.run([sys.executable, "program.py"], check=True, cwd=own, env=environment, timeout=600)
    methods = [sys.executable, "-m", "sstoken.pipeline", "methods"]
    done = subprocess.run(methods, cwd=own, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "sstoken" in done.stdout
