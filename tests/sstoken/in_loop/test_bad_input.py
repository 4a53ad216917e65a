"""What cannot work is refused before the first step, in one line."""

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertLMHeadModel, Trainer

from sstoken import SelfModulatedMixin, SelfModulatedTrainer, SelfModulation, SstokenError, UsageError
from sstoken.in_loop.rule import check_in_loop
from sstoken.in_loop.settings import Schedule
from sstoken.methods import METHODS
from tests.factories import VOCABULARY
from tests.sstoken.in_loop.small import arguments, collate, make_examples, make_model


def refused(match, *, folder, examples=None, model=None, error=UsageError, **trainer):
    changes = trainer.pop("changes", {})
    with pytest.raises(error, match=match) as caught:
        SelfModulatedTrainer(
            make_model() if model is None else model,
            arguments(folder, **changes),
            data_collator=trainer.pop("data_collator", collate),
            train_dataset=make_examples() if examples is None else examples,
            **trainer,
        )
    assert "\n" not in str(caught.value)


def broken(change):
    """Examples of which the last but one is changed."""
    examples = make_examples()
    change(examples[-2])
    return examples


def cut(example):
    example["history_loss"] = example["history_loss"][:-1]


def lose(example):
    example["history_loss"][-1] = math.nan


def diverge(example):
    example["history_loss"][-1] = math.inf


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (cut, r"training example 22: \d+ history losses for \d+ tokens"),
        (lose, r"training example 22: history_loss is nan at token \d+"),
        (diverge, r"training example 22: history_loss is inf at token \d+"),
    ],
)
def test_history_losses_are_looked_at_before_any_step(tmp_path, change, match, as_dataset):
    examples = broken(change)
    refused(match, folder=tmp_path, examples=Dataset.from_list(examples) if as_dataset else examples)


def test_an_example_is_named_by_its_id(tmp_path):
    examples = [e | {"example_id": f"row-{i}"} for i, e in enumerate(broken(cut))]
    refused("training example row-22", folder=tmp_path, examples=Dataset.from_list(examples))
    refused("training example row-22", folder=tmp_path, examples=examples)


def test_examples_without_history_losses(tmp_path):
    rows = make_examples()
    without = [{k: v for k, v in row.items() if k != "history_loss"} for row in rows]
    refused("no column 'history_loss'", folder=tmp_path, examples=Dataset.from_list(without))
    refused("training example 0 has no history_loss", folder=tmp_path, examples=without)
    refused("no column 'labels'", folder=tmp_path, examples=Dataset.from_list(rows).remove_columns("labels"))


def test_losses_are_not_needed_where_nothing_looks_at_them(tmp_path):
    without = [{k: row[k] for k in ("input_ids", "labels")} for row in make_examples()]
    trainer = SelfModulatedTrainer(
        make_model(),
        arguments(tmp_path),
        data_collator=collate,
        train_dataset=without,
        selection=SelfModulation(gamma=0),
    )
    trainer.train()
    assert "selection/rel_kept" not in trainer.state.log_history[0]
    assert "selection/attention_kept" in trainer.state.log_history[0]


def test_a_streamed_dataset_is_checked_as_it_comes(tmp_path):
    stream = Dataset.from_list(broken(cut)).to_iterable_dataset()
    trainer = SelfModulatedTrainer(
        make_model(), arguments(tmp_path, max_steps=9), data_collator=collate, train_dataset=stream
    )
    with pytest.raises(
        UsageError, match=r"the training example that starts with the tokens .* history losses for"
    ):
        trainer.train()


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_is_not_there(tmp_path, layer):
    refused(
        f"layer {layer}: the model has 2 layers; legal is -2 to 1",
        folder=tmp_path,
        selection=SelfModulation(layer=layer),
    )


def test_attention_that_cannot_be_captured(tmp_path):
    refused("'eager': its attention cannot be captured", folder=tmp_path, model=make_model("eager"))

    class Own(torch.nn.Module):
        """Attention that asks no interface."""

        layer_idx = 1

        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    model = make_model()
    model.model.layers[1].self_attn = Own()
    given = {"folder": tmp_path, "model": model}
    selection = SelfModulation(layer=1)
    refused("attention of layer 1 cannot be captured", selection=selection, error=SstokenError, **given)
    model.model.layers[0].self_attn = Own()
    refused("its attention cannot be captured, as it does not go through", **given)


def test_the_base_of_a_model_without_adapter(tmp_path):
    refused("this model has none", folder=tmp_path, selection=SelfModulation(history="base"))


def test_settings_of_the_trainer_that_contradict(tmp_path):
    refused("compute_loss_func is set", folder=tmp_path, compute_loss_func=lambda *a, **k: None)
    refused("label_smoothing_factor is set", folder=tmp_path, changes={"label_smoothing_factor": 0.1})


def test_a_collator_that_changes_the_tokens(tmp_path):
    def reversing(features):
        return collate(features[::-1])

    trainer = SelfModulatedTrainer(
        make_model(), arguments(tmp_path), data_collator=reversing, train_dataset=make_examples()
    )
    with pytest.raises(SstokenError, match="history losses cannot follow"):
        trainer.train()


def test_a_trainer_that_calls_the_model_twice(tmp_path):
    class Twice(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, dict(inputs), *args, **kwargs) + super().compute_loss(
                model, inputs, *args, **kwargs
            )

    class Selecting(SelfModulatedMixin, Twice):
        pass

    trainer = Selecting(
        make_model(), arguments(tmp_path), data_collator=collate, train_dataset=make_examples()
    )
    with pytest.raises(SstokenError, match="calls the model 2 times"):
        trainer.train()


def test_a_history_of_weights_cannot_be_resumed(tmp_path):
    def trainer(steps):
        return SelfModulatedTrainer(
            make_model(),
            arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2),
            data_collator=collate,
            train_dataset=make_examples(),
            selection=SelfModulation(history="ema"),
        )

    trainer(2).train()
    with pytest.raises(SstokenError, match="cannot go on from step 2"):
        trainer(4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rho": 0}, "rho is 0"),
        ({"rho": 1.2}, "rho is 1.2"),
        ({"rho": Schedule(1.0, 0.0)}, "rho is 0.0"),
        ({"gamma": -0.1}, "gamma is -0.1"),
        ({"gamma": Schedule(0.5, 2)}, "gamma is 2"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"layer": "lst"}, "layer is 'lst'; legal: 'last', or the number of a layer"),
        ({"scope": "row"}, "scope is 'row'; legal: sample, turn, batch"),
        ({"history": "past"}, "history is 'past'; legal: scores, base, ema, snapshot"),
        ({"history_every": 3}, "belong to 'ema' and 'snapshot'"),
        ({"offload_history": True}, "belong to 'ema' and 'snapshot'"),
        ({"history": "snapshot", "history_decay": 0.9}, "belongs to 'ema'"),
        ({"history": "ema", "history_decay": 1.0}, "must lie between 0 and 1"),
        ({"history": "snapshot", "history_every": 0}, "must be at least 1"),
    ],
)
def test_settings_out_of_range(settings, match):
    with pytest.raises(UsageError, match=match):
        SelfModulation(**settings)


def test_a_schedule_that_is_not_known():
    with pytest.raises(UsageError, match="legal: linear, cosine"):
        Schedule(0.5, 1, "step")


def test_schedules():
    settings = SelfModulation(rho=Schedule(1.0, 0.5), gamma=Schedule(0.2, 0.8, "cosine"), warmup_steps=2)
    assert [settings.rule(step, 7).method.name for step in range(3)] == ["full", "full", "sstoken"]
    params = [settings.rule(step, 7).params for step in range(2, 7)]
    assert [(p.rho, p.gamma) for p in params] == [
        (1.0, 0.2),
        (0.875, 0.287868),
        (0.75, 0.5),
        (0.625, 0.712132),
        (0.5, 0.8),
    ]
    assert SelfModulation(rho=0.3).rule(0, 1).params.model_dump() == {"rho": 0.3, "gamma": 0.5}


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_base_that_the_adapter_took_part_of(tmp_path, kind):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=kind)
    refused(
        f"init_lora_weights='{kind}' moves part of the base",
        folder=tmp_path,
        model=get_peft_model(make_model(), config),
        selection=SelfModulation(history="base"),
    )


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens(tmp_path, kind):
    model = get_peft_model(make_model(), kind(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    refused(f"{model.active_peft_config.peft_type.value} puts virtual tokens", folder=tmp_path, model=model)


def test_models_that_are_not_causal(tmp_path):
    selection = SelfModulation(history="ema")
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    seq2seq = BartForConditionalGeneration(
        BartConfig(**sizes, encoder_attention_heads=2, decoder_attention_heads=2)
    )
    refused("is an encoder-decoder", folder=tmp_path, model=seq2seq, selection=selection)
    torch.manual_seed(0)
    encoder = BertLMHeadModel(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
            initializer_range=0.2,
        )
    )  # fmt: skip
    refused(
        "prediction depends on the tokens after it",
        folder=tmp_path,
        model=encoder,
        selection=selection,
        error=SstokenError,
    )


def test_weights_in_float64_train(tmp_path):
    trainer = SelfModulatedTrainer(
        make_model().double(), arguments(tmp_path), data_collator=collate, train_dataset=make_examples()
    )
    assert trainer.train().global_step == 3


def test_the_table_of_methods_says_which_run_in_the_loop():
    def runs(method):
        for history in ("scores", "base"):
            try:
                check_in_loop(method, history)
            except UsageError:
                continue
            return True
        return False

    assert {m.name: m.runs_in_loop for m in METHODS.values()} == {m.name: runs(m) for m in METHODS.values()}
    theirs = replace(METHODS["loss"], name="theirs")
    for signal in ("loss", "attention", "attention@0", "attention_predicting", "kl@history", "unknown"):
        method = replace(theirs, inputs=(f"current.{signal}",))
        assert method.runs_in_loop == runs(method), signal
