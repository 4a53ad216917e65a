"""What a checkpoint's identity covers: every file that decides what it computes or how it tokenizes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sstoken.errors import SstokenError
from sstoken.stages.checkpoints import (
    adapter_base,
    check_loadable,
    identity,
    local_folder,
    tokenizer_identity,
)
from sstoken.stages.folders import hash_file
from sstoken.stages.hub_models import hub_adapter
from tests.factories import save_model


@pytest.mark.parametrize("name", ["config.json", "modeling_own.py", "model.safetensors"])
def test_what_decides_the_numbers_is_part_of_the_identity(name, tmp_path):
    folder = save_model(tmp_path / "model")
    before = identity(str(folder), hash_file)
    with open(folder / name, "ab") as file:
        if name == "model.safetensors":  # it has to stay whole
            file.truncate(file.tell() - 1)
        file.write(b"\n")
    assert identity(str(folder), hash_file) != before


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
    before = tokenizer_identity(str(folder), hash_file)
    (folder / name).parent.mkdir(exist_ok=True)
    with open(folder / name, "ab") as file:
        file.write(b"\n")
    after = tokenizer_identity(str(folder), hash_file)
    assert after != before
    (folder / "notes.md").write_text("of no consequence")
    assert tokenizer_identity(str(folder), hash_file) == after


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, and no network: what is put into it is what there is."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_adapter.cache_clear()
    yield tmp_path / "hub"
    hub_adapter.cache_clear()


def cached(hub_cache, name, commit="a" * 40):
    repository = hub_cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    return snapshot


def test_an_adapter_on_the_hub_is_one_like_any_other(hub_cache, tmp_path):
    base = save_model(tmp_path / "base")
    snapshot = cached(hub_cache, "user/adapter")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (snapshot / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, snapshot / "adapter_model.safetensors")
    for ref in ("user/adapter", "user/adapter@main", f"user/adapter@{'a' * 40}"):
        assert local_folder(ref) == snapshot
        assert adapter_base(ref) == str(base)
        check_loadable(ref)
    before = identity("user/adapter", hash_file)
    assert before["base"] == identity(str(base), hash_file)
    (snapshot / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "XLORA"}))
    with pytest.raises(SstokenError, match="adapters of the kind XLORA"):
        check_loadable("user/adapter")


def test_a_model_on_the_hub_is_no_adapter(hub_cache):
    (cached(hub_cache, "user/model") / "config.json").write_text("{}")
    assert local_folder("user/model") is None
    assert adapter_base("user/model") is None
    assert local_folder("user/nowhere") is None


def test_without_a_network_a_hub_model_is_the_cached_one(tmp_path, monkeypatch):
    from huggingface_hub import constants

    cached = tmp_path / "models--user--name"
    for place, text in {"refs/main": "abc123", "snapshots/abc123/config.json": "{}"}.items():
        (cached / place).parent.mkdir(parents=True)
        (cached / place).write_text(text)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert identity("user/name", hash_file) == {"hub": "user/name", "commit": "abc123"}
    with pytest.raises(SstokenError, match="the Hub does not answer"):
        identity("user/other", hash_file)
