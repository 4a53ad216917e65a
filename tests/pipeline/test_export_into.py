"""`export --into`: the user's own trainer configuration, changed where it has to be and nowhere else."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sstoken.pipeline import api
from sstoken.stages import tables
from tests.pipeline.worlds import CommandLine, World
from tests.support import PATIENCE

AXOLOTL = """\
# my settings, tuned by hand
base_model: Qwen/Qwen3-0.6B   # the small one
load_in_8bit: false

datasets:
    - path: tatsu-lab/alpaca  # replaced
      type: alpaca
val_set_size: 0.0
sequence_len: {length}
sample_packing: yes
learning_rate: 2e-5           # not 1e-4!
special_tokens: {{pad_token: "<|pad|>"}}
"""
LLAMAFACTORY = """\
### model
model_name_or_path: Qwen/Qwen3-0.6B

### dataset
dataset: identity,alpaca_en_demo
template: qwen
cutoff_len: {length}
packing: true
neat_packing: true

### train
eval_strategy: steps
val_size: 0.1
learning_rate: 1.0e-4
"""
TRL = """\
# trl sft --config mine.yaml
model_name_or_path: Qwen/Qwen3-0.6B
dataset_name: trl-lib/Capybara
max_length: {length}          # tokens
eval_strategy: steps
assistant_only_loss: true
packing: true
"""
OWN = {"axolotl": AXOLOTL, "llamafactory": LLAMAFACTORY, "trl": TRL}
CHANGED = {
    "axolotl": {"datasets", "dataset_prepared_path", "tokenizer_config", "sequence_len"},
    "llamafactory": {
        "stage",
        "tokenized_path",
        "dataset",
        "cutoff_len",
        "remove_unused_columns",
        "packing",
        "neat_packing",
        "eval_strategy",
        "val_size",
    },
    "trl": {"dataset_name", "max_length", "eval_strategy", "assistant_only_loss"},
}
LENGTH = {"axolotl": "sequence_len", "llamafactory": "cutoff_len", "trl": "max_length"}
every_own = pytest.mark.parametrize("target", OWN)


@pytest.fixture(scope="module")
def masked(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("into") / "masked"
    return api.select(tokens=world.tokens, scores=world.scores, out=out, rho=0.5).folder


def values(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def longest(masked: Path) -> int:
    return max(
        len(ids) for part in tables.parts(masked) for ids in tables.read_table(part)["input_ids"].to_pylist()
    )


@every_own
def test_what_must_change_is_changed_and_the_rest_stays(
    target: str, masked: Path, cli: CommandLine, tmp_path: Path
) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(OWN[target].format(length=2))
    printed = cli.works("export", masked, "--to", target, "--out", tmp_path / "export", "--into", own)
    result = tmp_path / "mine-masked.yaml"
    assert own.read_text() == OWN[target].format(length=2)
    before, after = values(own), values(result)
    differing = {name for name in {**before, **after} if before.get(name) != after.get(name)}
    assert differing == CHANGED[target]
    assert after[LENGTH[target]] == longest(masked)
    text = result.read_text()
    for line in own.read_text().splitlines():
        key = line.partition(":")[0]
        if line.startswith("#") or (key in before and key not in CHANGED[target]):
            assert f"{line}\n" in text, line
    assert f"+{LENGTH[target]}: {longest(masked)}" in printed
    assert (
        "\n-    - path: tatsu-lab/alpaca" in printed or "\n-dataset" in printed or "\n+tokenized" in printed
    )
    assert f"written: {result}" in printed
    assert str((tmp_path / "export").resolve()) in text


@every_own
def test_a_length_that_is_enough_stays_and_a_second_run_agrees(
    target: str, masked: Path, cli: CommandLine, tmp_path: Path
) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(OWN[target].format(length=4096))
    call = ("export", masked, "--to", target, "--out", tmp_path / "export", "--into", own)
    cli.works(*call)
    result = tmp_path / "mine-masked.yaml"
    assert values(result)[LENGTH[target]] == 4096
    cli.works(*call)
    again = cli.works("export", masked, "--to", target, "--out", tmp_path / "export", "--into", result)
    assert "nothing had to change" in again
    result.write_text("model: another\n")
    assert "exists and differs" in cli.fails(2, *call)
    cli.works(*call, "--force")


def test_no_limit_is_long_enough_for_trl(masked: Path, cli: CommandLine, tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("max_length: null\n")
    cli.works("export", masked, "--to", "trl", "--out", tmp_path / "export", "--into", own)
    assert values(tmp_path / "mine-masked.yaml")["max_length"] is None


@pytest.mark.parametrize(
    ("target", "content", "said"),
    [
        ("axolotl", None, "cannot be read (No such file or directory)"),
        ("axolotl", "- a\n- b\n", "not a mapping of settings"),
        ("axolotl", "a: [1\n", "not valid YAML (line "),
        ("axolotl", "a: 1\na: 2\n", "not valid YAML (line 2"),
        (
            "jsonl",
            "a: 1\n",
            "--into: jsonl is not configured by a YAML file alone; legal: trl, axolotl, llamafactory",
        ),
    ],
)
def test_refused_before_any_work(
    target: str, content: str | None, said: str, masked: Path, cli: CommandLine, tmp_path: Path
) -> None:
    own = tmp_path / "mine.yaml"
    if content is not None:
        own.write_text(content)
    error = cli.fails(2, "export", masked, "--to", target, "--out", tmp_path / "export", "--into", own)
    assert said in error
    assert not (tmp_path / "export").exists()


@pytest.mark.slow
def test_trl_trains_on_it(world: World, masked: Path, cli: CommandLine, tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(
        f"model_name_or_path: {world.base}  # tiny\ndataset_name: trl-lib/Capybara\nmax_steps: 2\nuse_cpu: true\n"
        "assistant_only_loss: true\neval_strategy: steps\nload_best_model_at_end: true\n"
        f"bf16: false\nlogging_steps: 1\nreport_to: none\noutput_dir: {tmp_path / 'trained'}\n"
    )
    cli.works("export", masked, "--to", "trl", "--out", tmp_path / "export", "--into", own)
    program = (
        "from trl.scripts.sft import main, make_parser; p = make_parser(); main(*p.parse_args_and_config())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--config", tmp_path / "mine-masked.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "train_loss" in done.stdout
