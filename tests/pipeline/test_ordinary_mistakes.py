"""Ordinary mistakes, each of which ends in one line that says what to do. More in test_bad_input.py."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sstoken.pipeline import api
from tests.pipeline.worlds import CommandLine, World, make_world


@dataclass(frozen=True)
class Place:
    """What a mistake is made with."""

    world: World
    masked: Path
    free: Path
    """An empty folder."""

    def file(self, name: str, content: str) -> Path:
        return self.binary(name, content.encode())

    def binary(self, name: str, content: bytes) -> Path:
        path = self.free / name
        path.write_bytes(content)
        return path

    def configuration(self, more: str) -> Path:
        head = f"out: {self.free / 'run'}\nencode: {{data: {self.world.data}, model: {self.world.base}}}\n"
        return self.file("c.yaml", head + more)


Mistake = Callable[[Place], list[object]]


def scoring(place: Place, *options: object) -> list[object]:
    return ["score", "--tokens", place.world.tokens, "--out", place.free / "out", *options]


def encoding(place: Place, *options: object) -> list[object]:
    return ["encode", "--out", place.free / "out", *options]


def selecting(place: Place, *options: object) -> list[object]:
    return [
        "select", "--tokens", place.world.tokens, "--scores", place.world.scores, "--out", place.free / "out", *options,
    ]  # fmt: skip


MISTAKES: dict[str, tuple[Mistake, tuple[str, ...]]] = {
    # what is wrong: (the command, what its one line has to say)
    "a GGUF file as the checkpoint": (
        lambda p: scoring(p, "--ckpt", p.file("model.gguf", "GGUF")),
        ("GGUF file", "llama.cpp", "save_pretrained"),
    ),
    "data and model exchanged": (
        lambda p: encoding(p, "--data", p.world.base, "--model", p.world.data),
        ("a model's folder", "--model", "dataset here"),
    ),
    "the page of a model in place of its id": (
        lambda p: encoding(
            p, "--data", p.world.data, "--model", "https://huggingface.co/Qwen/Qwen3-0.6B/tree/main"
        ),
        ("Hub page", "'Qwen/Qwen3-0.6B'"),
    ),
    "a blank behind the id of a model": (
        lambda p: encoding(p, "--data", p.world.data, "--model", "Qwen/Qwen3-0.6B "),
        ("'Qwen/Qwen3-0.6B '", "neither a folder nor a Hub id"),
    ),
    "text that a template rendered already": (
        lambda p: encoding(p, "--data", p.file("d.jsonl", '{"text": "w1 w2"}\n'), "--model", p.world.base),
        ("the column text alone", "messages", "prompt and completion"),
    ),
    "the dataset in place of its tokens": (
        lambda p: ["score", "--tokens", p.world.data, "--ckpt", p.world.base, "--out", p.free / "out"],
        ("is a file", "the folder that holds the tokens"),
    ),
    "a spreadsheet": (
        lambda p: encoding(p, "--data", p.file("d.xlsx", "PK"), "--model", p.world.base),
        (".xlsx is not one of", ".csv"),
    ),
    "a masked dataset to be exported that is tokens": (
        lambda p: ["export", p.world.tokens, "--to", "trl", "--out", p.free / "out"],
        ("written by 'encode'", "'select' wrote"),
    ),
    "a masked dataset given as tokens": (
        lambda p: ["anchor", "--tokens", p.masked, "--model", p.world.base, "--out", p.free / "out"],
        ("written by 'select'", "'encode' wrote"),
    ),
    "percent in place of a share": (
        lambda p: [
            "select", "--tokens", p.world.tokens, "--scores", p.world.scores, "--rho", 60, "--out", p.free / "out",
        ],
        ("rho is 60", "0 < rho <= 1"),
    ),
    "a decimal comma": (
        lambda p: ["run", p.file("c.yaml", "out: o\nencode: {data: d, model: m}\nselect: {rho: '0,6'}\n")],
        ("select.rho is '0,6'", "number"),
    ),
    "a program in place of a configuration": (
        lambda p: ["run", p.file("train.py", "print(1)\n")],
        ("train.py", "not a mapping", "encode"),
    ),
    "scores of tokens in place of the folder above": (
        lambda p: [
            "select", "--tokens", p.world.tokens, "--scores", p.world.scores / "base", "--out", p.free / "out",
        ],
        ("the scores of one checkpoint", "name the folder above"),
    ),
    "a tokenizer's folder as the checkpoint": (
        lambda p: scoring(p, "--ckpt", p.world.tokens / "tokenizer"),
        ("a tokenizer and no model", "name the model's folder"),
    ),
    "a device that is not there": (
        lambda p: scoring(p, "--ckpt", p.world.base, "--device", "cuda:77"),
        ("cuda:77", "cannot be used here", "cpu"),
    ),
    "an output that is the input": (
        lambda p: ["select", "--tokens", p.world.tokens, "--scores", p.world.scores, "--out", p.world.tokens],
        ("holds what 'encode' wrote", "choose another output folder"),
    ),
    "--set without a value": (
        lambda p: ["run", p.file("c.yaml", "out: o\nencode: {data: d, model: m}\n"), "--set", "select.rho"],
        ("--set 'select.rho'", "section.field=value"),
    ),
    "one dataset to compare": (
        lambda p: ["compare", p.masked],
        ("1 masked dataset given", "two or more"),
    ),
    "init over a configuration": (
        lambda p: ["init", "--data", p.world.data, "--model", p.world.base, "--file", p.file("c.yaml", "out: o\n")],
        ("exists already", "--force"),
    ),
    "another trainer's configuration for --into": (
        lambda p: ["export", p.masked, "--to", "verl", "--out", p.free / "out", "--into", p.file("c.yaml", "a: 1\n")],
        ("not configured by a YAML file alone", "axolotl"),
    ),
    "a role that is mistyped": (
        lambda p: selecting(p, "--role", "historie=base"), ("'historie'", "did you mean 'history'?"),
    ),
    "a role that is mistyped in a configuration": (
        lambda p: ["plan", p.configuration(f"score: {{checkpoints: [{p.world.base}, {p.world.later}]}}\n"
                                           "select: {roles: {historie: base}}\n")],
        ("'historie'", "did you mean 'history'?"),
    ),
    "an option given twice": (
        lambda p: encoding(p, "--data", p.world.data, "--data", p.world.data, "--model", p.world.base),
        ("--data is given 2 times", "give it once"),
    ),
    "the dash of a word processor": (
        lambda p: encoding(p, "\u2014data", p.world.data, "--model", p.world.base), ("'\u2014data'", "type --"),
    ),
    "spaces around =": (
        lambda p: ["run", p.configuration(""), "--set", "select.rho", "=", "0.4"], ("NAME=VALUE without spaces",),
    ),
    "a verb in capitals": (lambda p: ["ENCODE"], ("did you mean 'encode'?",)),
    "help as a verb": (lambda p: ["help"], ("did you mean --help?",)),
    "percent signs": (lambda p: selecting(p, "--rho", "60%"), ("'60%'", "such as 0.6")),
    "no process": (lambda p: selecting(p, "--workers", -1), ("workers is -1", "legal is 1 or more")),
    "a number in words": (lambda p: selecting(p, "--seed", "one"), ("'one'", "whole number")),
    "an output within a finished folder": (
        lambda p: [
            "score", "--tokens", p.world.tokens, "--ckpt", p.world.base, "--out", p.world.tokens / "scores",
        ],
        ("which 'encode' wrote", "outside"),
    ),
    "a page written over a folder": (lambda p: ["report", p.masked, "--out", p.free], ("is a folder", "name the file")),
    "a picture in a finished folder": (
        lambda p: ["show", p.masked, "--svg", p.masked / "row.svg"], ("which 'select' wrote", "outside"),
    ),
    "a picture of another format": (
        lambda p: ["show", p.masked, "--svg", p.free / "row.png"], ("row.png", "written is SVG", "ends in .svg"),
    ),
    "a page of another format": (
        lambda p: ["report", p.masked, "--out", p.free / "r.pdf"], ("r.pdf", "written is HTML", "ends in .html"),
    ),
    "tokens and scores exchanged": (
        lambda p: ["select", "--tokens", p.world.scores, "--scores", p.world.tokens, "--out", p.free / "out"],
        ("written by 'encode'", "exchanged"),
    ),
    "the folder of several as the tokens": (
        lambda p: ["score", "--tokens", p.world.tokens.parent, "--ckpt", p.world.base, "--out", p.free / "out"],
        ("name the one that holds the tokens", "/tokens;"),
    ),
    "one checkpoint where several go": (
        lambda p: ["run", p.configuration("score: {checkpoints: step-1}\n")],
        ("checkpoints is 'step-1'", "mapping of names to values, such as {a: b}, or a list, such as [a, b]"),
    ),
    "attention of a checkpoint that is not scored": (
        lambda p: scoring(p, "--ckpt", p.world.base, "--attention-from", "sft"),
        ("attention_from is 'sft'", "none of base, none"),
    ),
    "a step that an anchor run did not leave": (
        lambda p: scoring(p, "--ckpt", f"{os.path.relpath(p.world.base.parent)}/step-7"), ("no such folder",),
    ),
    "a model without a network": (
        lambda p: encoding(p, "--data", p.world.data, "--model", "nobody/nothing"), ("nobody/nothing", "HTTPS_PROXY"),
    ),
    "a key that is mistyped": (
        lambda p: ["run", p.file("c.yaml", "out: o\nencode: {data: d, modle: m}\n")], ("did you mean 'model'?",),
    ),
    "a section that is mistyped": (
        lambda p: ["run", p.file("c.yaml", "out: o\nencod: {data: d, model: m}\n")], ("did you mean 'encode'?",),
    ),
    "a field without its section": (
        lambda p: ["run", p.configuration(""), "--set", "rho=0.4"], ("did you mean 'select.rho'?",),
    ),
    "a colon in a value": (
        lambda p: ["run", p.file("c.yaml", "out: a: b\n")], ("line 1, column 7", "in quotes"),
    ),
    "a configuration in UTF-16": (
        lambda p: ["run", p.binary("c.yaml", "out: o\n".encode("utf-16"))], ("not a YAML text", "save it as UTF-8"),
    ),
    "data in place of a configuration": (
        lambda p: ["run", p.file("d.jsonl", '{"a": 1}\n{"a": 2}\n')], ("name a configuration", "encode"),
    ),
}  # fmt: skip
ROWS: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    # what is wrong with the data: (file, content, what the line has to say)
    "a trailing comma": ("d.jsonl", '{"question": "w1", "answer": "w2",}\n', ("line 1", "a comma before }")),
    "single quotes": ("d.jsonl", "{'question': 'w1'}\n", ("line 1", "need double quotes")),
    "two objects on a line": ("d.jsonl", '{"a": "w1"}{"a": "w2"}\n', ("line 1", "more than one value")),
    "pretty-printed rows": (
        "d.jsonl",
        '{\n "question": "w1"\n}\n',
        ("line 1", "several lines", "one object per line"),
    ),
    "a list in a .jsonl file": (
        "d.jsonl",
        '[\n{"question": "w1"}\n]\n',
        ("several lines", "name a list .json"),
    ),
    "rows below a key": (
        "d.json",
        '{"data": [{"question": "w1", "answer": "w2"}]}',
        ("'data'", "save that list alone"),
    ),
    "semicolons": ("d.csv", "question;answer\nw1;w2\n", ("separated by ';'", "commas")),
    "tabs": ("d.tsv", "question\tanswer\nw1\tw2\n", (".tsv", "save it with commas")),
    "an old spreadsheet": ("d.xls", "x", (".xls", "save the sheet as .csv")),
    "a pickle": ("d.pkl", "x", (".pkl", "JSON lines")),
    "columns in capitals": (
        "d.jsonl",
        '{"Question": "w1", "Answer": "w2"}\n',
        ("--column question=Question --column answer=Answer",),
    ),
    "columns of another language": (
        "d.jsonl",
        '{"Frage": "w1", "Antwort nr 1": "w2"}\n',
        ("--column question=Frage --column 'answer=Antwort nr 1'",),
    ),
    "a Git LFS pointer": ("d.jsonl", "version https://git-lfs.github.com/spec/v1\n", ("git lfs pull",)),
    "a pointer in place of Parquet": (
        "d.parquet",
        "version https://git-lfs.github.com/spec/v1\n",
        ("git lfs pull",),
    ),
    "a web page": ("d.jsonl", "<!DOCTYPE html>\n<html>", ("web page", "download the file itself")),
    "a spreadsheet by another name": ("d.csv", b"PK\x03\x04rest", ("spreadsheet", ".csv")),
    "Parquet by another name": ("d.jsonl", b"PAR1rest", ("name it .parquet",)),
    "gzip by another name": ("d.jsonl", b"\x1f\x8brest", ("add .gz",)),
    "messages printed by Python": (
        "d.jsonl",
        "{\"messages\": \"[{'role': 'user', 'content': 'a'}]\"}\n",
        ("of type str", "json.dumps"),
    ),
    "messages that are one": (
        "d.jsonl",
        '{"messages": {"role": "user"}}\n',
        ("of type dict", "a list of messages"),
    ),
    "numbers in place of text": ("d.jsonl", '{"question": 1, "answer": 2}\n', ("of type int", "a string")),
}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world, out = make_world(), tmp_path_factory.mktemp("mistakes") / "masked"
    return api.select(tokens=world.tokens, scores=world.scores, out=out).folder


@pytest.mark.parametrize("case", [*MISTAKES, *ROWS])
def test_ends_in_one_line(
    case: str,
    masked: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    free = tmp_path / "free"
    free.mkdir()
    cli, place = CommandLine(capfd), Place(make_world(), masked, free)
    if case in ROWS:
        name, content, said = ROWS[case]
        data = place.binary(name, content if isinstance(content, bytes) else content.encode())
        command = encoding(place, "--data", data, "--model", place.world.base)
    else:
        make, said = MISTAKES[case]
        command = make(place)
    outcome = cli(*command)
    assert outcome.code in (1, 2), outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    missing = [word for word in said if word not in line]
    assert not missing, f"{missing} not in: {line}"
    assert not list(free.rglob("manifest.json"))
