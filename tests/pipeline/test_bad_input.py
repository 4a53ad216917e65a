"""Whatever is wrong with what a command gets, it ends in one line, and the right command afterwards works."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from tests import factories
from tests.pipeline.small_run import PIPELINE, environment
from tests.pipeline.worlds import (
    GOOD_ROW,
    SHARD_ROWS,
    CommandLine,
    World,
    copy_model,
    cut,
    damage,
    no_trace,
    snapshot,
)
from tests.support import PATIENCE, messages

FAILED, USAGE, INTERRUPTED = 1, 2, 130


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capfd)


def says(line: str, *words: str) -> None:
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


def instead(command: tuple[object, ...], options: tuple[object, ...]) -> list[object]:
    """The command with the first of the options, and its value, in the place of what it says itself."""
    given = list(command)
    if options[0] in given:
        at = given.index(options[0])
        del given[at : at + 2]
    return [*given, *options]


def conversation(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": "w1"} for role in roles]}) + "\n"


def parquet(table: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink)
    return bytes(sink.getvalue())


def flipped(content: bytes) -> bytes:
    return content[:10] + b"\xff" * 50 + content[60:]


ROWS = {"question": ["w1"] * 2000, "answer": ["w2"] * 2000}
STOP = "--on-bad-row skip"
Case = tuple[str, str | bytes | None, int, tuple[str, ...]]
DATA: dict[str, Case] = {
    # what is wrong: (file name, its content; None: no file), exit code, what the line has to say
    "missing file": ("d.jsonl", None, USAGE, ("d.jsonl", "no such file", "name a file")),
    "unknown extension": ("d.txt", GOOD_ROW, USAGE, ("d.txt", ".txt", ".jsonl")),
    "empty file": ("d.jsonl", "", FAILED, ("d.jsonl", "empty")),
    "blank lines alone": ("d.jsonl", "\n\n \n", FAILED, ("d.jsonl", "no rows")),
    "empty Parquet file": ("d.parquet", b"", FAILED, ("d.parquet", "empty")),
    "Parquet without rows": ("d.parquet", parquet({"question": [], "answer": []}), FAILED, ("no rows",)),
    "broken JSON on line 5": (
        "d.jsonl", GOOD_ROW * 4 + '{"question": "w1",\n' + GOOD_ROW, FAILED, ("line 5: broken JSON", "column 19", STOP),
    ),
    "no answer": ("d.jsonl", GOOD_ROW + '{"question": "w1"}\n', FAILED, ("line 2: no answer", "'answer'", STOP)),
    "null answer": ("d.jsonl", GOOD_ROW + '{"question": "w1", "answer": null}\n', FAILED, ("line 2: no answer", STOP)),
    "empty answer": ("d.jsonl", GOOD_ROW + '{"question": "w1", "answer": " "}\n', FAILED, ("line 2: no answer", STOP)),
    "only a question": (
        "d.jsonl", conversation("user", "assistant") + conversation("user"), FAILED, ("line 2: no answer",),
    ),
    "assistant first": (
        "d.jsonl", conversation("user", "assistant") + conversation("assistant", "user"), FAILED,
        ("line 2: role order: message 1 is assistant at the start", STOP),
    ),
    "two answers in a row": (
        "d.jsonl", conversation("user", "assistant", "assistant"), FAILED, ("line 1: role order: message 3",),
    ),
    "system in the middle": ("d.jsonl", conversation("user", "system", "assistant"), FAILED, ("line 1: role order",)),
    "unknown role": ("d.jsonl", conversation("user", "oracle"), FAILED, ("line 1: unknown role", "'oracle'", "tool")),
    "lone surrogate": (
        "d.jsonl", GOOD_ROW + '{"question": "\\ud800", "answer": "w1"}\n', FAILED,
        ("line 2: lone surrogate: character U+D800", STOP),
    ),
    "lone surrogate in the id": (
        "d.jsonl", '{"example_id": "\\ud800", "question": "w1", "answer": "w1"}\n', FAILED,
        ("line 1: lone surrogate: character U+D800", STOP),
    ),
    "not UTF-8": (
        "d.jsonl", GOOD_ROW.encode() + b'{"question": "\xe9", "answer": "w1"}\n', FAILED,
        ("line 2: not UTF-8: byte 0xE9 at 14", "convert"),
    ),
    "UTF-16": ("d.jsonl", GOOD_ROW.encode("utf-16"), FAILED, ("d.jsonl: UTF-16 text", "convert")),
    "10 MB in one row": (
        "d.jsonl", GOOD_ROW + json.dumps({"question": "w1", "answer": "w2 " * 3_500_000}) + "\n", FAILED,
        ("line 2: too long: 10,500,015 characters", "--max-chars", STOP),
    ),
    "unknown columns": (
        "d.jsonl", '{"text": "w1", "label": 2}\n', FAILED, ("line 1", "text, label", "--column question=text"),
    ),
    "a list as a row": ("d.jsonl", GOOD_ROW + "[1, 2]\n", FAILED, ("line 2: not an object", STOP)),
    "JSON cut short": ("d.json", f"[{GOOD_ROW.strip()},", FAILED, ("d.json: broken JSON after row 0",)),
    "a pretty object": ("d.json", '{\n "question": 1\n}', FAILED, ("d.json", "neither a JSON list", "JSON lines")),
    "uneven CSV": ("d.csv", "question,answer\nw1\n", FAILED, ("line 2: broken CSV: 2 columns", STOP)),
    "not gzip": ("d.jsonl.gz", GOOD_ROW, FAILED, ("d.jsonl.gz", "damaged", "fetch it again")),
    "Parquet cut short": ("d.parquet", parquet(ROWS)[:-100], FAILED, ("d.parquet: not a readable Parquet file",)),
    "JSON lines called Parquet": ("d.parquet", GOOD_ROW, FAILED, ("d.parquet: not a readable Parquet file",)),
    "Parquet with a damaged page": ("d.parquet", flipped(parquet(ROWS)), FAILED, ("d.parquet", "fetch it again")),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_data(case: str, world: World, cli: CommandLine, tmp_path: Path) -> None:
    name, content, code, words = DATA[case]
    data, out = tmp_path / name, tmp_path / "tokens"
    if content is not None:
        data.write_bytes(content if isinstance(content, bytes) else content.encode())
    says(cli.fails(code, "encode", "--data", data, "--model", world.base, "--out", out), *words)
    no_trace(out)
    good = tmp_path / "good.jsonl"
    good.write_text(GOOD_ROW)
    cli.works("encode", "--data", good, "--model", world.base, "--out", out)


def test_data_that_is_a_folder(world: World, cli: CommandLine, tmp_path: Path) -> None:
    line = cli.fails(USAGE, "encode", "--data", tmp_path, "--model", world.base, "--out", tmp_path / "t")
    says(line, str(tmp_path), "a folder", "*.jsonl")


def test_bad_rows_passed_over_are_listed_without_their_text(
    world: World, cli: CommandLine, tmp_path: Path
) -> None:
    data, out = tmp_path / "d.jsonl", tmp_path / "tokens"
    data.write_text(GOOD_ROW + '{"question": "secret"}\n{\n' + GOOD_ROW)
    printed = cli.works("encode", "--data", data, "--model", world.base, "--out", out, "--on-bad-row", "skip")
    says(printed, "2 examples", "bad rows 2: broken JSON 1, no answer 1")
    listed = "".join(p.read_text() for p in (out / "bad_rows").iterdir())
    assert len(listed.splitlines()) == 2
    assert "secret" not in listed


def without_eos(model: Path) -> None:
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))


def write(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None
    )


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_eos, ("no EOS token", "set eos_token")),
        (lose("tokenizer.json"), ("no tokenizer.json there", "save_pretrained")),
        (write("tokenizer.json", "{"), ("tokenizer does not load", "save_pretrained")),
        (write("tokenizer_config.json", "{"), ("tokenizer does not load",)),
    ],
    ids=["no EOS", "no tokenizer", "broken tokenizer", "broken settings"],
)
def test_tokenizer(
    spoil: Callable[[Path], None], words: tuple[str, ...], world: World, cli: CommandLine, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "tokens"
    shutil.copytree(world.base, model)
    spoil(model)
    says(
        cli.fails(FAILED, "encode", "--data", world.data, "--model", model, "--out", out), str(model), *words
    )
    no_trace(out)
    shutil.copytree(world.base, model, dirs_exist_ok=True)
    cli.works("encode", "--data", world.data, "--model", model, "--out", out)


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, USAGE, ("no such file",)),
        (b"\xff\xfe{{", USAGE, ("not UTF-8",)),
        (b"{% for %}", FAILED, ("not valid Jinja (line 1",)),
        (
            b"{% for m in messages %}{{ m.content }}{% endfor %}",
            FAILED,
            ("uncertain mask", "prompt and response alike"),
        ),
    ],
    ids=["missing", "not UTF-8", "broken", "no end of turn"],
)
def test_chat_template(
    content: bytes | None, code: int, words: tuple[str, ...], world: World, cli: CommandLine, tmp_path: Path
) -> None:
    template, out = tmp_path / "chat.jinja", tmp_path / "tokens"
    if content is not None:
        template.write_bytes(content)
    command = ("encode", "--data", world.data, "--model", world.base, "--out", out)
    says(cli.fails(code, *command, "--chat-template", template), *words)
    no_trace(out)
    cli.works(*command)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-length", 1), ("max_length is 1",)),
        (("--max-length", "many"), ("--max-length", "'many'")),
        (("--workers", 0), ("workers is 0",)),
        (("--limit", -3), ("limit is -3",)),
        (("--on-bad-row", "ignore"), ("'ignore'", "'stop'", "'skip'")),
        (("--format", "chatml"), ("'chatml'", "'sharegpt'")),
        (("--column", "question"), ("'question'", "NAME=VALUE")),
        (("--column", "text=x"), ("'text'", "question")),
        (("--split", "train"), ("'train'", "leave split out")),
        (("--model", "./nowhere"), ("'./nowhere'", "no such folder")),
        (("--model", ""), ("empty", "name a folder")),
        (("--maxlength", 9), ("--maxlength", "--max-length")),
    ],
    ids=str,
)
def test_options_of_encode(
    options: tuple[object, ...], words: tuple[str, ...], world: World, cli: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    command = ("encode", "--data", world.data, "--model", world.base, "--out", out)
    says(cli.fails(USAGE, *instead(command, options)), *words)
    no_trace(out)


# Checkpoints


def fill(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda weights: weights["model.layers.0.mlp.down_proj.weight"][0].fill_(value)


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def shard_gone(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def weight_gone(model: Path) -> None:
    source = model.with_name("whole")
    model.rename(source)
    copy_model(source, model, lambda w: w.pop("model.layers.1.mlp.down_proj.weight"))


def numbers_gone(value: float) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        source = model.with_name("whole")
        model.rename(source)
        copy_model(source, model, fill(value))

    return spoil


def smaller(**sizes: int) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        shutil.rmtree(model)
        factories.save_model(model, **sizes)

    return spoil


def index_of_nothing(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text("{}")


def without_tokenizer(model: Path) -> None:
    smaller(vocabulary=16)(model)
    for file in model.glob("tokenizer*"):
        file.unlink()


MODELS: dict[str, tuple[Callable[[Path], Any], int, tuple[str, ...]]] = {
    "pickle": (pickled, FAILED, ("pickled (pytorch_model.bin)", "save_pretrained")),
    "a shard file is missing": (shard_gone, FAILED, ("1 of 2", "model-00002-of-00002", "again")),
    "an index of nothing": (index_of_nothing, FAILED, ("index.json", "again")),
    "a weight is missing": (weight_gone, FAILED, ("1 weights are missing", "layers.1.mlp.down_proj", "again")),
    "cut short": (lambda m: cut(m / "model.safetensors"), FAILED, ("model.safetensors", "again")),
    "no weights": (lose("model.safetensors"), FAILED, ("no *.safetensors",)),
    "no config.json": (lose("config.json"), FAILED, ("no config.json", "name the folder")),
    "broken config.json": (write("config.json", "{"), FAILED, ("config.json",)),
    "config.json of nothing": (write("config.json", "{}"), FAILED, ("does not load", "model_type")),
    "NaN": (numbers_gone(float("nan")), FAILED, ("NaN", "part-00000.parquet", "example 'data-0'")),
    "infinite": (numbers_gone(float("inf")), FAILED, ("infinite", "part-00000.parquet", "example 'data-0'")),
    "another tokenizer": (lambda m: factories.save_tokenizer(m, "v"), FAILED, ("tokenizer", "encode with")),
    "ids beyond the vocabulary": (without_tokenizer, FAILED, ("part-00000", "'data-", "vocabulary of 16", "encode")),
    "examples too long": (smaller(positions=8), FAILED, ("'data-0'", "11 tokens", "--max-length 8")),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_checkpoint(case: str, world: World, cli: CommandLine, tmp_path: Path) -> None:
    spoil, code, words = MODELS[case]
    model, out = tmp_path / "model", tmp_path / "scores"
    shutil.copytree(world.base, model)
    spoil(model)
    command = ("score", "--tokens", world.tokens, "--out", out, "--ckpt", model)
    says(cli.fails(code, *command), str(model), *words)
    no_trace(out / "model")
    shutil.rmtree(model)
    shutil.copytree(world.base, model)
    cli.works(*command)


@pytest.mark.parametrize("case", [c for c in MODELS if c not in ("NaN", "infinite")])
def test_checkpoint_to_train(case: str, world: World, cli: CommandLine, tmp_path: Path) -> None:
    spoil, code, _ = MODELS[case]
    model, out = tmp_path / "model", tmp_path / "history"
    shutil.copytree(world.base, model)
    spoil(model)
    line = cli.fails(
        code, "anchor", "--tokens", world.tokens, "--model", model, "--out", out, "--max-steps", 1
    )
    says(line, str(model))
    no_trace(out)


def test_weights_changed_in_place_are_scored_again(world: World, cli: CommandLine, tmp_path: Path) -> None:
    """The same command says neither `finished already` nor `other settings`; other settings are still refused."""
    model, out = Path(shutil.copytree(world.base, tmp_path / "model")), tmp_path / "scores"
    command = ("score", "--tokens", world.tokens, "--out", out, "--ckpt", model)
    cli.works(*command)
    before = (out / "model" / "part-00000.parquet").read_bytes()
    copy_model(world.base, tmp_path / "other", lambda w: w["model.norm.weight"].mul_(1.5))
    shutil.copy(tmp_path / "other" / "model.safetensors", model)
    cli.works(*command)
    assert (out / "model" / "part-00000.parquet").read_bytes() != before
    says(cli.fails(2, *command, "--dtype", "bfloat16"), "holds finished work of other settings")


def test_training_that_diverges(world: World, cli: CommandLine, tmp_path: Path) -> None:
    model = copy_model(world.base, tmp_path / "model", fill(float("nan")))
    command = (
        "anchor",
        "--tokens",
        world.tokens,
        "--model",
        model,
        "--out",
        tmp_path / "history",
        "--max-steps",
        2,
    )
    says(cli.fails(FAILED, *command), "step 1", "the loss is nan", "lower learning_rate")
    no_trace(tmp_path / "history")


@pytest.mark.parametrize(
    ("weights", "config", "words"),
    [
        (None, {}, ("no base_model_name_or_path",)),
        (None, {"base_model_name_or_path": "BASE"}, ("no *.safetensors",)),
        ("other.safetensors", {"base_model_name_or_path": "BASE"}, ("adapter_model.safetensors) again",)),
        (
            "adapter_model.safetensors",
            {"base_model_name_or_path": "BASE"},
            ("of the adapter's weights are missing",),
        ),
    ],
    ids=["no base", "no weights", "other weights", "not its base"],
)
def test_adapter(
    weights: str | None,
    config: dict[str, str],
    words: tuple[str, ...],
    world: World,
    cli: CommandLine,
    tmp_path: Path,
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "target_modules": "all-linear"} | {k: str(world.base) for k in config}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    if weights:
        save_file({"lora": torch.zeros(2)}, adapter / weights)
    command = ("score", "--tokens", world.tokens, "--out", tmp_path / "scores", "--ckpt")
    says(cli.fails(FAILED, *command, adapter), str(adapter), *words)
    no_trace(tmp_path / "scores" / "adapter")
    cli.works(*command, world.base)  # the base in memory is as it was


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ckpt", "nowhere"), ("'nowhere'", "no such folder")),
        (("--ckpt", __file__), ("is a file", "name the folder")),
        (("--ckpt", ""), ("empty",)),
        (("--ckpt", "a/b=BASE"), ("'a/b'", "NAME=")),
        (("--ckpt", "..=BASE"), ("'..'", "NAME=")),
        (("--ckpt", "base=LATER"), ("two checkpoints are called 'base'", "NAME=")),
        (("--layer", 2), ("layer 2", "-2 to 1")),
        (("--layer", -3), ("layer -3", "-2 to 1")),
        (("--attention-from", "nobody"), ("'nobody'", "no such folder")),
        (("--device", "gpu"), ("'gpu'", "cpu")),
        (("--dtype", "int8"), ("'int8'", "'float32'")),
        (("--backend", "tensorrt"), ("'tensorrt'", "legal: auto, hf")),
        (("--backend-option", "speed=9"), ("hf has no option 'speed'", "legal: compile")),
        (("--batch-tokens", 0), ("batch_tokens is 0",)),
        (("--tokens", "nowhere"), ("nowhere", "no such folder")),
        (("--tokens", __file__), ("is a file", "the folder that holds the tokens")),
        (("--tokens", "SCORES"), ("written by 'score'", "'encode'")),
    ],
    ids=str,
)
def test_options_of_score(
    options: tuple[str, object], words: tuple[str, ...], world: World, cli: CommandLine, tmp_path: Path
) -> None:
    places = {"BASE": world.base, "LATER": world.later, "SCORES": world.scores / "base"}
    option, value = options[0], str(options[1])
    for name, place in places.items():
        value = value.replace(name, str(place))
    command = ("score", "--tokens", world.tokens, "--ckpt", world.base, "--out", tmp_path / "scores")
    says(
        cli.fails(
            USAGE, *(instead(command, (option, value)) if option != "--ckpt" else (*command, option, value))
        ),
        *words,
    )
    no_trace(tmp_path / "scores" / "base")
    cli.works(*command)


# Folders that other stages wrote


def all_parts_gone(tokens: Path) -> None:
    for part in tokens.glob("part-*"):
        part.unlink()


FOLDERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "unfinished": (lose("manifest.json"), ("unfinished (no manifest.json)", "make it again")),
    "broken manifest": (write("manifest.json", "{"), ("damaged manifest", "make it again")),
    "a part is gone": (lose("part-00001.parquet"), ("part-00001.parquet: missing", "again")),
    "all parts are gone": (all_parts_gone, ("part-00000.parquet: missing", "again")),
    "a part is cut short": (
        lambda f: cut(f / "part-00001.parquet"),
        ("part-00001.parquet", "bytes", "again"),
    ),
    "a part is damaged": (lambda f: damage(f / "part-00001.parquet"), ("part-00001.parquet", "again")),
}


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.parametrize("verb", ["anchor", "score", "select"])
def test_tokens(case: str, verb: str, world: World, cli: CommandLine, tmp_path: Path) -> None:
    spoil, words = FOLDERS[case]
    tokens, out = tmp_path / "tokens", tmp_path / "out"
    shutil.copytree(world.tokens, tokens)
    spoil(tokens)
    more: tuple[object, ...] = {
        "anchor": ("--model", world.base, "--max-steps", 1),
        "score": ("--ckpt", world.base),
        "select": ("--scores", world.scores),
    }[verb]
    command = (verb, "--tokens", tokens, "--out", out, *more)
    says(cli.fails(FAILED, *command), str(tokens), *words)
    out = out / "base" if verb == "score" else out
    assert not out.exists()
    if verb == "anchor":
        return  # seconds, and `test_config` trains
    shutil.copytree(world.tokens, tokens, dirs_exist_ok=True)
    cli.works(*command)


@pytest.mark.parametrize("case", FOLDERS)
def test_scores(case: str, world: World, cli: CommandLine, tmp_path: Path) -> None:
    spoil, words = FOLDERS[case]
    scores, out = tmp_path / "scores", tmp_path / "masked"
    shutil.copytree(world.scores, scores)
    spoil(scores / "later")
    command = ("select", "--tokens", world.tokens, "--scores", scores, "--out", out)
    if case == "unfinished":
        says(cli.fails(USAGE, *command), str(scores), "there are: base", "unfinished: later")
    else:
        says(cli.fails(FAILED, *command), str(scores / "later"), *words)
    assert not out.exists()
    shutil.copytree(world.scores, scores, dirs_exist_ok=True)
    cli.works(*command)


def test_scores_of_other_tokens(world: World, cli: CommandLine, tmp_path: Path) -> None:
    data, tokens, out = tmp_path / "other.jsonl", tmp_path / "tokens", tmp_path / "masked"
    data.write_text(world.data.read_text())
    encode = ("encode", "--data", data, "--model", world.base, "--workers", 1, "--out")
    cli.works(*encode, tokens, "--shard-rows", SHARD_ROWS)
    command = ("select", "--scores", world.scores, "--out", out, "--tokens")
    says(cli.fails(FAILED, *command, tokens), "other tokens", str(tokens), str(world.scores), "again")
    no_trace(out)
    cli.works(*encode, tmp_path / "more", "--shard-rows", 5)
    says(cli.fails(FAILED, *command, tmp_path / "more"), "again")
    assert not out.exists()
    cli.works(*command, world.tokens)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rho", "0"), ("rho is 0", "<= 1")),
        (("--rho", "1.5"), ("rho is 1.5", "<= 1")),
        (("--rho", "nan"), ("rho is nan",)),
        (("--rho", "half"), ("--rho", "'half'")),
        (("--gamma", "-1"), ("gamma is -1", "0")),
        (("--gamma", "1.1"), ("gamma is 1.1", "1")),
        (("--seed", "-1"), ("-1", "seed is -1")),
        (("--method", "sstokn"), ("'sstokn'", "sstoken", "random")),
        (("--scope", "all"), ("'all'", "'global'")),
        (("--history", "bse"), ("'bse'", "base, later")),
        (("--current", "last"), ("'last'", "base, later")),
        (("--history", "later", "--current", "later"), ("both 'later'", "name another")),
        (("--scores", "nowhere"), ("nowhere", "no such folder")),
        (("--scores", "SCORES/base"), ("the folder above",)),
    ],
    ids=str,
)
def test_options_of_select(
    options: tuple[str, ...], words: tuple[str, ...], world: World, cli: CommandLine, tmp_path: Path
) -> None:
    options = tuple(value.replace("SCORES", str(world.scores)) for value in options)
    command = ("select", "--tokens", world.tokens, "--scores", world.scores, "--out", tmp_path / "masked")
    says(cli.fails(USAGE, *instead(command, options)), *words)
    no_trace(tmp_path / "masked")
    cli.works(*command)


# The output folder


@pytest.fixture
def select(world: World) -> tuple[object, ...]:
    return "select", "--tokens", world.tokens, "--scores", world.scores, "--out"


def test_what_others_put_into_an_output_folder_is_never_removed(
    select: tuple[object, ...], cli: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "masked"
    cli.works(*select, out)
    (out / "trained").mkdir()
    (out / "trained" / "weights").write_text("mine")
    (out / ".DS_Store").write_text("")
    cli.works(*select, out)
    again = (*select, out, "--rho", 0.3, "--force")
    says(cli.fails(USAGE, *again), str(out / "trained" / "weights"), "1 such file", "move them")
    shutil.move(out / "trained", tmp_path / "trained")
    cli.works(*again)


def test_output_of_other_settings(select: tuple[object, ...], cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "masked"
    cli.works(*select, out)
    before = snapshot(out)
    says(
        cli.fails(USAGE, *select, out, "--rho", 0.3),
        str(out),
        "other settings or inputs (select.rho 0.6 -> 0.3)",
        "--force",
    )
    assert snapshot(out) == before
    cli.works(*select, out, "--rho", 0.3, "--force")


def test_output_of_another_stage(
    select: tuple[object, ...], world: World, cli: CommandLine, tmp_path: Path
) -> None:
    """Also with --force: it would remove its own input."""
    before = snapshot(world.tokens)
    says(
        cli.fails(USAGE, *select, world.tokens, "--force"),
        str(world.tokens),
        "'encode'",
        "another output folder",
    )
    assert snapshot(world.tokens) == before


def test_output_that_is_somebody_elses(
    select: tuple[object, ...], world: World, cli: CommandLine, tmp_path: Path
) -> None:
    before = snapshot(world.base)
    says(cli.fails(USAGE, *select, world.base, "--force"), "not written by sstoken", "another output folder")
    says(cli.fails(USAGE, *select, world.data), "is a file")
    says(
        cli.fails(FAILED, *select, world.data / "masked"), str(world.data), "cannot be written to", "another"
    )
    assert snapshot(world.base) == before
    for out in ("", ".", "..", "/"):
        says(cli.fails(USAGE, *select, out), "output folder")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that root cannot write to either."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "ro")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "size=200k")
    yield folder
    subprocess.run(["umount", folder], check=True)


def mount(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root and the right to mount")


def test_output_on_a_read_only_disk(
    select: tuple[object, ...], world: World, cli: CommandLine, read_only: Path, tmp_path: Path
) -> None:
    says(cli.fails(FAILED, *select, read_only / "masked"), str(read_only), "cannot be written to", "another")
    config = write_config(tmp_path, world, read_only / "run")
    says(cli.fails(FAILED, "run", config), str(read_only), "cannot be written to", "another")


def test_output_below_proc(
    select: tuple[object, ...], world: World, cli: CommandLine, tmp_path: Path
) -> None:
    """Read-only for everybody on every Linux."""
    if not Path("/proc/version").exists():
        pytest.skip("no /proc")
    says(cli.fails(FAILED, *select, "/proc/masked"), "/proc", "cannot be written to", "another")
    says(
        cli.fails(FAILED, "run", write_config(tmp_path, world, Path("/proc/run"))),
        "/proc",
        "cannot be written to",
    )


def test_a_full_disk(world: World, cli: CommandLine, full: Path, tmp_path: Path) -> None:
    """Every stage, and what was finished before stays; with room again the same commands go on."""
    data = tmp_path / "many.jsonl"
    data.write_text(world.data.read_text() * 20)
    tokens, scores = full / "tokens", full / "scores"
    encode = (
        "encode",
        "--data",
        data,
        "--model",
        world.base,
        "--out",
        tokens,
        "--shard-rows",
        50,
        "--workers",
        1,
    )
    blocker = full / "blocker"

    def leave(kilobytes: int) -> None:
        blocker.unlink(missing_ok=True)
        used = shutil.disk_usage(full)
        blocker.write_bytes(b"0" * (used.free - kilobytes * 1024))

    leave(12)
    says(cli.fails(FAILED, *encode), "no space left on the disk", "the same command goes on")
    assert not tokens.exists()
    blocker.unlink()
    cli.works(*encode)
    before = snapshot(tokens)
    history = (
        "anchor",
        "--tokens",
        tokens,
        "--model",
        world.base,
        "--out",
        full / "history",
        "--max-steps",
        1,
    )
    leave(20)
    says(cli.fails(FAILED, *history), "no space left on the disk", "the same command goes on")
    assert not (full / "history").exists()
    score = ("score", "--tokens", tokens, "--ckpt", world.base, "--out", scores)
    leave(8)
    says(cli.fails(FAILED, *score), "no space left on the disk", "the same command goes on")
    assert not (scores / "base").exists()
    blocker.unlink()
    cli.works(*score)
    cli.works("verify", full)
    assert snapshot(tokens) == before


# Whole runs


def write_config(folder: Path, world: World, out: Path, more: str = "") -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"out: {out}\nencode: {{data: {world.data}, model: {world.base}}}\n"
        + (more or f"score: {{checkpoints: {{a: {world.base}, b: {world.later}}}}}\n")
    )
    return path


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("score: {}", ("score.checkpoints is empty", "name two")),
        ("score: {checkpoints: []}", ("score.checkpoints is empty", "name two")),
        ("score: {checkpoints: [BASE]}", ("both 'base'", "name another")),
        ("score: {checkpoints: {a/b: BASE, c: LATER}}", ("'a/b'", "cannot be a folder's name")),
        ("score: {checkpoints: {..: BASE, c: LATER}}", ("'..'", "cannot be a folder's name")),
        ("score: {checkpoints: {a: BASE, b: nowhere}}", ("'nowhere'", "no such folder")),
        ("score: {checkpoints: {a: BASE, b: ./nowhere}}", ("'./nowhere'", "no such folder")),
        ("score: {checkpoints: [BASE, OTHER/base]}", ("two checkpoints are called 'base'", "NAME=")),
        ("score: {checkpoints: {a: BASE, b: LATER}, attention_from: c}", ("'c'", "(a, b)")),
        ("score: {checkpoints: {a: BASE, b: LATER}}\nselect: {history: c}", ("'c'", "(a, b)")),
        ("score: {checkpoints: {a: BASE, b: LATER}}\nselect: {current: c}", ("'c'", "(a, b)")),
        (
            "score: {checkpoints: [BASE, LATER]}\nselect: {current: OTHER/base}",
            ("two checkpoints are called 'base'", "NAME="),
        ),
        (
            "score: {checkpoints: [BASE, LATER], attention_from: none}",
            ("attention_from is 'none'", "'sstoken' needs attention"),
        ),
        ("anchor: {max_steps: 2}\nselect: {current: lst}", ("'lst'", "last")),
        ("anchor: {max_steps: 2}\nselect: {current: step-0}", ("both 'step-0'",)),
        ("anchor: {max_steps: 2, model: nowhere}", ("'nowhere'", "no such folder")),
    ],
    ids=str,
)
def test_checkpoints_of_a_run_are_checked_before_any_work(
    more: str, words: tuple[str, ...], world: World, cli: CommandLine, tmp_path: Path
) -> None:
    shutil.copytree(world.base, tmp_path / "base")
    for name, place in {"BASE": world.base, "LATER": world.later, "OTHER": tmp_path}.items():
        more = more.replace(name, str(place))
    config = write_config(tmp_path, world, tmp_path / "run", more)
    for verb in ("run", "plan"):
        says(cli.fails(USAGE, verb, config), *words)
    assert not (tmp_path / "run").exists()


def test_a_broken_checkpoint_of_a_run_is_found_before_any_work(
    world: World, cli: CommandLine, tmp_path: Path
) -> None:
    shutil.copytree(world.base, tmp_path / "pickle")
    pickled(tmp_path / "pickle")
    more = f"score: {{checkpoints: {{a: {world.base}, b: {tmp_path / 'pickle'}}}}}"
    says(cli.fails(FAILED, "run", write_config(tmp_path, world, tmp_path / "run", more)), "pickled")
    assert not (tmp_path / "run").exists()


def test_folder_of_another_run(world: World, cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = write_config(tmp_path, world, out)
    cli.works("run", config)
    before = snapshot(out)
    other = tmp_path / "other.jsonl"
    other.write_text(GOOD_ROW)
    says(
        cli.fails(USAGE, "run", config, "--set", f"encode.data={other}"),
        str(out),
        "another `out`",
        "--force encode",
    )
    assert snapshot(out) == before
    says(cli("plan", config, "--set", f"encode.data={other}").err, "run will refuse this", "another `out`")
    cli.works("run", config, "--set", f"encode.data={other}", "--force", "encode")


@pytest.mark.parametrize("content", ["{", "[]", "3", ""])
def test_a_damaged_mark_of_a_run(content: str, world: World, cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text(content)
    config = write_config(tmp_path, world, out)
    says(cli.fails(FAILED, "run", config), str(out / "run.json"), "remove")
    (out / "run.json").unlink()
    cli.works("run", config, "--until", "encode")


def test_out_of_a_run_that_cannot_be(world: World, cli: CommandLine, tmp_path: Path) -> None:
    for out, code, word in (
        (world.data, USAGE, "is a file"),
        (world.base, USAGE, "another `out`"),
        (world.data / "run", FAILED, "cannot be written to"),
    ):
        says(cli.fails(code, "run", write_config(tmp_path, world, out)), str(world.base.parent), word)


# Twice, together, and interrupted


def test_the_same_command_twice(
    select: tuple[object, ...], world: World, cli: CommandLine, tmp_path: Path
) -> None:
    commands: list[tuple[object, ...]] = [
        ("encode", "--data", world.data, "--model", world.base, "--out", tmp_path / "tokens"),
        (
            "anchor",
            "--tokens",
            world.tokens,
            "--model",
            world.base,
            "--max-steps",
            1,
            "--out",
            tmp_path / "history",
        ),
        ("score", "--tokens", world.tokens, "--ckpt", world.base, "--out", tmp_path / "scores"),
        (*select, tmp_path / "masked"),
    ]
    for command in commands:
        cli.works(*command)
    before = snapshot(tmp_path)
    for command in commands:
        outcome = cli(*command)
        assert outcome.code == 0
        says(outcome.out, f"{command[0]}", "finished already")
        assert messages(outcome.err) == []
    assert snapshot(tmp_path) == before


def test_a_finished_output_that_lost_a_file(
    select: tuple[object, ...], cli: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "masked"
    cli.works(*select, out)
    (out / "part-00001.parquet").unlink()
    says(cli.fails(FAILED, *select, out), "part-00001.parquet: missing", "--force")
    cli.works(*select, out, "--force")


def test_two_runs_at_once(select: tuple[object, ...], cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "masked"
    with FileLock(tmp_path / ".masked.lock"):
        says(cli.fails(FAILED, *select, out), str(out), "another run", "wait")
        no_trace(out)
    cli.works(*select, out)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["encode", "anchor"])
def test_interrupted(verb: str, world: World, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group: the workers too."""
    out = tmp_path / "out"
    if verb == "encode":
        data = tmp_path / "data.jsonl"
        data.write_text(world.data.read_text() * 4000)
        command = ["encode", "--data", data, "--model", world.base, "--workers", 2, "--shard-rows", 500]
        whole, last = "part-*.parquet", 96_000
    else:
        command = [
            "anchor",
            "--tokens",
            world.tokens,
            "--model",
            world.base,
            "--max-steps",
            3000,
            "--snapshots",
            300,
        ]
        whole, last = "trainer/checkpoint-*/whole.json", 3000
    process = subprocess.Popen(
        [*PIPELINE, *map(str, command), "--out", str(out)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + PATIENCE
    while not list(partial.glob(whole)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    printed, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == INTERRUPTED
    assert printed == ""
    lines = messages(err)
    assert len(lines) == 1, err
    says(lines[0], "error: interrupted", "the same command goes on")
    assert not out.exists()
    assert list(partial.glob(whole)), f"something of {last} is kept"


def test_a_process_of_its_own_prints_one_line(world: World, tmp_path: Path) -> None:
    """Nothing that a library writes comes between."""
    model = copy_model(world.base, tmp_path / "model", fill(float("nan")))
    command = [
        "score",
        "--tokens",
        world.tokens,
        "--ckpt",
        world.base,
        "--ckpt",
        model,
        "--out",
        tmp_path / "scores",
    ]
    done = subprocess.run([*PIPELINE, *map(str, command)], env=environment(), capture_output=True, text=True)
    assert done.returncode == FAILED
    (line,) = messages(done.stderr)
    says(line, "error: ", str(model), "NaN", "part-00000.parquet", "'data-0'")
    assert (tmp_path / "scores" / "base" / "manifest.json").is_file(), "what was finished before is kept"


@pytest.mark.slow
def test_compiled_without_a_compiler(world: World, cli: CommandLine, tmp_path: Path) -> None:
    command = ["score", "--tokens", world.tokens, "--ckpt", world.base, "--out", tmp_path / "scores"]
    without = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [*PIPELINE, *map(str, command), "--backend-option", "compile=true"],
        env=environment() | without,
        capture_output=True,
        text=True,
    )
    assert done.returncode == FAILED
    (line,) = messages(done.stderr)
    says(line, "error: ", "do not compile", "C++ compiler", "/nowhere/g++", "score without")
    cli.works(*command)


@pytest.mark.slow
def test_training_prints_no_warning_of_a_library(world: World, tmp_path: Path) -> None:
    command = ["anchor", "--tokens", world.tokens, "--model", world.base, "--out", tmp_path / "history"]
    command += ["--max-steps", 1, "--lora-rank", 2, "--gradient-checkpointing"]
    done = subprocess.run([*PIPELINE, *map(str, command)], env=environment(), capture_output=True, text=True)
    assert (done.returncode, messages(done.stderr)) == (0, [])


def test_output_into_a_closed_pipe() -> None:
    shell = f"{sys.executable} -m sstoken.pipeline methods | true"
    done = subprocess.run(["bash", "-c", shell], env=environment(), capture_output=True, text=True)
    assert messages(done.stderr) == []
