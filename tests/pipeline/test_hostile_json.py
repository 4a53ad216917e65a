"""Any JSON in any file that a verb reads ends in one line, and so do configurations made to harm."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sstoken.pipeline import api
from tests.pipeline.worlds import CommandLine, Outcome, make_world
from tests.support import messages

CONTENTS = {
    "list": b"[]",
    "null": b"null",
    "text": b'"x"',
    "NaN": b"NaN",
    "object": b"{}",
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "long number": b"1" * 6000,
    "no text": b"\xff\xfe\x00\x80",
    "nothing": b"",
    "zeros": b"\x00" * 100,
    "other types": b'{"stage": [], "fingerprint": {}, "files": null, "known": [], "digest": 1, "settings": 3}',
}
LONGEST = 1200
"""Characters of an error, paths included."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all kinds of files in it, and work of ranks that waits for `commit`."""
    world, folder = make_world(), tmp_path_factory.mktemp("json")
    shutil.copytree(world.base, folder / "base")
    shutil.copy(world.data, folder / "data.jsonl")
    (folder / "run.yaml").write_text(
        "out: out\nencode: {data: data.jsonl, model: base, workers: 1}\nanchor: {max_steps: 2, snapshots: 1}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        api.run("run.yaml")
        api.encode(data="data.jsonl", model="base", out="ranks", rank=0, world_size=1)
        api.encode(data="data.jsonl", model="base", out="shared", rank=0, world_size=2, shard_rows=5)
    return folder


READ = {
    "out/run.json": ("run", "plan"),
    "out/digests.json": ("run", "plan"),
    "out/history/history.json": ("run", "score"),
    "out/history/manifest.json": ("run", "score", "verify"),
    "out/history/tokens.json": ("score",),
    "out/history/step-2/config.json": ("score",),
    "out/history/step-2/tokenizer_config.json": ("score",),
    "out/masked/manifest.json": ("export", "show", "verify"),
    "out/masked/tokenizer/tokenizer.json": ("show", "export"),
    "base/config.json": ("run", "plan", "score base"),
    "base/tokenizer.json": ("encode",),
    "base/generation_config.json": ("encode",),
    "shared.partial/.job.json": ("commit",),
    "shared.partial/.fingerprint": ("rank",),
}
VERBS = {
    "run": "run run.yaml",
    "plan": "plan run.yaml",
    "score": "score --tokens out/tokens --ckpt out/history/step-2 --out new",
    "score base": "score --tokens out/tokens --ckpt base --out new",
    "verify": "verify out",
    "export": "export out/masked --to trl --out new",
    "show": "show out/masked",
    "encode": "encode --data data.jsonl --model base --workers 1 --out new",
    "commit": "commit shared",
    "rank": "encode --data data.jsonl --model base --shard-rows 5 --out shared --rank 1 --world-size 2",
}


def cases() -> Iterator[tuple[str, str, str]]:
    """Every file with every content, each time with another of its readers."""
    for index, (file, verbs) in enumerate(READ.items()):
        for number, content in enumerate(CONTENTS):
            yield file, content, verbs[(index + number) % len(verbs)]


def check_error(outcome: Outcome, about: object) -> None:
    assert "Traceback" not in outcome.err, about
    assert outcome.code in (0, 1, 2), about
    for line in messages(outcome.err):
        assert len(line) < LONGEST, about


@pytest.mark.slow
def test_any_json_in_any_file_ends_in_a_line(
    run: Path, tmp_path: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    refused = 0
    for file, content, verb in cases():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy, symlinks=True)
        monkeypatch.chdir(copy)
        (copy / file).write_bytes(CONTENTS[content])
        outcome = cli(*VERBS[verb].split())
        check_error(outcome, (file, content, verb, outcome))
        refused += outcome.code != 0
    assert refused > 100


SETTINGS = {
    "int of nothing": 'seed: !!int ""',
    "int of a sign": 'seed: !!int "-"',
    "bool of a word": 'seed: !!bool "x"',
    "time of a word": 'seed: !!timestamp "x"',
    "mapping of a list": "seed: !!map [a]",
    "text of a list": "seed: !!str [a]",
    "code": 'seed: !!python/object/apply:os.system ["touch exploded"]',
    "deep flow": "seed: " + "[" * 3000 + "]" * 3000,
    "deep flow of mappings": "seed: " + "{a: " * 3000 + "}" * 3000,
    "merge of itself": "seed: &a {<<: *a}",
    "merges that multiply": "a: &a {k: 1, l: 2}\n"
    + "".join(
        f"{y}: &{y} {{<<: [{', '.join([f'*{x}'] * 9)}]}}\n" for x, y in zip("abcde", "bcdef", strict=True)
    ),
    "lists that multiply": "a: &a [x]\n"
    + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdef", "bcdefg", strict=True)),
    "a key twice": "seed: 1\nseed: 2",
    "a key twice by kind": '1: x\n"1": y',
    "a list as key": "? [a]\n: 1",
    "a long number": "seed: " + "9" * 5000,
    "a long text": "out: " + "x" * 100_000,
    "zeros": "out: a\0b",
    "a list for a stage": "steps: {a: {stage: [x]}}",
    "a key that is an escape": '"\\e[31m": 1',
    "a lone surrogate": 'out: "\\ud800"',
    "nobody's home": 'out: "~nobody-of-this-name/x"',
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_made_to_harm_end_in_a_short_line(
    kind: str, run: Path, tmp_path: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = SETTINGS[kind]
    have = "" if text.startswith(("out:", "steps:")) else "out: out\n"
    (tmp_path / "run.yaml").write_text(
        f"{have}{text}\n"
        + (
            ""
            if "steps" in text
            else f"encode: {{data: {run}/data.jsonl, model: {run}/base}}\nanchor: {{}}\n"
        )
    )
    outcome = cli("plan", "run.yaml")
    check_error(outcome, outcome)
    assert outcome.code == (1 if kind == "a long text" else 2), outcome
    assert "\x1b" not in outcome.err
    assert not (tmp_path / "exploded").exists()


def test_encodings_of_a_configuration(run: Path, tmp_path: Path, cli: CommandLine) -> None:
    """UTF-8, with and without a byte order mark; others are refused."""
    good = f"out: {tmp_path}/out\nencode: {{data: {run}/data.jsonl, model: {run}/base}}\nanchor: {{}}\n"
    for encoding, code in {"utf-8": 0, "utf-8-sig": 0, "utf-16": 2, "utf-32": 2, "utf-16-le": 2}.items():
        (tmp_path / "run.yaml").write_bytes(good.encode(encoding))
        outcome = cli("plan", tmp_path / "run.yaml")
        check_error(outcome, outcome)
        assert outcome.code == code, (encoding, outcome)


def test_anothers_manifest_in_a_folder_above_is_none_of_ours(tmp_path: Path) -> None:
    """Containers, web pages and browsers' extensions have files of that name."""
    world, digest = make_world(), "0" * 64
    (tmp_path / "manifest.json").write_text(
        json.dumps({"layers": [], "config": {"digest": digest}, "x": digest})
    )
    shutil.copytree(world.tokens, tmp_path / "tokens")
    api.select(tokens=tmp_path / "tokens", scores=world.scores, out=tmp_path / "masked")
