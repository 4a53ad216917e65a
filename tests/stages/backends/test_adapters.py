"""Adapters of every kind: losses as peft's own model gives them, and the base bit-equal afterwards."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sstoken.errors import SstokenError
from sstoken.stages.adapter_kinds import SUPPORTED
from sstoken.stages.backends import BackendOptions, base_models, make_backend
from sstoken.stages.checkpoints import check_loadable
from tests.factories import VOCABULARY, save_tokenizer
from tests.support import slow_but

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = np.random.default_rng(0).integers(1, VOCABULARY, 24).astype(np.int32)
MASK = np.arange(IDS.size) >= 5


def lora(**settings):
    settings = {"target_modules": TARGETS, "init_lora_weights": False} | settings
    return lambda: peft.LoraConfig(r=4, **settings)


def other(kind, **settings):
    settings = {"target_modules": TARGETS, "init_weights": False} | settings
    return lambda: getattr(peft, f"{kind}Config")(**{k: v for k, v in settings.items() if v is not ...})


KINDS = {
    "plain": lora(),
    "bias all": lora(bias="all"),
    "bias lora_only": lora(bias="lora_only"),
    "lora_bias": lora(lora_bias=True),
    "DoRA": lora(use_dora=True),
    "rsLoRA": lora(use_rslora=True),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "embeddings saved": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "only embed_tokens saved": lora(modules_to_save=["embed_tokens"]),
    "norm saved": lora(modules_to_save=["norm"]),
    "tied and saved": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "token indices": lora(trainable_token_indices=[3, 5]),
    "on embed_tokens": lora(target_modules=[*TARGETS, "embed_tokens"]),
    "on lm_head": lora(target_modules=[*TARGETS, "lm_head"]),
    "DoRA on lm_head": lora(target_modules=[*TARGETS, "lm_head"], use_dora=True),
    "all-linear": lora(target_modules="all-linear"),
    "parameters": lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "ADALORA": other("AdaLora", init_weights=..., init_lora_weights=False, total_step=10),
    "BOFT": other("BOFT", boft_block_size=4),
    "C3A": other("C3A", block_size=4),
    "DELORA": other("Delora"),
    "FOURIERFT": other("FourierFT", n_frequency=10),
    "GRALORA": other("Gralora", r=4),
    "HIRA": other("Hira"),
    "HRA": other("HRA"),
    "IA3": other("IA3", init_weights=..., feedforward_modules=["down_proj"]),
    "LN_TUNING": other("LNTuning", init_weights=..., target_modules=["input_layernorm", "norm"]),
    "LOHA": other("LoHa"),
    "LOKR": other("LoKr"),
    "MISS": other("Miss", r=4),
    "OFT": other("OFT", oft_block_size=4),
    "RANDLORA": other("RandLora", r=4),
    "ROAD": other("Road", group_size=8),
    "SHIRA": other("Shira", r=4),
    "TRAINABLE_TOKENS": other("TrainableTokens", token_indices=[3, 4], target_modules=["embed_tokens"]),
    "VBLORA": other("VBLoRA", init_weights=..., vector_length=4, num_vectors=8),
    "VERA": other("Vera", target_modules=["q_proj"]),
    "VERA without projection": other("Vera", target_modules=["q_proj"], save_projection=False),
    "WAVEFT": other("WaveFT", n_frequency=10),
}
MATTER_WHERE_UNTIED = {k for k in KINDS if "saved" in k or " on" in k or "on " in k or "token" in k} - {
    "tied and saved"
}
QUICK = ("plain", "embeddings saved", "token indices", "DoRA on lm_head", "PiSSA", "LOHA", "IA3")


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request, tmp_path_factory):
    """With biases, all of them far from 0."""
    folder = tmp_path_factory.mktemp("models") / request.param
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=request.param == "tied",
            bos_token_id=None,
            eos_token_id=0,
            initializer_range=0.2,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def trained(base, folder, config, rows=VOCABULARY):
    """An adapter as training leaves it, saved; its losses."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows != VOCABULARY:
        model.resize_token_embeddings(rows)
    config.task_type = "CAUSAL_LM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data += 0.05 * torch.randn_like(parameter)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(folder)
    with torch.no_grad():
        log_p = adapted(torch.tensor(IDS[None]).long()).logits[0].log_softmax(-1)
    return -log_p[torch.arange(IDS.size - 1), torch.tensor(IDS[1:]).long()].numpy()[MASK[1:]]


def measured(path):
    options = BackendOptions(str(path), ("loss", "attention"), -1, "float32", "cpu", 512, False)
    [(_, signals)] = list(make_backend("hf", options).measure([IDS], [MASK]))
    return signals["loss"], signals["attention"]


def state():
    [shared] = base_models.shared_base.held.values()
    return {name: tensor.clone() for name, tensor in shared.model.state_dict().items()}


def assert_base_is_itself(base, before, signals):
    for left, right in zip(measured(base), signals, strict=True):
        np.testing.assert_array_equal(left, right)
    after = state()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", slow_but(QUICK, KINDS))
def test_an_adapter_gives_its_losses_and_leaves_the_base(kind, base, tmp_path):
    if base.name == "untied" and kind not in MATTER_WHERE_UNTIED:
        pytest.skip("nothing to do with the output embedding")
    alone = measured(base)
    before = state()
    expected = trained(base, tmp_path / "adapter", KINDS[kind]())
    assert np.abs(expected - alone[0]).max() > 1e-4
    check_loadable(str(tmp_path / "adapter"))
    np.testing.assert_allclose(measured(tmp_path / "adapter")[0], expected, atol=2e-5)
    assert_base_is_itself(base, before, alone)


@pytest.mark.slow
def test_adapters_of_all_kinds_one_after_the_other(base, tmp_path):
    expected = {}
    for kind in ("plain", "embeddings saved", "rsLoRA", "bias all", "PiSSA", "LOHA", "norm saved", "DoRA"):
        expected[kind] = trained(base, tmp_path / kind, KINDS[kind]())
    for kind in (*expected, *reversed(expected)):
        np.testing.assert_allclose(measured(tmp_path / kind)[0], expected[kind], atol=2e-5)


def test_plain_adapters_do_not_load_the_base_again(base, tmp_path, monkeypatch):
    for kind in ("plain", "DoRA", "rsLoRA"):
        trained(base, tmp_path / kind, KINDS[kind]())
    measured(base)

    def refuse(*args, **kwargs):
        raise AssertionError("loaded again")

    monkeypatch.setattr(base_models, "load_model", refuse)
    for path in (tmp_path / "plain", tmp_path / "DoRA", base, tmp_path / "rsLoRA", base):
        measured(path)


def cut(weights):
    return dict(list(weights.items())[: len(weights) // 2])


def renamed(weights):
    return {name.replace("layers.1", "layers.7"): tensor for name, tensor in weights.items()}


def misshapen(weights):
    return {name: tensor[..., :-1].contiguous() for name, tensor in weights.items()}


BROKEN = {
    "half of it": (cut, "weights are missing or NaN"),
    "of a deeper model": (renamed, "weights are missing or NaN"),
    "more than there is room for": (
        lambda w: w | {k: v.clone() for k, v in renamed(w).items()},
        "have no place in the base",
    ),
    "of a wider model": (misshapen, "size mismatch for .* belongs to another base model"),
}


@pytest.mark.parametrize("kind", slow_but(QUICK, ["plain", "DoRA", "bias all", "embeddings saved"]))
@pytest.mark.parametrize("how", BROKEN)
def test_an_adapter_that_does_not_load_leaves_the_base(how, kind, base, tmp_path):
    change, words = BROKEN[how]
    alone = measured(base)
    before = state()
    trained(base, tmp_path / "adapter", KINDS[kind]())
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(SstokenError) as refused:
        measured(tmp_path / "adapter")
    assert "\n" not in str(refused.value)
    assert "above" not in str(refused.value)
    if kind != "embeddings saved":
        assert refused.match(words)
    assert_base_is_itself(base, before, alone)


RESIZED = {
    "both saved": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "tied": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "by peft itself": lora(),
}


@pytest.mark.parametrize("added", [1, 5])
@pytest.mark.parametrize("how", RESIZED)
def test_an_adapter_with_tokens_of_its_own(how, added, base, tmp_path):
    """Its embeddings have more rows than the base's."""
    if how == "tied" and base.name == "untied":
        pytest.skip("not for this base")
    alone = measured(base)
    before = state()
    expected = trained(base, tmp_path / "adapter", RESIZED[how](), VOCABULARY + added)
    np.testing.assert_allclose(measured(tmp_path / "adapter")[0], expected, atol=2e-5)
    assert_base_is_itself(base, before, alone)


def test_output_rows_that_were_not_saved_stay_out_of_the_softmax(base, tmp_path):
    config = KINDS["only embed_tokens saved"]()
    rows = VOCABULARY + 3
    trained(base, tmp_path / "adapter", config, rows)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    saved = {k: v for k, v in load_file(file).items() if not k.endswith("lm_head.weight")}
    save_file(saved, file)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        log_p = adapted(torch.tensor(IDS[None]).long()).logits[0, :, :VOCABULARY].log_softmax(-1)
    expected = -log_p[torch.arange(IDS.size - 1), torch.tensor(IDS[1:]).long()].numpy()[MASK[1:]]
    if base.name == "untied":  # tied, peft's file holds the output rows under the input's name
        np.testing.assert_allclose(measured(tmp_path / "adapter")[0], expected, atol=2e-5)


def test_an_adapter_of_a_larger_base_is_refused(base, tmp_path):
    trained(base, tmp_path / "adapter", KINDS["embeddings saved"]())
    larger = Path(shutil.copytree(base, tmp_path / "larger"))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY + 8)
    model.save_pretrained(larger)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = "../larger"
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        SstokenError, match=f"{VOCABULARY} rows, its base's {VOCABULARY + 8}; set base_model_name"
    ):
        measured(tmp_path / "adapter")


@pytest.mark.parametrize("kind", [*sorted({kind.value for kind in peft.PeftType} - set(SUPPORTED)), None])
def test_other_kinds_are_refused_by_name_before_any_work(kind, base, tmp_path):
    config = {"peft_type": kind, "base_model_name_or_path": str(base)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SstokenError, match=f"adapters of the kind {kind} are not supported, legal is LORA"):
        check_loadable(str(tmp_path))


@pytest.mark.parametrize("setting", ["alora_invocation_tokens", "layer_replication", "use_bdlora"])
def test_settings_that_peft_alone_can_run_are_refused(setting, base, tmp_path):
    trained(base, tmp_path, KINDS["plain"]())
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {setting: [[0, 1]]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SstokenError, match=setting):
        check_loadable(str(tmp_path))


def test_every_supported_kind_is_tested():
    tested = {config().peft_type.value for config in KINDS.values()}
    assert tested == set(SUPPORTED)
