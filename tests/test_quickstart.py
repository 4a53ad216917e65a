"""The notebook runs as it is, on a small model; the container file copies what the wheel needs."""

import json
import re
from pathlib import Path

import pytest

from tests.factories import byte_tokenizer, tiny_llama
from tests.support import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def cells(kind: str) -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer(["</s>"], eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "model")
    program = "\n".join(cells("code")).replace("    %pip install", "    raise ImportError  #")
    program, replaced = re.subn(
        r'^MODEL = ".*"$',
        f'MODEL = "{tmp_path / "model"}"',
        program,
        flags=re.MULTILINE,
    )
    assert replaced == 1
    exec(compile(program, str(NOTEBOOK), "exec"), {})
    out = capsys.readouterr().out
    assert re.search(r"kept \d+% of \d+ response tokens", out)
    assert "num_rows: 3" in out


def test_the_notebook_is_saved_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")


def test_the_container_file_copies_what_exists_and_is_not_ignored() -> None:
    kept = {
        line[1:].removesuffix("/**")
        for line in (ROOT / ".dockerignore").read_text().split()
        if line[0] == "!"
    }
    copied = re.findall(r"^COPY (.*) /src\S*$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert names == kept
    assert all((ROOT / name).exists() for name in names)
