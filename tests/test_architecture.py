"""Imports run one way: pipeline -> stages -> sstoken; stages and verbs stand alone; help loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["sstoken", "stages", "pipeline"]
STAGES = {"encode", "anchor", "score", "select", "export"}
HEAVY = {"torch", "transformers", "datasets", "trl", "peft", "vllm", "ray"}


def imported(path, *, at_start_only=False):
    """The modules that a file names in its imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_start_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", LAYERS)
def test_imports_run_one_way(package):
    above = set(LAYERS[LAYERS.index(package) + 1 :])
    for path in files(package):
        wrong = {name for name in imported(path) if name.partition(".")[0] in above}
        assert not wrong, f"{path} imports {wrong}"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_never_imports_another(stage):
    reached, queue = set(), [f"stages.{stage}"]
    while queue:
        module = queue.pop()
        if module in reached:
            continue
        reached.add(module)
        path = ROOT / (module.replace(".", "/") + ".py")
        if not path.is_file():
            path = ROOT / module.replace(".", "/") / "__init__.py"
        if path.is_file():
            queue += [name for name in imported(path) if name.startswith("stages.")]
    others = {f"stages.{other}" for other in STAGES - {stage}}
    assert not reached & others


def test_the_method_does_no_input_or_output():
    for path in files("sstoken"):
        names = {name.partition(".")[0] for name in imported(path)}
        assert not names & {"pyarrow", "polars", "datasets", "pathlib", "os", "io", "json"}, path


def test_transformers_is_imported_where_its_attention_interface_is_used():
    with_transformers = [
        path.name
        for path in files("sstoken")
        if any(name.partition(".")[0] == "transformers" for name in imported(path))
    ]
    assert set(with_transformers) == {"attention.py", "packed.py", "trainer.py"}


def test_heavy_libraries_are_imported_where_they_are_used():
    allowed = {
        "attention.py",
        "losses.py",
        "hf.py",
        "base_models.py",
        "vllm_attention.py",
        "history.py",
        "resumable.py",
        "token_dataset.py",
    }
    for package in ("stages", "pipeline"):
        for path in files(package):
            names = {name.partition(".")[0] for name in imported(path, at_start_only=True)}
            assert path.name in allowed or not names & HEAVY, path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["encode", "--help"], ["select", "--help"], ["plan", "--help"]]
)
def test_help_loads_neither_torch_nor_transformers(arguments):
    code = f"""
import sys
from pipeline.cli import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert stop.code == 0, stop.code
loaded = {HEAVY!r} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Usage: sstoken-curate" in done.stdout


def test_the_smallest_import_of_the_method_is_light():
    code = "import sys, sstoken; assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
