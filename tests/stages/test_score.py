"""The score stage: adapters share their base, shards are independent, refusals are clear."""

import gc
import re
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import tables
from sstoken.stages.backends import BackendOptions, base_models, make_backend
from sstoken.stages.score import Score, compared
from tests.factories import VOCABULARY, random_model, save_model, save_tokenizer
from tests.stages.context import ProcessEngine, make_context

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def tokens(tmp_path):
    """Three shards, as encode writes them."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    random = np.random.default_rng(0)
    from sstoken.stages.checkpoints import tokenizer_fingerprint

    facts = {"fingerprint": tokenizer_fingerprint(save_tokenizer(folder / "tokenizer")), "name": "tiny"}
    for part in range(3):
        lengths = random.integers(2, 30, 7)
        table = pa.Table.from_pylist(
            [
                {
                    "example_id": f"{part}-{i}",
                    "input_ids": random.integers(1, VOCABULARY, n).tolist(),
                    "response_mask": [j >= max(1, n // 3) for j in range(n)],
                }
                for i, n in enumerate(lengths)
            ],
            schema=tables.TOKENS,
        )
        tables.write_part(folder / tables.part_name(part), table, {"tokenizer": facts})
    return folder


def score(tokens, out, checkpoint, **fields):
    stage = Score(checkpoint=str(checkpoint), attention=True, device="cpu", **fields)
    metrics = stage.run(make_context(out, {"tokens": tokens}))
    return pa.concat_tables([pq.read_table(p) for p in tables.parts(out)]), metrics


def direct_losses(model, ids):
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [None, *(-log_p[i - 1, ids[i]].item() for i in range(1, len(ids)))]


def add_lora(base, folder, seed, **settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **settings
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return adapted.eval()


def test_rows_are_aligned_and_off_response_is_null(tokens, model, tmp_path):
    table, metrics = score(tokens, tmp_path / "scores", model)
    rows = pa.concat_tables([pq.read_table(p) for p in tables.parts(tokens)])
    assert table["example_id"].to_pylist() == rows["example_id"].to_pylist()
    reference = AutoModelForCausalLM.from_pretrained(model)
    for row, scored in zip(rows.to_pylist(), table.to_pylist(), strict=True):
        expected = direct_losses(reference, row["input_ids"])
        for loss, attention, is_response, value in zip(
            scored["loss"], scored["attention"], row["response_mask"], expected, strict=True
        ):
            assert (loss is None) == (attention is None) == (not is_response)
            if is_response:
                assert loss == pytest.approx(value, abs=1e-5)
                assert 0 <= attention <= 1
    assert metrics["examples"] == 21
    losses = [x for row in table["loss"].to_pylist() for x in row if x is not None]
    assert metrics["mean_loss"] == pytest.approx(np.mean(losses))
    assert metrics["response_tokens"] == len(losses)


@pytest.mark.parametrize(
    ("asked", "stored"), [("auto", "bfloat16"), ("auto", "float32"), ("float16", "bfloat16")]
)
def test_the_dtype_that_was_used_is_recorded(asked, stored, tokens, tmp_path):
    folder = save_model(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folder).to(getattr(torch, stored)).save_pretrained(folder)
    score(tokens, tmp_path / "scores", folder, dtype=asked)
    used = stored if asked == "auto" else asked
    assert {tables.read_metadata(part)["dtype"] for part in tables.parts(tmp_path / "scores")} == {used}


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_windows_of_a_long_example_give_each_token_the_nearest_context(stride, tokens, tmp_path):
    folder = save_model(tmp_path / "short", positions=8)
    stage = Score(checkpoint=str(folder), stride=stride, device="cpu", signals=("loss", "entropy"))
    metrics = stage.run(make_context(tmp_path / "scores", {"tokens": tokens}))
    rows = pa.concat_tables([pq.read_table(p) for p in tables.parts(tokens)]).to_pylist()
    scored = pa.concat_tables([pq.read_table(p) for p in tables.parts(tmp_path / "scores")]).to_pylist()
    model = AutoModelForCausalLM.from_pretrained(folder)
    for row, found in zip(rows, scored, strict=True):
        ids, end = row["input_ids"], 8
        for place, is_response in enumerate(row["response_mask"]):
            if not is_response:
                assert found["loss"][place] is found["entropy"][place] is None
                continue
            while place >= end:  # the first window that reaches the token
                end += stride
            start = max(0, min(end, len(ids)) - 8)
            with torch.no_grad():
                log_p = model(torch.tensor([ids[start:place]])).logits[0, -1].log_softmax(-1)
            assert found["loss"][place] == pytest.approx(-log_p[ids[place]].item(), abs=1e-5)
            assert found["entropy"][place] == pytest.approx(-(log_p.exp() @ log_p).item(), abs=1e-5)
    longer = sum(len(row["input_ids"]) > 8 for row in rows)
    assert metrics["in_windows"] == longer > 0
    assert f"{longer} of 21 examples in windows, a stride of {stride} tokens" in metrics["computed_with"]


def test_a_stride_changes_nothing_that_fits(tokens, model, tmp_path):
    plain, _ = score_losses(tokens, tmp_path / "plain", model)
    again, metrics = score_losses(tokens, tmp_path / "again", model, stride=5)
    assert again.equals(plain)
    assert metrics["in_windows"] == 0


def score_losses(tokens, out, checkpoint, **fields):
    metrics = Score(checkpoint=str(checkpoint), device="cpu", **fields).run(
        make_context(out, {"tokens": tokens})
    )
    return pa.concat_tables([pq.read_table(p) for p in tables.parts(out)]), metrics


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"attention": True}, "a window may lack the prompt, which attention needs; .*--attention-from none"),
        (
            {"signals": ("loss", "loss_unconditional")},
            "a window may lack the prompt, which loss_unconditional needs",
        ),
    ],
)
def test_windows_give_no_signal_that_needs_the_prompt(fields, reason, model):
    with pytest.raises(UsageError, match=f"stride is 4: {reason}"):
        Score(checkpoint=str(model), stride=4, **fields).check()


def test_a_stride_without_context_is_refused(tokens, tmp_path):
    folder = save_model(tmp_path / "short", positions=8)
    with pytest.raises(
        UsageError, match="stride is 8, and the model takes 8 tokens; legal is 1 <= stride < 8"
    ):
        score_losses(tokens, tmp_path / "o", folder, stride=8)


def test_adapters_share_the_base_and_are_swapped(tokens, model, tmp_path):
    """Base, adapter, other adapter, base again: each gives its own losses, and the base is loaded once."""
    base_models.shared_base.held.clear()
    references = {"base": AutoModelForCausalLM.from_pretrained(model)}
    for seed, name in enumerate(("first", "second")):
        references[name] = add_lora(model, tmp_path / name, seed)
    row = pq.read_table(tables.parts(tokens)[0]).to_pylist()[0]
    ids, mask = np.array(row["input_ids"], dtype=np.int32), np.array(row["response_mask"])
    seen, bases = [], set()
    for name in ("base", "first", "second", "base"):
        path = model if name == "base" else tmp_path / name
        options = BackendOptions(str(path), ("loss", "attention"), -1, "float32", "cpu", 512, False)
        [(_, signals)] = list(make_backend("hf", options).measure([ids], [mask]))
        expected = direct_losses(references[name], row["input_ids"])
        np.testing.assert_allclose(signals["loss"], np.array(expected, dtype=float)[mask], atol=1e-5)
        seen.append(signals["loss"])
        bases.update(map(id, base_models.shared_base.held.values()))
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    assert np.abs(seen[1] - seen[2]).max() > 1e-3
    np.testing.assert_array_equal(seen[0], seen[3])
    assert len(bases) == 1


def test_an_adapter_that_was_trained_again_is_loaded_again(tokens, model, tmp_path):
    losses = []
    for seed in range(2):
        add_lora(model, tmp_path / "adapter", seed)
        losses.append(score(tokens, tmp_path / f"scores-{seed}", tmp_path / "adapter")[1]["mean_loss"])
    assert abs(losses[0] - losses[1]) > 1e-4


def test_the_last_checkpoint_is_let_go_before_the_next_is_loaded(tokens, model, tmp_path, monkeypatch):
    """Two large models need not fit into memory."""
    other = save_model(tmp_path / "other")
    score(tokens, tmp_path / "first", model)
    loaded = weakref.ref(next(iter(base_models.shared_base.held.values())).model)
    load_model, gone = base_models.load_model, []

    def load(*args, **kwargs):
        gc.collect()
        gone.append(loaded() is None)
        return load_model(*args, **kwargs)

    monkeypatch.setattr(base_models, "load_model", load)
    score(tokens, tmp_path / "second", other)
    assert gone == [True]


def test_shards_that_are_there_are_not_scored_again(tokens, model, tmp_path):
    whole, _ = score(tokens, tmp_path / "whole", model)
    out = tmp_path / "resumed"
    out.mkdir()
    done = out / tables.part_name(1)
    done.write_bytes((tmp_path / "whole" / tables.part_name(1)).read_bytes())
    stamp = done.stat().st_mtime_ns
    resumed, _ = score(tokens, out, model)
    assert done.stat().st_mtime_ns == stamp
    for part in range(3):
        name = tables.part_name(part)
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(tokens, model, tmp_path):
    score(tokens, tmp_path / "one", model)
    context = make_context(tmp_path / "two", {"tokens": tokens})
    stage = Score(checkpoint=str(model), attention=True, device="cpu", workers=2)
    object.__setattr__(context, "engine", ProcessEngine(2))
    stage.run(context)
    for part in tables.parts(tmp_path / "one"):
        assert part.read_bytes() == (tmp_path / "two" / part.name).read_bytes()


def test_another_tokenizer_is_refused(tokens, tmp_path):
    other = save_model(tmp_path / "other")
    save_tokenizer(other, first="x")
    with pytest.raises(
        SstokenError, match=r"other: its tokenizer is not the one that made the tokens \(tiny\)"
    ):
        score(tokens, tmp_path / "scores", other)


def test_a_smaller_vocabulary_is_refused(tokens, tmp_path):
    small = save_model(tmp_path / "small", vocabulary=64)
    with pytest.raises(SstokenError, match=r"has token id \d+, beyond the model's vocabulary of 64"):
        score(tokens, tmp_path / "scores", small)


def test_an_example_longer_than_the_model_is_refused(tokens, tmp_path):
    short = save_model(tmp_path / "short", positions=8)
    with pytest.raises(
        SstokenError,
        match=r"has \d+ tokens, the model takes 8; encode with --max-length 8, or score with --stride",
    ):
        score(tokens, tmp_path / "scores", short)


def test_a_broken_checkpoint_names_shard_and_example(tokens, tmp_path):
    broken = save_model(tmp_path / "broken")
    loaded = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        loaded.model.norm.weight.fill_(float("nan"))
    loaded.save_pretrained(broken)
    with pytest.raises(
        SstokenError, match=r"broken: NaN or infinite loss in part-00000.parquet, example '0-\d'"
    ):
        score(tokens, tmp_path / "scores", broken)


@pytest.mark.parametrize(
    ("signal", "masks", "names"),
    [
        ("kl@other", "other", "other {other} gives .* to which {this} does not"),
        ("kl_at@other", "other", "other {other} gives .* to which {this} does not"),
        ("reverse_kl@other", "this", "{this} gives .* to which other {other} does not"),
    ],
)
def test_a_divergence_from_a_checkpoint_that_masks_tokens_is_explained(
    tokens, tmp_path, signal, masks, names
):
    """The masked tokens have logits of minus infinity, and no token of the data is one of them."""
    places = {name: tmp_path / name for name in ("this", "other")}
    for seed, (name, place) in enumerate(places.items()):
        loaded = random_model("phi", seed, vocab_size=VOCABULARY + 8, **SMALL)
        if name == masks:
            with torch.no_grad():
                loaded.lm_head.bias[VOCABULARY:] = -torch.inf
        loaded.save_pretrained(place)
    wanted = names.format(this=places["this"], other=re.escape(f"({places['other']})"))
    against = {"signals": (signal,), "references": {"other": str(places["other"])}}
    with pytest.raises(
        SstokenError,
        match=rf"{signal} is infinite in part-00000.parquet, example '0-\d': {wanted}; leave the signal out",
    ):
        score(tokens, tmp_path / "scores", places["this"], **against)


def test_a_layer_out_of_range_is_refused(tokens, model, tmp_path):
    with pytest.raises(UsageError, match=r"layer 2: the model has 2 layers"):
        score(tokens, tmp_path / "scores", model, layer=2)


def test_an_unknown_backend_is_refused(model):
    with pytest.raises(UsageError, match="backend 'tgi' is not known; legal: auto, hf"):
        make_backend(
            "tgi", BackendOptions(str(model), ("loss", "attention"), -1, "float32", "cpu", 512, False)
        )


def test_the_default_layer_is_the_last_with_softmax_attention(tokens, tmp_path):
    """A hybrid that ends in convolutions: the layer that was measured is recorded with the scores."""
    from tests.sstoken.measure.tiny_architectures import make_tiny

    folder = tmp_path / "hybrid"
    make_tiny("lfm2").save_pretrained(folder)
    score(tokens, tmp_path / "scores", folder)
    assert {tables.read_metadata(p)["layer"] for p in tables.parts(tmp_path / "scores")} == {1}
    with pytest.raises(
        UsageError, match="layer -1: layer 3 of Lfm2ForCausalLM has no softmax attention; legal is 1"
    ):
        score(tokens, tmp_path / "last", folder, layer=-1)


@pytest.mark.parametrize("kind", ["mpt", "falcon", "gptj"])
def test_attention_that_cannot_be_measured_is_refused_by_the_architectures_name(kind, tokens, tmp_path):
    from tests.sstoken.measure.tiny_architectures import make_tiny

    model = make_tiny(kind)
    model.save_pretrained(tmp_path / kind)
    with pytest.raises(
        UsageError, match=f"{type(model).__name__}: its attention cannot be measured, .*attention-from none"
    ):
        score(tokens, tmp_path / "scores", tmp_path / kind)
    Score(checkpoint=str(tmp_path / kind), device="cpu").run(
        make_context(tmp_path / "losses", {"tokens": tokens})
    )


def test_the_fingerprint_of_the_old_settings_is_the_old_one(model):
    """Scores that users hold stay finished: no field came, however the same signals are asked for."""
    loss = Score(checkpoint=str(model), device="cpu").fingerprinted()
    assert loss == {"attention": False, "backend": "hf", "dtype": "float32", "trust_remote_code": False}
    both = Score(checkpoint=str(model), attention=True).fingerprinted()
    assert both == loss | {"attention": True, "layer": None}
    assert Score(checkpoint=str(model), signals=("loss",)).fingerprinted() == loss
    assert Score(checkpoint=str(model), signals=("attention", "loss")).fingerprinted() == both
    assert Score(checkpoint=str(model), stride=4).fingerprinted() == loss | {"stride": 4}
    more = Score(checkpoint=str(model), signals=("loss", "attention@1")).fingerprinted()
    assert more == loss | {"signals": ["attention@1", "loss"]}


def test_signals_asked_for_by_name_are_columns(tokens, model, tmp_path):
    stage = Score(checkpoint=str(model), signals=("attention@0", "attention@-1", "loss"), device="cpu")
    metrics = stage.run(make_context(tmp_path / "scores", {"tokens": tokens}))
    part = tables.parts(tmp_path / "scores")[0]
    assert pq.read_table(part).column_names == ["example_id", "loss", "attention@-1", "attention@0"]
    assert tables.read_metadata(part)["layers"] == {"attention@-1": 1, "attention@0": 0}
    assert {"mean_loss", "mean_attention@-1", "mean_attention@0"} <= metrics.keys()


def test_more_signals_than_asked_for_are_as_good(model):
    few = Score(checkpoint=str(model), signals=("loss", "attention@1"))
    many = Score(checkpoint=str(model), signals=("attention@1",), attention=True).model_dump(mode="json")
    assert few.holding(many) is few  # no loss there
    many["signals"].append("loss")
    assert few.holding(many).fingerprinted() == Score.model_validate(many).fingerprinted()
    assert few.holding({"attention": True}) is few


def test_an_unknown_signal_is_refused_before_any_work(model):
    with pytest.raises(UsageError, match="signal 'los' is not known"):
        Score(checkpoint=str(model), signals=("los",)).check()


def run_score(tokens, out, **fields):
    Score(device="cpu", **fields).run(make_context(out, {"tokens": tokens}))
    return pa.concat_tables([pq.read_table(p) for p in tables.parts(out)])


def test_kl_compares_with_another_checkpoint_or_an_adapter(tokens, model, tmp_path):
    add_lora(model, tmp_path / "adapter", 3)
    ours, theirs = str(model), str(tmp_path / "adapter")
    signals = ("kl@other", "reverse_kl@other")
    there = run_score(
        tokens, tmp_path / "there", checkpoint=ours, signals=signals, references={"other": theirs}
    )
    back = run_score(
        tokens, tmp_path / "back", checkpoint=theirs, signals=signals, references={"other": ours}
    )
    itself = run_score(
        tokens, tmp_path / "itself", checkpoint=ours, signals=signals, references={"other": ours}
    )

    def flat(table, name):
        return np.array([x for row in table[name].to_pylist() for x in row if x is not None])

    assert flat(there, "kl@other").min() > 1e-4
    np.testing.assert_allclose(flat(there, "kl@other"), flat(back, "reverse_kl@other"), atol=2e-6)
    np.testing.assert_allclose(flat(there, "reverse_kl@other"), flat(back, "kl@other"), atol=2e-6)
    assert np.abs(flat(there, "kl@other") - flat(there, "reverse_kl@other")).max() > 1e-5
    assert flat(itself, "kl@other").max() < 1e-6


def test_what_it_is_compared_with_counts(model, tmp_path):
    """Another reference, another fingerprint, wherever it stands; none, the fingerprint of old."""
    other = save_model(tmp_path / "other", positions=99)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in other.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())

    def sources(**fields):
        return Score(checkpoint=str(model), **fields).sources(lambda path: str(hash(path.read_bytes())))

    assert set(sources()) == {"checkpoint"}
    assert sources(references={"x": str(other)}) == sources(references={"x": str(moved)})
    assert sources(references={"x": str(other)}) != sources(references={"x": str(model)})


def test_several_checkpoints_are_compared_by_name():
    named = {"base": "models/base", "sft": "models/sft"}
    options = {"signals": ("loss", "kl@base"), "dtype": "float32"}
    assert compared(options, "base", named) == options | {"signals": ("loss",), "references": {}}
    assert compared(options, "sft", named) == options | {"references": {"base": "models/base"}}
    with pytest.raises(UsageError, match=r"'kl@old': no checkpoint is called 'old'; legal: base, sft"):
        compared({"signals": ("kl@old",)}, "sft", named)
    with pytest.raises(UsageError, match=r"'kl@sft': it compares sft with itself; name another --ckpt"):
        compared({"signals": ("kl@sft",)}, "sft", {"sft": "models/sft"})


def test_a_reference_of_another_vocabulary_is_refused(tokens, model, tmp_path):
    larger = save_model(tmp_path / "larger", vocabulary=VOCABULARY + 8)
    with pytest.raises(
        UsageError, match=f"kl@x: its vocabulary has {VOCABULARY + 8} entries, this .* {VOCABULARY};"
    ):
        run_score(
            tokens, tmp_path / "out", checkpoint=str(model), signals=("kl@x",), references={"x": str(larger)}
        )


def test_noise_is_that_of_the_example_alone(tokens, model, tmp_path):
    """The same in batches of any size; another draw is another; without its noise it is the plain difference."""
    signals = ("loss", "loss_unconditional", "pmi_noisy@1", "pmi_noisy@2")
    found = [
        run_score(tokens, tmp_path / str(n), checkpoint=str(model), signals=signals, batch_tokens=n)
        for n in (1, 200)
    ]

    def flat(table, name):
        return np.array([np.nan if x is None else x for row in table[name].to_pylist() for x in row])

    for name in signals:
        np.testing.assert_allclose(flat(found[0], name), flat(found[1], name), atol=1e-5, err_msg=name)
    plain = flat(found[0], "loss") - flat(found[0], "loss_unconditional")
    first, second = (flat(found[0], name) for name in signals[2:])
    measured = np.isfinite(plain)
    assert np.array_equal(np.isfinite(first), measured)
    assert np.abs(first - second)[measured].mean() > 1e-3
    assert np.abs(first - plain)[measured].mean() < 2


def test_a_second_pass_alone(tokens, model, tmp_path):
    table = run_score(tokens, tmp_path / "out", checkpoint=str(model), signals=("loss_unconditional",))
    assert table.column_names == ["example_id", "loss_unconditional"]
