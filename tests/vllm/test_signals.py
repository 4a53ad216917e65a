"""Losses, attention and keep masks from vLLM against transformers' eager attention, architecture by architecture."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sstoken.errors import SstokenError
from sstoken.methods import decide
from sstoken.stages.backends import BackendOptions, make_backend
from tests.vllm.models import ARCHITECTURES, POSITIONS, VOCABULARY, save_model

ON_TWO = {
    "llama": (),
    "gemma2": (),
    **dict.fromkeys(("qwen3", "mistral", "gemma3_text"), pytest.mark.slow),
}
"""Architectures that tensor parallelism is tested with; a pair of workers starts in half a minute or more."""


def options(
    checkpoint, *, attention=True, layer=-1, dtype="float32", batch_tokens=2048, log=None, **settings
):
    signals = ("loss", "attention") if attention else ("loss",)
    return BackendOptions(
        str(checkpoint), signals, layer, dtype, "cpu", batch_tokens, False, tuple(settings.items()), log
    )


def examples():
    """From 2 to as many tokens as the model takes; of one turn and several; equal, overlapping and without response."""
    random = np.random.default_rng(0)
    lengths = [2, 3, 17, 64, 130, 255, 511, 700, POSITIONS, *random.integers(2, 400, 8).tolist()]
    sequences = [random.integers(3, VOCABULARY, n).astype(np.int32) for n in lengths]
    masks = [np.arange(n) >= random.integers(1, n) for n in lengths]
    masks[5][200:220] = False
    masks[6][40:90], masks[6][90:120] = True, False

    def add(ids, first):
        sequences.append(ids.astype(np.int32))
        masks.append(np.arange(ids.size) >= first)

    add(sequences[4], int(masks[4].argmax()))  # the same once more
    add(sequences[4], 7)  # the same tokens, another prompt
    add(sequences[4], 99)
    add(np.append(sequences[5], [5, 6, 7]), 100)  # one goes on where another ends
    add(np.full(50, 7), 10)
    add(np.array([9, 8, 7]), 3)
    return sequences, masks


def eager(checkpoint, sequences, masks, layer):
    """Straight from the definition: all logits, all attention weights."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    signals = []
    with torch.no_grad():
        for ids, mask in zip(sequences, masks, strict=True):
            out = model(torch.from_numpy(ids[None].astype(np.int64)), output_attentions=True, use_cache=False)
            log_p = out.logits[0, :-1].double().log_softmax(-1)
            loss = np.full(ids.size, np.nan)
            loss[1:] = -log_p[np.arange(ids.size - 1), ids[1:].astype(np.int64)].numpy()
            attention = out.attentions[layer][0].double().numpy() @ ~mask
            signals.append((np.where(mask, loss, np.nan), np.where(mask, attention.mean(0), np.nan)))
    return signals


def kept(losses, attentions):
    """The keep mask where another checkpoint had some other losses."""
    random = np.random.default_rng(1)
    offsets = np.cumsum([0, *map(len, losses)])
    current, attention = (np.concatenate(rows).astype(np.float64) for rows in (losses, attentions))
    history = current.round(2) + random.gamma(2.0, size=current.size)
    signals = {"history.loss": history, "current.loss": current, "current.attention": attention}
    return decide("sstoken", offsets, signals).keep


def agree(checkpoint, layer=-1, **settings):
    sequences, masks = examples()
    expected = eager(checkpoint, sequences, masks, layer)
    backend = make_backend("vllm", options(checkpoint, layer=layer, **settings))
    measured = dict(backend.measure(sequences, masks))
    assert sorted(measured) == list(range(len(sequences)))
    for i, (loss, attention) in enumerate(expected):
        np.testing.assert_allclose(measured[i]["loss"], loss[masks[i]], atol=1e-5, rtol=0)
        np.testing.assert_allclose(measured[i]["attention"], attention[masks[i]], atol=1e-6, rtol=0)
    in_order = [measured[i] for i in range(len(sequences))]
    np.testing.assert_array_equal(
        kept([s["loss"] for s in in_order], [s["attention"] for s in in_order]),
        kept(
            [loss[mask] for (loss, _), mask in zip(expected, masks, strict=True)],
            [attention[mask] for (_, attention), mask in zip(expected, masks, strict=True)],
        ),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_agrees_with_eager_attention(architecture, tmp_path):
    agree(save_model(tmp_path / "model", architecture), layer=1 if architecture == "gemma2" else -1)


@pytest.mark.parametrize("architecture", [pytest.param(name, marks=marks) for name, marks in ON_TWO.items()])
def test_it_agrees_on_two_devices(architecture, tmp_path):
    agree(save_model(tmp_path / "model", architecture), tensor_parallel_size=2)


def test_attention_can_come_from_transformers(tmp_path):
    agree(save_model(tmp_path / "model", "llama"), attention="hf")


def test_further_signals_are_what_transformers_gives(tmp_path):
    """Beside loss and attention, and by themselves."""
    model, (sequences, masks) = save_model(tmp_path / "model", "llama"), examples()
    further = ("loss_unconditional", "max_prob", "entropy_top20")
    wanted = replace(options(model), signals=("loss", "attention", *further))
    expected = dict(make_backend("hf", wanted).measure(sequences, masks))
    for signals in (wanted.signals, further[:1], further[1:2]):
        measured = dict(make_backend("vllm", replace(wanted, signals=signals)).measure(sequences, masks))
        assert sorted(measured) == list(range(len(sequences)))
        for i, found in measured.items():
            assert found.keys() == {*signals}
            for name, values in found.items():
                np.testing.assert_allclose(values, expected[i][name], atol=1e-5, rtol=0, err_msg=name)


def test_attention_alone(tmp_path):
    model = save_model(tmp_path / "model", "llama")
    sequences, masks = examples()
    expected = eager(model, sequences, masks, 0)
    for i, signals in make_backend("vllm", replace(options(model, layer=0), signals=("attention",))).measure(
        sequences, masks
    ):
        assert list(signals) == ["attention"]
        np.testing.assert_allclose(signals["attention"], expected[i][1][masks[i]], atol=1e-6, rtol=0)


def test_it_makes_room_for_longer_sequences_when_they_come(tmp_path):
    model = save_model(tmp_path / "model", "llama", max_position_embeddings=4096)
    backend = make_backend("vllm", options(model, attention=False))
    processes = []
    for length in (20, 30, 1500, 40):
        ids, mask = np.arange(3, 3 + length, dtype=np.int32) % VOCABULARY, np.arange(length) >= 5
        [(_, signals)] = backend.measure([ids], [mask])
        [(loss, _)] = eager(model, [ids], [mask], -1)
        np.testing.assert_allclose(signals["loss"], loss[mask], atol=1e-5, rtol=0)
        assert list(signals) == ["loss"]
        processes.append(backend._engine._process.pid)
    assert processes[0] == processes[1] != processes[2] == processes[3]


def save_adapter(base: Path, folder: Path, seed: int, **settings) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        **settings,
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


def test_adapters_share_an_engine_and_give_what_transformers_gives(tmp_path):
    base = save_model(tmp_path / "base", "llama")
    adapters = [save_adapter(base, tmp_path / f"step-{i}", seed=i) for i in range(2)]
    sequences, masks = examples()
    processes, losses = set(), []
    for adapter in (*adapters, adapters[0]):
        expected = dict(make_backend("hf", options(adapter)).measure(sequences, masks))
        backend = make_backend("vllm", options(adapter))
        measured = dict(backend.measure(sequences, masks))
        for i in range(len(sequences)):
            for name, apart in (("loss", 1e-5), ("attention", 1e-6)):
                np.testing.assert_allclose(measured[i][name], expected[i][name], atol=apart, rtol=0)
        processes.add(backend._engine._process.pid)
        losses.append(measured[8]["loss"])
    assert len(processes) == 1
    assert np.nanmax(np.abs(losses[0] - losses[1])) > 1e-2
    np.testing.assert_array_equal(losses[0], losses[2])


def test_what_an_adapter_has_that_vllm_lacks_is_one_line(tmp_path):
    base = save_model(tmp_path / "base", "llama")
    adapter = save_adapter(base, tmp_path / "dora", seed=0, use_dora=True)
    sequences, masks = examples()
    with pytest.raises(
        SstokenError, match=r"the adapter has use_dora=True, which vLLM does not support; use --backend hf"
    ) as caught:
        list(make_backend("vllm", options(adapter)).measure(sequences, masks))
    assert "\n" not in str(caught.value)


def test_a_layer_whose_attention_is_no_softmax_of_its_scores_is_refused_by_the_worker(tmp_path):
    """ALiBi adds to the scores what the capture would not."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=128, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    sequences, masks = examples()
    with pytest.raises(SstokenError, match=r"vLLM does not score it \(layer 1 has ALiBi biases\)"):
        list(make_backend("vllm", options(tmp_path / "bloom")).measure(sequences, masks))


def test_quantisation_is_passed_on(tmp_path):
    """vLLM itself names those that it has."""
    model = save_model(tmp_path / "model", "llama")
    with pytest.raises(SstokenError, match=r"vLLM does not score it \(.*quantization.*fp3.*"):
        list(make_backend("vllm", options(model, quantization="fp3")).measure(*examples()))


def test_bfloat16_is_what_transformers_gives_within_its_rounding(tmp_path):
    model = save_model(tmp_path / "model", "llama")
    sequences, masks = examples()
    exact = eager(model, sequences, masks, -1)
    for i, signals in make_backend("vllm", options(model, dtype="bfloat16")).measure(sequences, masks):
        np.testing.assert_allclose(signals["loss"], exact[i][0][masks[i]], atol=0.25, rtol=0)
        np.testing.assert_allclose(signals["attention"], exact[i][1][masks[i]], atol=0.02, rtol=0)
