"""A model is what its files hold, or is refused: config.json and the weights have to agree."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sstoken.errors import SstokenError
from sstoken.stages.backends import BackendOptions, make_backend
from sstoken.stages.checkpoints import check_loadable
from sstoken.stages.loading import load_model
from tests.factories import save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def model(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "model"))


def configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def more(name, *shape):
    return lambda weights: weights | {name: torch.ones(*shape)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 1}, r"9 weights .* no place in the model .* \(first: model.layers.1."),
        ({"num_hidden_layers": 3}, r"9 weights are missing \(first: model.layers.2."),
        ({"vocab_size": 150}, r"embed_tokens.weight is \[128, 32\] in the files, \[150, 32\] by config.json"),
        ({"hidden_size": 64}, r"is \[128, 32\] in the files, \[128, 64\] by config.json"),
        ({"model_type": "unheard_of"}, "does not know model_type 'unheard_of'; update transformers"),
    ],
)
def test_a_config_of_another_model_is_refused(changes, words, model):
    configure(model, **changes)
    with pytest.raises(SstokenError, match=words) as refused:
        load_model(str(model))
    assert "above" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        more("model.layers.0.self_attn.q_proj.bias", 32),
        more("model.layers.0.mlp.up_proj.weight_scale_inv", 1, 1),
        more("model.layers.1.mlp.up_proj.lora_A.default.weight", 4, 32),
    ],
)
def test_weights_that_belong_to_a_module_of_the_model_are_not_left_out(change, model):
    rewrite(model, change)
    with pytest.raises(SstokenError, match="1 weights in its files have no place in the model"):
        load_model(str(model))


@pytest.mark.parametrize(
    "name",
    [
        "v_head.summary.weight",  # a value head
        "model.layers.0.self_attn.k_proj.k_scale",  # of a quantised cache
        "model.layers.2.eh_proj.weight",  # a layer that predicts the token after the next
        "model.layers.0.self_attn.masked_bias",  # a buffer of old versions
    ],
)
def test_what_the_model_does_without_is_said(name, model):
    rewrite(model, more(name, 32))
    loaded, unused = load_model(str(model))
    assert unused == [name]
    options = BackendOptions(str(model), ("loss",), None, "float32", "cpu", 64, False)
    assert f"weights that are not used: 1, such as {name}" in make_backend("hf", options).remark


def test_names_of_a_wrapper_are_shown(model):
    rewrite(model, lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()})
    with pytest.raises(SstokenError, match=r"weights are missing .*; its files hold module\.model\."):
        load_model(str(model))


def test_a_classifier_is_no_language_model(model):
    configure(model, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(SstokenError, match="LlamaForSequenceClassification, which predicts no tokens"):
        check_loadable(str(model))


def test_code_of_its_own_is_asked_for(model):
    configure(model, model_type="own", auto_map={"AutoConfig": "a.A", "AutoModelForCausalLM": "b.B"})
    with pytest.raises(SstokenError, match="pass --trust-remote-code to run it"):
        load_model(str(model))
