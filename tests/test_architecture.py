"""Imports run one way: pipeline -> stages -> sstoken; stages and verbs stand alone; help loads nothing heavy."""

import ast
import re
import subprocess
import sys

import pytest

from tests.support import ROOT

LAYERS = ["sstoken", "sstoken.stages", "sstoken.pipeline"]
"""From the lowest up; each its own folder at the root."""
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


DOORS = ["sstoken/__init__.py", "sstoken/curate.py"]
"""What users import from the lowest layer's folder though it leads to the highest: nothing else may import it."""


def files(layer):
    """Its modules; the links in `sstoken/` to the other two are not followed."""
    found = (ROOT / layer.rpartition(".")[2]).rglob("*.py")
    return sorted(path for path in found if path.relative_to(ROOT).as_posix() not in DOORS)


def layer_of(module):
    return max((layer for layer in LAYERS if f"{module}.".startswith(f"{layer}.")), key=len, default=None)


def path_of(module):
    """The file of a module of ours; None where the name is of something in a module."""
    parts = module.removeprefix("sstoken.").split(".") if layer_of(module) != "sstoken" else module.split(".")
    for path in (ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py")):
        if path.is_file():
            return path
    return None


def stages():
    """The modules that define a stage: a class that is given a folder's name."""
    for path in files("sstoken.stages"):
        classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        for node in classes:
            fields = {
                field.target.id for field in node.body if isinstance(field, ast.AnnAssign) and field.value
            }
            if {"name", "folder"} <= fields:
                yield "sstoken." + ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    for path in files(layer):
        wrong = {name for name in imported(path) if layer_of(name) in above}
        assert not wrong, f"{path} imports {wrong}"


def helpers_of(path):
    """A test file with the helper modules of the tests that it imports, directly or not."""
    reached, queue = set(), [path]
    while queue:
        path = queue.pop()
        if path not in reached:
            reached.add(path)
            for name in imported(path):
                helper = ROOT.joinpath(*name.split(".")).with_suffix(".py")
                if name.startswith("tests.") and helper.is_file():
                    queue.append(helper)
    return reached


@pytest.mark.parametrize("layer", LAYERS[:-1])
def test_the_tests_of_a_layer_import_nothing_from_above(layer):
    above = LAYERS[LAYERS.index(layer) + 1 :]
    folders = tuple(f"tests.{other.rpartition('.')[2]}." for other in above)
    tests = sorted((ROOT / "tests" / layer.rpartition(".")[2]).rglob("*.py"))
    assert tests
    for test in tests:
        for path in helpers_of(test):
            names = set(imported(path))
            wrong = {name for name in names if layer_of(name) in above or f"{name}.".startswith(folders)}
            assert not wrong, f"{test} imports {wrong} by {path}"


def test_stages_are_found():
    found = {module.rpartition(".")[2] for module in stages()}
    assert {"encode", "anchor", "score", "select", "export", "publication"} <= found


@pytest.mark.parametrize("stage", sorted(set(stages())))
def test_a_stage_never_imports_another(stage):
    reached, queue = set(), [stage]
    while queue:
        module = queue.pop()
        if module not in reached and layer_of(module) == "sstoken.stages" and (path := path_of(module)):
            reached.add(module)
            queue += imported(path)
    assert not reached & (set(stages()) - {stage})


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "sstoken" else ("sstoken", *parts))


def imported_modules(path):
    """Our modules that a file imports or imports names from; of `from package import module`, the module alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if path_of(name) else node.module for name in names)


def test_no_circles():
    """Imports inside functions and for types count, too, and so do those of a package from its modules."""
    edges = {}
    for layer in LAYERS:
        for path in files(layer):
            names = {name for name in imported_modules(path) if layer_of(name) and path_of(name)}
            edges[module_of(path)] = names - {module_of(path)}  # what runs as __main__ imports itself
    while leaves := {module for module, names in edges.items() if not names & set(edges)}:
        edges = {module: names for module, names in edges.items() if module not in leaves}
    assert not edges


EXAMPLES = re.findall(
    r"^\| [^|]+ \| (\d+): [^|]+ \| `([0-9a-f]{7,})`",
    (ROOT / "docs/architecture.md").read_text(),
    re.MULTILINE,
)
"""The number of files that a row of docs/architecture.md promises, and the commit that it shows."""


def test_the_page_shows_commits():
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize(("number", "commit"), EXAMPLES)
def test_an_example_commit_touches_as_many_files_as_its_row_says(number, commit):
    command = ["git", "show", "--format=", "--name-only", commit, "--", "sstoken", "stages", "pipeline"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("no git here")
    if done.returncode != 0:
        pytest.skip(f"the history here lacks {commit}")
    assert len(done.stdout.split()) == int(number)


def test_no_file_is_too_long_to_read():
    for layer in LAYERS:
        for path in files(layer):
            assert len(path.read_text().splitlines()) <= 350, path


def test_the_method_does_no_input_or_output():
    for path in files("sstoken"):
        names = {name.partition(".")[0] for name in imported(path)}
        assert not names & {"pyarrow", "polars", "datasets", "pathlib", "os", "io", "json"}, path


def test_transformers_is_imported_where_its_attention_interface_or_cache_is_used():
    with_transformers = [
        path.name
        for path in files("sstoken")
        if any(name.partition(".")[0] == "transformers" for name in imported(path))
    ]
    assert set(with_transformers) == {
        "attention_function.py",
        "capture.py",
        "generation.py",
        "packed.py",
        "trainer.py",
    }


def test_what_never_ran_on_a_gpu_is_imported_where_it_is_asked_for():
    for layer in LAYERS:
        for path in files(layer):
            names = set(imported(path, at_start_only=True))
            apart = path.is_relative_to(ROOT / "sstoken/measure/cuda")
            assert apart or not any(name.startswith("sstoken.measure.cuda") for name in names), path


def test_heavy_libraries_are_imported_where_they_are_used():
    allowed = {
        "hf.py",
        "base_models.py",
        "vllm_attention.py",
        "history.py",
        "resumable.py",
        "token_dataset.py",
        "weighted.py",
    }
    for package in LAYERS[1:]:
        for path in files(package):
            names = {name.partition(".")[0] for name in imported(path, at_start_only=True)}
            assert path.name in allowed or not names & HEAVY, path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["encode", "--help"], ["select", "--help"], ["plan", "--help"]]
)
def test_help_loads_neither_torch_nor_transformers(arguments):
    code = f"""
import sys
from sstoken.pipeline.cli import main
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
