"""The wheel holds the three folders under one name, and a user's own files of those names stay theirs."""

import subprocess
import sys

import pytest

from tests.factories import save_model
from tests.support import PATIENCE, ROOT

PROGRAM = """
import pipeline, stages
assert pipeline.MINE and stages.MINE
import sstoken.pipeline.api, sstoken.stages.encode
assert {place!r} in sstoken.pipeline.api.__file__
assert {place!r} in sstoken.stages.encode.__file__
"""
COMMANDS = """
sstoken.pipeline methods
sstoken.pipeline init --data my.jsonl --model base --out run --file mine.yaml
sstoken.pipeline plan mine.yaml
sstoken.pipeline run mine.yaml
sstoken.pipeline show run/masked --row 2
sstoken.pipeline report run/masked --out report.html
sstoken.pipeline export run/masked --to trl --out export --check
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
    for name in ("pipeline", "stages", "methods", "tables", "config"):
        (own / f"{name}.py").write_text("raise SystemExit('the user\\'s own file was imported')\n")
    save_model(own / "base", positions=512)
    (own / "my.jsonl").write_text('{"question": "w1 w2", "answer": "w3 w4"}\n' * 8)
    for line in COMMANDS.strip().splitlines():
        command = [sys.executable, "-m", *line.split()]
        done = subprocess.run(
            command, cwd=own, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (own / "export" / "train.py").is_file()
