"""The command line: help, options made from the stages' fields, output for people and for programs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel

from sstoken.pipeline.cli import VERBS
from sstoken.pipeline.cli import cli as entry
from sstoken.pipeline.cli_options import stage_options
from sstoken.pipeline.doctor import advice
from sstoken.stages import manifest as manifests
from sstoken.stages.anchor import Anchor
from sstoken.stages.encode import Encode
from sstoken.stages.export import Export
from sstoken.stages.hub.publication import Publication
from sstoken.stages.score import ScoreOptions
from sstoken.stages.select import Select
from sstoken.version import __version__
from tests.pipeline.small_run import PIPELINE, ROOT, environment
from tests.pipeline.worlds import CommandLine, World
from tests.support import messages

STAGES: dict[str, type[BaseModel]] = {
    "encode": Encode,
    "anchor": Anchor,
    "score": ScoreOptions,
    "select": Select,
}
OF_FIELDS = STAGES | {"export": Export, "publish": Publication}
"""The verbs whose options are made from fields."""


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capfd)


def command(verb: str) -> click.Command:
    found = entry.get_command(click.Context(entry), verb)
    assert found is not None
    return found


def option_names(parameter: click.Parameter) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


# Help


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom sstoken.pipeline.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'pyarrow', 'numpy', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert not [m for m in sys.modules if m.startswith('stages')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in VERBS)


def test_help_of_verbs_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom sstoken.pipeline.cli import VERBS, main\n"
        "for verb in VERBS:\n    try: main([verb, '--help'])\n    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'polars', 'matplotlib', 'fsspec'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("asked", [None, "mimalloc"])
def test_arrow_takes_its_memory_from_the_system_unless_told_otherwise(asked: str | None) -> None:
    code = (
        "from sstoken.pipeline.cli import main\n"
        "try: main(['methods'])\nexcept SystemExit as end: assert end.code == 0\n"
        "import pyarrow\nprint(pyarrow.default_memory_pool().backend_name)\n"
    )
    given = {name: value for name, value in environment().items() if name != "ARROW_DEFAULT_MEMORY_POOL"}
    if asked:
        given["ARROW_DEFAULT_MEMORY_POOL"] = asked
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (asked or "system")


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example(verb: str, flag: str, cli: CommandLine) -> None:
    printed = cli.works(verb, flag)
    example = printed.partition("Example:\n")[2].strip()
    assert example.startswith(f"sstoken-curate {verb}")


def test_the_examples_use_options_that_are() -> None:
    for verb in VERBS:
        text = (command(verb).help or "").partition("Example:\n")[2]
        known = {name for parameter in command(verb).params for name in option_names(parameter)}
        assert {word for word in text.split() if word.startswith("--")} <= known, verb


def test_a_verb_added_to_one_file_is_in_the_help_and_the_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the packages with a verb more in one file."""
    for name in ("sstoken", "pipeline", "stages"):
        shutil.copytree(
            ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    looking = tmp_path / "pipeline/verbs/looking.py"
    added = '''

def greet(whom: str) -> str:
    """Say hello."""
    return f"hello {whom}"


@command(greet, click.argument("whom"))
def _greet(whom: str) -> None:
    click.echo(greet(whom))
'''
    looking.write_text(looking.read_text().replace("__all__ = [", '__all__ = ["greet", ') + added)
    code = (
        "import sys\nfrom sstoken import curate\nassert curate.greet('you') == 'hello you'\n"
        "from sstoken.pipeline.cli import main\nmain(sys.argv[1:])"
    )
    for arguments, printed in ((["--help"], "greet Say hello."), (["greet", "me"], "hello me")):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment() | {"PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert printed in " ".join(done.stdout.split())


def test_without_a_verb(cli: CommandLine) -> None:
    outcome = cli()
    assert outcome.code == 2
    assert "Verbs:" in outcome.out
    assert cli.works("--version").strip().endswith(__version__)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("scor", "did you mean 'score'?"),
        ("encoder", "did you mean 'encode'?"),
        ("frobnicate", "legal: demo, run"),
    ],
)
def test_unknown_verbs(word: str, hint: str, cli: CommandLine) -> None:
    line = cli.fails(2, word)
    assert repr(word) in line
    assert hint in line


# Options


@pytest.mark.parametrize("verb", STAGES)
def test_every_field_is_a_documented_option(verb: str) -> None:
    options = {p.name: p for p in command(verb).params if isinstance(p, click.Option)}
    for name, field in STAGES[verb].model_fields.items():
        assert name in options
        assert options[name].required == field.is_required()
        about = " ".join((field.description or "?").split()).replace("None: ", "Default: ")
        assert about in (options[name].help or "")


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_does(verb: str) -> None:
    for option in command(verb).params:
        assert not isinstance(option, click.Option) or option.hidden or option.help, option.name


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_types_that_people_know(verb: str) -> None:
    known = {
        "TEXT",
        "INTEGER",
        "FLOAT",
        "INTEGER RANGE",
        "FLOAT RANGE",
        "NAME=VALUE",
        "STEP",
        "A.B=V",
        "M",
        "[NAME=]M",
        "NAME",
    }
    context = click.Context(command(verb))
    for parameter in command(verb).params:
        if isinstance(parameter, click.Option) and not parameter.is_flag:
            shown = parameter.make_metavar(context)
            assert shown in known or isinstance(parameter.type, click.Choice), (parameter.name, shown)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_default_and_bound(verb: str) -> None:
    context = click.Context(command(verb))
    shown = {
        p.name: " ".join((p.get_help_record(context) or ("", ""))[1].split()) for p in command(verb).params
    }
    for parameter in command(verb).params:
        default = parameter.default
        if isinstance(default, (int, float, str)) and not isinstance(default, bool):
            assert f"default: {default}" in shown[parameter.name]
    for name, field in OF_FIELDS[verb].model_fields.items() if verb in OF_FIELDS else ():
        if isinstance(field.default, bool):
            flag = name.replace("_", "-")
            assert f"[default: {flag if field.default else 'no-' + flag}" in shown[name]
        elif isinstance(field.default, (int, float, str)) and field.default != "":
            assert f"[default: {field.default}" in shown[name]
    if verb == "anchor":
        assert shown["data_workers"].endswith("[default: 0; x>=0]")
        assert shown["weight_decay"].endswith("[default: 0.0; x>=0]")
        assert shown["ema_decay"].endswith("[x>0; x<1]")
        assert shown["lora_dropout"].endswith("[default: 0.0; x>=0; x<1]")


@pytest.mark.parametrize("verb", OF_FIELDS)
def test_a_wrong_number_is_one_line_that_names_it(verb: str, cli: CommandLine) -> None:
    required = ["--ckpt", "x"] if verb == "score" else []
    for option in command(verb).params:
        if isinstance(option, click.Option) and option.required and not option.multiple:
            required += [
                option.opts[0],
                "trl" if option.name == "to" else "a/b" if option.name == "repo" else "x",
            ]
    if verb in ("export", "publish"):
        required.append("masked")
    numbers = 0
    for option in command(verb).params:
        name = option.name
        if name not in OF_FIELDS[verb].model_fields or option.type.name not in ("integer", "float"):
            continue
        numbers += 1
        line = cli.fails(2, verb, *required, option.opts[0], "many")
        assert f"'{option.opts[0]}'" in line
        assert "invalid literal" not in line
        assert "'many' is no " in line
        if "range" in str(option.make_metavar(click.Context(command(verb)))).lower():
            line = cli.fails(2, verb, *required, option.opts[0], "-1")
            assert f"{name} is -1" in line
            assert "legal is " in line
    assert numbers


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_shadows_another(verb: str) -> None:
    names = [name for parameter in command(verb).params for name in option_names(parameter)]
    assert len(names) == len(set(names))
    destinations = [parameter.name for parameter in command(verb).params]
    assert len(destinations) == len(set(destinations))


@pytest.mark.parametrize("verb", STAGES)
def test_defaults_are_the_stages_own(verb: str) -> None:
    """Only what was given reaches the stage."""
    required = {
        p.name: "x"
        for p in command(verb).params
        if isinstance(p, click.Option) and p.required and not p.multiple
    }
    arguments = [word for name, value in required.items() for word in (f"--{name}", value)]
    if verb == "score":
        arguments += ["--ckpt", "x"]
    context = command(verb).make_context(verb, arguments)
    fields = STAGES[verb].model_fields
    assert {n: v for n, v in context.params.items() if n in fields and v is not None} == {
        n: v for n, v in required.items() if n in fields
    }


@pytest.mark.parametrize(
    ("verb", "missing"),
    [
        ("encode", "--data"),
        ("encode", "--model"),
        ("anchor", "--model"),
        ("score", "--ckpt"),
        ("select", "--scores"),
        ("select", "--out"),
    ],
)
def test_required_options(verb: str, missing: str, cli: CommandLine) -> None:
    names = {o for p in command(verb).params if isinstance(p, click.Option) and p.required for o in p.opts}
    given = [word for name in sorted(names - {missing}) for word in (name, "x")]
    line = cli.fails(2, verb, *given)
    assert f"'{missing}'" in line
    assert f"{verb} --help" in line


def test_kinds_of_options() -> None:
    class Sample(BaseModel):
        many: dict[str, str] = {}
        flag: bool = True
        number: int | None = None

    seen: dict[str, Any] = {}

    @click.command()
    @stage_options(Sample)
    def sample(**values: Any) -> None:
        seen.update(values)

    sample(["--no-flag", "--many", "a=b=c", "--many", "d=e", "--number", "3"], standalone_mode=False)
    assert seen == {"many": {"a": "b=c", "d": "e"}, "flag": False, "number": 3}
    sample([], standalone_mode=False)
    assert seen == {"many": None, "flag": None, "number": None}


# Output


def test_json_is_one_object_and_nothing_else(world: World, cli: CommandLine, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"out: {tmp_path / 'run'}\nencode: {{data: {world.data}, model: {world.base}}}\n"
        f"score: {{checkpoints: {{a: {world.base}, b: {world.later}}}}}\n"
    )
    commands: list[tuple[object, ...]] = [
        ("encode", "--data", world.data, "--model", world.base, "--out", tmp_path / "tokens"),
        (
            "anchor",
            "--tokens",
            world.tokens,
            "--model",
            world.base,
            "--out",
            tmp_path / "h",
            "--max-steps",
            1,
        ),
        ("score", "--tokens", world.tokens, "--ckpt", world.base, "--out", tmp_path / "scores"),
        ("select", "--tokens", world.tokens, "--scores", world.scores, "--out", tmp_path / "masked"),
    ]
    for arguments in commands:
        for skipped in (False, True):
            facts = json.loads(cli.works(*arguments, "--json"))
            assert facts["skipped"] is skipped
            assert Path(facts["folder"]).is_dir()
    plan = json.loads(cli.works("plan", config, "--json"))
    assert [step["step"] for step in plan] == ["encode", "score/a", "score/b", "select"]
    found = json.loads(cli.works("run", config, "--json"))
    assert list(found) == ["encode", "score/a", "score/b", "select"]
    assert found["select"]["metrics"]["examples"] == 24
    assert {step["state"] for step in json.loads(cli.works("plan", config, "--json"))} == {"finished"}
    assert json.loads(cli.works("verify", tmp_path / "run", "--json"))["wrong"] == []
    assert json.loads(cli.works("methods", "--json"))[0]["method"] == "sstoken"
    assert json.loads(cli.works("doctor", "--json"))["sstoken"] == __version__


def test_json_of_a_failure_leaves_standard_output_empty(
    world: World, cli: CommandLine, tmp_path: Path
) -> None:
    outcome = cli(
        "encode", "--data", "nowhere.jsonl", "--model", world.base, "--out", tmp_path / "t", "--json"
    )
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")


def test_what_people_read(world: World, cli: CommandLine, tmp_path: Path) -> None:
    masked = tmp_path / "masked"
    select = ("select", "--tokens", world.tokens, "--scores", world.scores, "--out", masked)
    printed = cli.works(*select)
    assert printed.startswith(f"select: done, in {masked}\n")
    assert "kept 72 of 96 response tokens (75.0%)" in printed
    assert cli.works(*select) == f"select: finished already, in {masked}\n"
    assert "sstoken" in cli.works("methods")
    assert "w1" in cli.works("show", masked)


def test_options_given_several_times_are_a_sweep(world: World, cli: CommandLine, tmp_path: Path) -> None:
    masked = tmp_path / "masked"
    select = ("select", "--tokens", world.tokens, "--scores", world.scores, "--out", masked)
    printed = cli.works(*select, "--rho", 0.4, "--rho", 0.6, "--method", "rel", "--method", "loss")
    folders = [tmp_path / f"masked-rho-{rho}-method-{m}" for rho in (0.4, 0.6) for m in ("rel", "loss")]
    for folder in folders:
        assert f"done, in {folder}\n" in printed
    assert not masked.exists()
    assert json.loads((folders[0] / "manifest.json").read_text())["settings"]["rho"] == 0.4
    again = json.loads(cli.works(*select, "--rho", 0.4, "--rho", 0.6, "--method", "rel", "--json"))
    assert [Path(facts["folder"]).name for facts in again.values()] == ["masked-rho-0.4", "masked-rho-0.6"]
    thresholds = ("--method", "profit", "--param", "tau=0.1", "--param", "tau=0.2")
    assert "masked-tau-0.2" in cli.works(*select, *thresholds)
    made = set(tmp_path.iterdir())
    both = ("--method", "rel", "--method", "profit", "--rho", 0.3)
    assert "method 'profit' has no parameter 'rho'" in cli.fails(2, *select, *both)
    assert set(tmp_path.iterdir()) == made, "no combination is made where one is wrong"
    line = cli.fails(
        2, "encode", "--data", "d", "--model", "m", "--out", "o", "--column", "a=b", "--column", "a=c"
    )
    assert "'a' is given 2 times" in line


def test_run_says_what_it_replaces(world: World, cli: CommandLine, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"out: {tmp_path / 'run'}\nencode: {{data: {world.data}, model: {world.base}}}\n"
        f"score: {{checkpoints: {{a: {world.base}, b: {world.later}}}}}\n"
    )
    assert "replaced" not in cli.works("run", config)
    assert "select.rho 0.6 -> 0.4: runs again" in " ".join(
        cli.works("plan", config, "--set", "select.rho=0.4").split()
    )
    assert "replaced what was there: select.rho 0.6 -> 0.4" in cli.works(
        "run", config, "--set", "select.rho=0.4"
    )


def test_verify_says_every_problem(world: World, cli: CommandLine, tmp_path: Path) -> None:
    masked = tmp_path / "masked"
    cli.works("select", "--tokens", world.tokens, "--scores", world.scores, "--out", masked)
    assert cli.works("verify", tmp_path).endswith("1 finished folders checked, 0 problems\n")
    (masked / "part-00000.parquet").unlink()
    part = masked / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    outcome = cli("verify", tmp_path)
    assert outcome.code == 1
    assert messages(outcome.err) == []
    assert "part-00000.parquet: missing" in outcome.out
    assert "part-00001.parquet: content changed" in outcome.out
    assert outcome.out.endswith("2 problems\n")
    (masked / "manifest.json").write_text("{")
    outcome = cli("verify", tmp_path)
    assert outcome.code == 1
    assert "damaged manifest" in outcome.out
    assert "no finished work" in cli.fails(1, "verify", world.base)
    assert "no such folder" in cli.fails(2, "verify", "nowhere")


def test_a_tilde_is_the_home_folder(
    world: World, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells leave `--out=~/x` as it is, and a configuration has no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.tokens, tmp_path / "tokens")
    shutil.copytree(world.scores, tmp_path / "scores")
    shutil.copytree(world.base, tmp_path / "base")
    shutil.copyfile(world.data, tmp_path / "data.jsonl")
    cli.works("select", "--tokens=~/tokens", "--scores=~/scores", "--out=~/masked", "--method", "random")
    cli.works("show", "~/masked", "--svg=~/masked.svg")
    cli.works("verify", "~/masked")
    (tmp_path / "run.yaml").write_text(
        "out: ~/run\nencode: {data: ~/data.jsonl, model: ~/base}\nanchor: {max_steps: 1}\n"
    )
    cli.works("run", "~/run.yaml", "--until", "encode")
    cli.works("plan", "~/run.yaml")
    assert (tmp_path / "masked.svg").is_file()
    assert (tmp_path / "run" / "tokens" / "manifest.json").is_file()
    assert not (tmp_path / "~").exists()


def test_as_a_module_and_from_any_folder(world: World, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *PIPELINE,
            "select",
            "--tokens",
            world.tokens,
            "--scores",
            world.scores,
            "--out",
            "masked",
            "--json",
        ],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, messages(done.stderr)) == (0, [])
    assert json.loads(done.stdout)["folder"] == "masked"


def test_recommended_is_recorded_as_what_it_stands_for(
    world: World, cli: CommandLine, tmp_path: Path
) -> None:
    scores, given = tmp_path / "scores", ("--tokens", world.tokens, "--method", "recommended")
    line = cli.fails(1, "select", *given, "--scores", world.scores, "--out", tmp_path / "none")
    assert "method 'recommended (pmi-band)' needs history.loss_unconditional" in line
    signals = ("--signal", "loss", "--signal", "loss_unconditional")
    cli.works("score", "--tokens", world.tokens, "--ckpt", world.base, *signals, "--out", scores)
    select = ("select", "--tokens", world.tokens, "--scores", scores, "--out")
    printed = cli.works(*select, tmp_path / "short", "--method", "recommended")
    assert printed.startswith("recommended is short for --method pmi-band --protect end_of_turn: ")
    cli.works(*select, tmp_path / "long", "--method", "pmi-band", "--protect", "end_of_turn")
    short, long = (manifests.finished(tmp_path / name, "select") for name in ("short", "long"))
    assert short.fingerprint == long.fingerprint
    assert short.settings["method"] == "pmi-band"
    assert short.settings["protect"] == ["end_of_turn"]
    assert "·  recommended (pmi-band) rho " in cli.works("show", tmp_path / "short")
    card = (tmp_path / "short" / "README.md").read_text()
    assert "| method | pmi-band |" in card
    assert "| protect | " in card
    facts = json.loads(cli.works(*select, tmp_path / "short", "--method", "recommended", "--json"))
    assert facts["skipped"] is True


def test_a_run_measures_what_recommended_reads(world: World, cli: CommandLine, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"out: {tmp_path}/run\nencode: {{data: {world.data}, model: {world.base}, workers: 1}}\n"
        f"score: {{checkpoints: {{a: {world.base}, b: {world.later}}}}}\n"
        "select: {method: [recommended, sstoken]}\n"
    )
    found = json.loads(cli.works("run", config, "--json"))
    manifest = manifests.finished(tmp_path / "run" / "masked-method-recommended", "select")
    assert manifest.settings["method"] == "pmi-band"
    assert "select/method-sstoken" in found


@pytest.mark.parametrize(
    ("device", "bfloat16", "said"),
    [
        (
            "cpu",
            30.0,
            "multiplies it 3.0 times as fast as float32; it changes about 0.3 % of the keep decisions",
        ),
        ("cpu", 11.0, "keep float32"),
        ("cuda", 11.0, "--dtype bfloat16 is faster on this device"),
    ],
)
def test_doctor_says_when_bfloat16_is_worth_it(device: str, bfloat16: float, said: str) -> None:
    rates = {"float32": 10.0, "bfloat16": bfloat16}
    [line] = advice({"default_device": device, "devices": [{"device": "cpu", "gflops": rates}]})
    assert said in line


def test_doctor_measures_products(cli: CommandLine) -> None:
    facts = json.loads(cli.works("doctor", "--json"))
    assert all(rate > 0 for rate in facts["devices"][0]["gflops"].values())
    assert re.search(r"multiplies +float32 [\d.]+ GFLOP/s, bfloat16 [\d.]+ GFLOP/s", cli.works("doctor"))
