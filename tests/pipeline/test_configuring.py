"""`init`, the schema for editors, and what the shell completes."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from sstoken.curate import completion
from sstoken.errors import UsageError
from sstoken.pipeline.config import RunConfig, load_config
from sstoken.pipeline.schema import schema
from sstoken.pipeline.sections import KINDS
from tests.pipeline.worlds import CommandLine, World
from tests.support import PATIENCE, ROOT

PUBLISHED = ROOT / "docs" / "sstoken.schema.json"
CONFIGS = sorted([*(ROOT / "configs").rglob("*.yaml")])


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capfd)


@pytest.fixture(scope="module")
def checker() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


# The schema


def test_the_published_schema_is_current(cli: CommandLine) -> None:
    assert json.loads(PUBLISHED.read_text()) == schema(), "sstoken-curate schema > docs/sstoken.schema.json"
    assert json.loads(cli.works("schema")) == schema()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_configurations_of_the_repository_are_valid_and_name_it(
    config: Path, checker: jsonschema.Draft202012Validator
) -> None:
    checker.validate(yaml.safe_load(config.read_text()))
    if config.parent.name == "slurm":  # written by `run --dry-run`, for machines
        return
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", config.read_text())
    assert named is not None
    assert (config.parent / named[1]).resolve() == PUBLISHED


GOOD: dict[str, Any] = {"out": "o", "encode": {"data": "d", "model": "m"}, "select": {"rho": 0.5}}
FITTING = {
    "plain": {},
    "an anchor without a model": {"anchor": {"epochs": 2}},
    "a section without anything": {"score": None},
    "a sweep": {"select": {"rho": [0.4, 0.6], "method": ["sstoken", "rel"]}},
    "parameters": {"select": {"method": "t3s", "params": {"alpha": [1, 2]}}},
    "checkpoints by name": {"score": {"checkpoints": {"a": "x", "b": "y"}, "signals": ["loss", "entropy"]}},
}
WRONG = {
    "a misspelled key": {"select": {"rhoo": 0.5}},
    "a value out of range": {"anchor": {"epochs": 0}},
    "an unknown choice": {"anchor": {"schedule": "wavy"}},
    "a number where a text belongs": {"encode": {"data": 3, "model": "m"}},
    "no data": {"encode": {"model": "m"}},
    "steps beside encode": {"steps": {"a": {"stage": "encode", "data": "d", "model": "m"}}},
    "an unknown section": {"selection": {}},
    "a section that is a list": {"select": [1]},
}


@pytest.mark.parametrize("case", FITTING)
def test_takes_what_the_configuration_takes(
    case: str, checker: jsonschema.Draft202012Validator, tmp_path: Path
) -> None:
    values = {**copy.deepcopy(GOOD), **FITTING[case]}
    checker.validate(values)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    assert isinstance(load_config(tmp_path / "c.yaml"), RunConfig)


@pytest.mark.parametrize("case", WRONG)
def test_refuses_what_the_configuration_refuses(
    case: str, checker: jsonschema.Draft202012Validator, tmp_path: Path
) -> None:
    values = {**copy.deepcopy(GOOD), **WRONG[case]}
    assert not checker.is_valid(values)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError):
        load_config(tmp_path / "c.yaml")


def test_every_stage_and_field_is_in_it_with_a_description() -> None:
    definitions = schema()["$defs"]
    for kind, section in KINDS.items():
        properties = definitions[f"{kind}_step"]["properties"]
        assert set(properties) == {"stage", *section.model_fields}
        assert all(field.get("description") for field in properties.values()), kind


# init


def test_init_writes_a_configuration_that_plans(
    world: World, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "mine.jsonl"
    data.write_text(world.data.read_text() + '{"question": "w1"}\n')
    out = cli.works("init", "--data", "mine.jsonl", "--model", world.base, "--file", "deep/run.yaml")
    text = (tmp_path / "deep" / "run.yaml").read_text()
    assert text in out
    assert "25 rows were looked at: 24 examples of the layout qa (columns question, answer)" in text
    assert "the tokenizer has no chat template" in text
    assert "1 cannot be used (" in text
    assert "data: ../mine.jsonl" in text
    assert json.loads((tmp_path / "deep" / "sstoken.schema.json").read_text()) == schema()
    jsonschema.validate(yaml.safe_load(text), schema())
    planned = cli("plan", "deep/run.yaml")
    assert "not run yet" in planned.out
    assert "line 25: no answer" in planned.err, "what run would refuse"
    error = cli.fails(2, "init", "--data", "none.jsonl", "--model", "none", "--file", "deep/run.yaml")
    assert "exists already; name another with --file" in error


def test_every_setting_that_init_comments_out_is_legal(
    world: World, cli: CommandLine, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    cli.works("init", "--data", world.data, "--model", world.base, "--file", file)
    text = re.sub(r"^  # (\w+: )", r"  \1", file.read_text(), flags=re.MULTILINE)
    text = re.sub(r"^# (anchor:|  \w+: )", r"\1", text, flags=re.MULTILINE)
    found = yaml.safe_load(text)
    assert found["anchor"]["lora_rank"] == 16
    assert found["select"]["protect"] == ["end_of_turn"]
    assert found["encode"]["max_length"]
    jsonschema.validate(found, schema())


def test_what_init_writes_runs(world: World, cli: CommandLine, tmp_path: Path) -> None:
    file, out = tmp_path / "run.yaml", tmp_path / "run"
    cli.works("init", "--data", world.data, "--model", world.base, "--file", file, "--out", out)
    printed = cli.works("run", file)
    assert "kept " in printed
    assert (out / "masked" / "manifest.json").is_file()


def test_init_ends_in_one_line_where_encode_would(world: World, cli: CommandLine, tmp_path: Path) -> None:
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"text_a": "x", "text_b": "y"}\n')
    out = tmp_path / "run.yaml"
    assert "match no known layout" in cli.fails(
        1, "init", "--data", strange, "--model", world.base, "--file", out
    )
    assert "no such" in cli.fails(
        2, "init", "--data", tmp_path / "no.jsonl", "--model", world.base, "--file", out
    )
    assert not out.exists()


# Completion


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["export", "--to", "ax"], {"axolotl"}),
        (["select", "--method", "pm"], {"pmi-band"}),
        (["score", "--signal", "attent"], {"attention", "attention_predicting"}),
        (["sc"], {"score", "schema"}),
        (["anchor", "--schedule", "co"], {"constant", "cosine"}),
    ],
)
def test_the_shell_completes(
    words: list[str], completed: set[str], cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_SSTOKEN_CURATE_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(["sstoken-curate", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    found = cli().out.splitlines()
    assert {line.partition(",")[2] for line in found} == completed


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_that_the_shell_reads(shell: str, cli: CommandLine, tmp_path: Path) -> None:
    script = cli.works("completion", shell)
    assert script == completion(shell) + "\n"
    assert f"_SSTOKEN_CURATE_COMPLETE={shell}_complete" in script
    if (found := shutil.which(shell)) is None:
        pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(script)
    subprocess.run([found, "-n", tmp_path / "script"], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_by_the_script(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(cli.works("completion", "bash"))
    program = tmp_path / "sstoken-curate"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sstoken.pipeline "$@"\n')
    program.chmod(0o755)
    typed = (
        "source script; COMP_WORDS=(sstoken-curate export --to ax); COMP_CWORD=3; "
        '$(complete -p sstoken-curate | sed "s/.*-F \\([^ ]*\\).*/\\1/") sstoken-curate; echo "${COMPREPLY[*]}"'
    )
    done = subprocess.run(
        ["bash", "-c", typed],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout == "axolotl\n", done.stderr


def test_another_shell_is_refused(cli: CommandLine) -> None:
    assert "'bash', 'zsh', 'fish'" in cli.fails(2, "completion", "tcsh")
    with pytest.raises(UsageError, match="no completion for 'tcsh'; legal: bash, zsh, fish"):
        completion("tcsh")
