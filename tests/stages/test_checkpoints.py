"""What a checkpoint's identity covers: every file that decides what it computes or how it tokenizes."""

import pytest

from pipeline.manifest import sha256
from stages.checkpoints import identity, tokenizer_identity
from tests.stages.tiny import save_model


@pytest.mark.parametrize("name", ["config.json", "modeling_own.py", "model.safetensors"])
def test_what_decides_the_numbers_is_part_of_the_identity(name, tmp_path):
    folder = save_model(tmp_path / "model")
    before = identity(str(folder), sha256)
    with open(folder / name, "ab") as file:
        file.write(b"\n")
    assert identity(str(folder), sha256) != before


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "tokenizer.model",
        "merges.txt",
        "tokenization_own.py",
    ],
)
def test_what_decides_the_tokens_is_part_of_the_tokenizers_identity(name, tmp_path):
    folder = save_model(tmp_path / "model")
    before = tokenizer_identity(str(folder), sha256)
    (folder / name).parent.mkdir(exist_ok=True)
    with open(folder / name, "ab") as file:
        file.write(b"\n")
    after = tokenizer_identity(str(folder), sha256)
    assert after != before
    (folder / "notes.md").write_text("of no consequence")
    assert tokenizer_identity(str(folder), sha256) == after
