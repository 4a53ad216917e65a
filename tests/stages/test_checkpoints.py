"""What a checkpoint's identity covers: every file that decides what it computes or how it tokenizes."""

import pytest

from pipeline.manifest import sha256
from sstoken.errors import SstokenError
from stages.checkpoints import identity, tokenizer_identity
from tests.stages.tiny import save_model


@pytest.mark.parametrize("name", ["config.json", "modeling_own.py", "model.safetensors"])
def test_what_decides_the_numbers_is_part_of_the_identity(name, tmp_path):
    folder = save_model(tmp_path / "model")
    before = identity(str(folder), sha256)
    with open(folder / name, "ab") as file:
        if name == "model.safetensors":  # it has to stay whole
            file.truncate(file.tell() - 1)
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


def test_without_a_network_a_hub_model_is_the_cached_one(tmp_path, monkeypatch):
    from huggingface_hub import constants

    cached = tmp_path / "models--user--name"
    for place, text in {"refs/main": "abc123", "snapshots/abc123/config.json": "{}"}.items():
        (cached / place).parent.mkdir(parents=True)
        (cached / place).write_text(text)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert identity("user/name", sha256) == {"hub": "user/name", "commit": "abc123"}
    with pytest.raises(SstokenError, match="the Hub does not answer"):
        identity("user/other", sha256)
