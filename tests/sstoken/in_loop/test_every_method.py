"""Every method of the registry decides in the loop as it does offline, or is refused with the reason.

The model of each step is saved, measured the slow way (all logits, eager attention, float64) and judged by numpy.
"""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from sstoken import (
    SelfModulatedSFTTrainer,
    SelfModulatedTrainer,
    SelfModulation,
    UsageError,
)
from sstoken.in_loop.rule import column_of
from sstoken.in_loop.settings import Schedule
from sstoken.methods import METHODS, Tokens, Weight, get_method
from tests.sstoken.in_loop.small import (
    SETTINGS,
    Watcher,
    arguments,
    collate,
    dumping,
    flatten,
    make_examples,
    make_model,
    save_tokenizer,
)
from tests.support import slow_but

STEPS = 2
QUICK = ("sstoken", "stm-dpf", "prift-mass", "iw-sft", "eksft", "eksft-aligned")
"""Methods tried outside of slow tests: one of each kind of rule, role and weight."""


def plain_signals(model, ids, reference=None):
    """Every signal of each token by name [n], from all logits in float64; index i speaks of token i."""
    with torch.no_grad():
        log_p = model(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
        if reference is not None:
            log_q = reference(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
    p, own = log_p.exp(), torch.tensor([*ids[1:], 0])[:, None]
    of_own, order = log_p.gather(1, own), p.sort(1, descending=True).values
    larger, top = log_p > of_own, log_p.topk(20, 1).values.log_softmax(1)
    entropy = -(p * log_p).sum(1)
    predicting = {
        "loss": -of_own[:, 0],
        "entropy": entropy,
        "varentropy": (p * (log_p + entropy[:, None]) ** 2).sum(1),
        "entropy_top20": -(top.exp() * top).sum(1),
        "rank": larger.sum(1),
        "ties": (log_p == of_own).sum(1) - 1,
        "mass_above": (p * larger).sum(1),
        "max_prob": p.amax(1),
        "sum_p2": (p * p).sum(1),
        "expected_rank": order @ torch.arange(1.0, p.shape[1] + 1).double(),
    }
    found = {name: np.r_[0.0, values.numpy()[:-1]] for name, values in predicting.items()}
    found["entropy_at"] = entropy.numpy()
    if reference is not None:
        kl, reverse = ((a.exp() * (a - b)).sum(1).numpy() for a, b in ((log_p, log_q), (log_q, log_p)))
        found |= {
            "kl@history": np.r_[0.0, kl[:-1]],
            "reverse_kl@history": np.r_[0.0, reverse[:-1]],
            "kl_at@history": kl,
        }
    return found


def past_signals(model, ids, response):
    """With the losses of the response alone, which its first token has none of."""
    found, places = plain_signals(model, ids), np.flatnonzero(response)
    found["loss_unconditional"] = np.full(len(ids), np.nan)
    found["loss_unconditional"][places] = plain_signals(model, np.array(ids)[places])["loss"]
    found["loss_unconditional"][places[:1]] = np.nan
    return found


def eager_attention(model, ids, response):
    model = copy.deepcopy(model).eval()
    (model.get_base_model() if hasattr(model, "get_base_model") else model).set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(torch.tensor([list(ids)]), output_attentions=True).attentions[-1][0].mean(0).numpy()
    return (weights * ~response).sum(1)


def past_model():
    """An earlier checkpoint: related to the one that is trained."""
    model = make_model()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def with_columns(examples, columns):
    model = past_model()
    for example in examples:
        response = np.array(example["labels"]) != -100
        signals = past_signals(model, example["input_ids"], response)
        example |= {
            c: np.where(response, signals[c.removeprefix("history_")], np.nan).tolist() for c in columns
        }
    return examples


def offline(method, params, seen, model, history, columns):
    """What `select` decides about the examples of a batch: keep and weight, [N]."""
    of, found, offsets, positions = get_method(method), {}, [0], []
    for o in seen:
        mask = o.response_mask
        live = plain_signals(model, o.input_ids, history)
        live["attention"] = eager_attention(model, o.input_ids, mask)
        past = past_signals(history, o.input_ids, mask)
        for name in of.inputs:
            role, _, signal = name.partition(".")
            values = live[signal] if role == "current" else past[signal]
            if role != "current" and columns:
                values = values.astype(np.float32)
            found.setdefault(name, []).append(np.asarray(values, np.float64)[mask])
        offsets.append(offsets[-1] + int(mask.sum()))
        positions.append(np.flatnonzero(mask))
    offsets = np.array(offsets)
    tokens = Tokens(
        offsets,
        {name: np.concatenate(values) for name, values in found.items()},
        own_units=offsets[[0, -1]] if of.scope == "global" else None,
        positions=np.concatenate(positions),
        lengths=np.array([o.input_ids.size for o in seen]),
    )
    return of.decide(tokens, of.read_params(params))[1]


def loss_of(model, seen, keep, weight, method):
    """The loss of the step: kept tokens' mean, or the weighted sum over all response tokens."""
    losses = np.concatenate([plain_signals(model, o.input_ids)["loss"][o.response_mask] for o in seen])
    if weight is None:
        return losses[keep].sum() / (keep.size if method == "profit" else max(1, keep.sum()))
    if isinstance(get_method(method).policy, Weight):
        return (losses * weight).sum() / keep.size
    negative = weight < 0  # forgetting: two means
    return losses[weight > 0].mean() + weight[negative][0] * losses[negative].mean()


def runnable(method, history):
    """The settings; None where the method is refused."""
    try:
        return SelfModulation(method=method, history=history)
    except UsageError:
        return None


def train(folder, method, history, collator, model, **changes):
    selection, watcher = runnable(method, history), Watcher()
    trainer = dumping(watcher, SelfModulatedTrainer)(
        model,
        arguments(folder, **{"max_steps": STEPS} | changes),
        data_collator=collator,
        train_dataset=with_columns(make_examples(8, seed=5), selection.columns),
        selection=selection,
        observers=[watcher],
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return watcher, logged, trainer


def adapted():
    torch.manual_seed(1)
    return get_peft_model(
        make_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )


def runs(history):
    return [name for name in METHODS if runnable(name, history) is not None]


@pytest.mark.parametrize("method", slow_but(QUICK, runs("scores")))
def test_with_columns(tmp_path, method):
    """Methods that draw at random or read nothing but places are compared on those."""
    watcher, logged, _ = train(tmp_path, method, "scores", collate, make_model())
    check(method, watcher, logged, lambda state: with_state(make_model(), state), past_model(), columns=True)


@pytest.mark.parametrize(
    "method",
    slow_but(QUICK, [name for name in runs("base") if any("history" in i for i in METHODS[name].inputs)]),
)
def test_with_the_base_under_an_adapter(tmp_path, method):
    watcher, logged, _ = train(tmp_path, method, "base", flatten, adapted())
    check(method, watcher, logged, lambda state: with_state(adapted(), state), make_model(), columns=False)


def with_state(model, state):
    model.load_state_dict(state)
    return model


def check(method, watcher, logged, model_of, history, columns):
    decided = set()
    for step in range(STEPS):
        seen = [o for o in watcher.seen if o.step == step]
        keep = np.concatenate([o.keep_mask[o.response_mask] for o in seen])
        weight = None
        if seen[0].weight is not None:
            weight = np.concatenate([o.weight[o.response_mask] for o in seen])
        model = model_of(watcher.weights[step]).eval()
        if method != "random":
            expected = offline(method, {}, seen, model, history, columns)
            assert keep.tolist() == expected.keep.tolist()
            assert (weight is None) == (expected.weight is None)
            if weight is not None:
                np.testing.assert_allclose(weight, expected.weight, atol=1e-5, rtol=1e-4)
        assert logged[step] == pytest.approx(loss_of(model, seen, keep, weight, method), abs=2e-5)
        decided |= {*keep.tolist(), *([] if weight is None else np.unique(weight).tolist())}
    print(method, len(decided))


LATE, SOFT, EXAMPLES = "t3s", "eaft", "iw-sft"
"""A number of kept tokens that only the scores tell; weights; weights of whole examples."""


@pytest.mark.parametrize("method", [LATE, SOFT, EXAMPLES])
def test_gradient_accumulation_changes_nothing(tmp_path, method):
    """SGD with a learning rate of 1 shows gradients as they are."""
    trained = []
    for size in (4, 1):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        changes |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0}
        _, logged, trainer = train(tmp_path, method, "scores", collate, make_model(), **changes)
        trained.append((logged, dict(trainer.model.named_parameters())))
    (first, weights), (second, others) = trained
    assert first == pytest.approx(second, abs=1e-5)
    start = dict(make_model().named_parameters())
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=1e-5, rtol=0, msg=name)
    assert max(float((w - start[n]).detach().abs().max()) for n, w in weights.items()) > 0.01


@pytest.mark.parametrize("method", [LATE, SOFT, "forgetting"])
def test_the_gradient_is_that_of_the_weighted_loss(tmp_path, method):
    """One step of two micro-batches, against plain PyTorch."""
    changes = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, "gradient_checkpointing": True}
    watcher, logged, trainer = train(tmp_path, method, "scores", collate, make_model(), **changes)
    model, losses, factors = make_model(), [], []
    for seen in (o for o in watcher.seen if o.step == 0):
        log_p = model(torch.from_numpy(seen.input_ids)[None]).logits[0].log_softmax(-1)
        places = np.flatnonzero(seen.response_mask)
        losses += [-log_p[i - 1, seen.input_ids[i]] for i in places]
        factors += (seen.keep_mask if seen.weight is None else seen.weight)[places].astype(float).tolist()
    losses, factors = torch.stack(losses), torch.tensor(factors)
    if method == SOFT:
        loss = (losses * factors).mean()
    else:
        loss = losses[factors > 0].mean()
        if method == "forgetting":
            loss = loss - 0.25 * losses[factors < 0].mean()
    loss.backward()
    assert logged[0] == pytest.approx(float(loss.detach()), abs=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(watcher.weights[1][name], p.detach() - p.grad, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("method", ["token-entropy", SOFT, LATE, "eksft", "ranktuner"])
def test_in_bfloat16_the_decisions_are_nearly_the_same(tmp_path, method):
    """Signals are float32 sums of rounded products: few tokens at a cut, and weights to a hundredth."""
    model = adapted() if "eksft" in method else make_model()
    history = "base" if "eksft" in method else "scores"
    watcher, logged, _ = train(tmp_path, method, history, flatten, model, bf16=True, max_steps=1)
    exact, _, _ = train(tmp_path, method, history, flatten, copy_of(model), max_steps=1)
    keep = np.concatenate([o.keep_mask[o.response_mask] for o in watcher.seen])
    weight = None
    if watcher.seen[0].weight is not None:
        weight = np.concatenate([o.weight[o.response_mask] for o in watcher.seen])
    expected = loss_of(copy_of(model).eval(), watcher.seen, keep, weight, method)
    assert logged[0] == pytest.approx(expected, abs=0.05)
    for ours, theirs in zip(watcher.seen, exact.seen, strict=True):
        assert (ours.keep_mask == theirs.keep_mask).mean() > 0.8
        if ours.weight is not None:
            np.testing.assert_allclose(ours.weight, theirs.weight, atol=0.05)


def copy_of(model):
    return adapted() if hasattr(model, "peft_config") else make_model()


def test_weights_are_constants_that_trl_multiplies_by(tmp_path):
    """Method dft is TRL's loss_type dft: same losses, same weights after training."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    config = {"max_length": None, "gradient_checkpointing": False} | SETTINGS | {"max_steps": 2}
    given = {"train_dataset": Dataset.from_list(make_examples(8)).remove_columns("history_loss")}
    given["processing_class"] = tokenizer
    ours = SelfModulatedSFTTrainer(
        make_model(),
        SFTConfig(str(tmp_path), loss_type="nll", **config),
        selection=SelfModulation(method="dft"),
        **given,
    )
    theirs = SFTTrainer(make_model(), SFTConfig(str(tmp_path), loss_type="dft", **config), **given)
    ours.train()
    theirs.train()
    logs = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (ours, theirs)]
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0, msg=name)
    with pytest.raises(UsageError, match="loss_type is 'dft', which weights tokens"):
        SelfModulatedSFTTrainer(
            make_model(),
            SFTConfig(str(tmp_path), loss_type="dft", **config),
            selection=SelfModulation(method="dft"),
            **given,
        )


@pytest.mark.parametrize("packing", [False, True])
def test_several_history_columns_go_through_trl(tmp_path, packing):
    selection, watcher = SelfModulation(method="prift-mass", params={"tau": 0.7}), Watcher()
    examples = with_columns(make_examples(12), selection.columns)
    SelfModulatedSFTTrainer(
        make_model(),
        SFTConfig(str(tmp_path), packing=packing, max_length=64, gradient_checkpointing=False, **SETTINGS),
        train_dataset=Dataset.from_list(examples),
        processing_class=save_tokenizer(tmp_path / "tokenizer"),
        selection=selection,
        observers=[watcher],
    ).train()
    kept, past = set(), past_model().eval()
    for seen in watcher.seen:
        signals = plain_signals(past, seen.input_ids)
        likelier = 1 - signals["mass_above"] - signals["ties"] * np.exp(-signals["loss"])
        assert seen.keep_mask.tolist() == (seen.response_mask & (likelier >= 0.7)).tolist()
        kept |= set(seen.keep_mask[seen.response_mask].tolist())
    assert kept == {True, False}


def test_a_parameter_may_move_during_training(tmp_path):
    selection = SelfModulation(method="forgetting", params={"forget": Schedule(0.0, 0.25)}, warmup_steps=1)
    watcher = Watcher()
    SelfModulatedTrainer(
        make_model(),
        arguments(tmp_path, max_steps=4),
        data_collator=collate,
        train_dataset=make_examples(16),
        selection=selection,
        observers=[watcher],
    ).train()
    lowest = {o.step: o.weight.min() for o in watcher.seen if o.weight is not None and (o.weight < 0).any()}
    assert lowest == {2: -0.125, 3: -0.25}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "eeft"}, "method 'eeft' is not known; .* did you mean 'eaft'"),
        ({"method": "eaft", "rho": 0.5}, "method 'eaft' has no parameter 'rho'; it has alpha"),
        ({"method": "rel", "params": {"rho": 2}}, "rho is 2; legal is 0 < rho <= 1"),
        ({"rho": 0.5, "params": {"rho": 0.5}}, "rho is given twice"),
        ({"method": "eaft", "scope": "turn"}, "method 'eaft' judges each token alone; leave scope out"),
        ({"denominator": "all"}, "denominator is 'all'; legal: kept, response"),
        ({"method": "t-shirt"}, "current.loss_unconditional needs another pass over the data"),
        ({"method": "asft", "history": "base"}, "a loss that is no weight"),
        ({"method": "eksft"}, "current.kl_at@history compares whole distributions"),
    ],
)
def test_settings_that_do_not_fit_the_method(settings, match):
    with pytest.raises(UsageError, match=match):
        SelfModulation(**settings)


def test_every_method_runs_or_says_why_not():
    refused = {name for name in METHODS if not runnable(name, "scores")}
    for name in refused & {name for name in METHODS if runnable(name, "base")}:
        with pytest.raises(UsageError, match="use history 'base', 'ema' or 'snapshot'"):
            SelfModulation(method=name)
    for name in refused:
        with pytest.raises(UsageError, match=f"method {name!r} cannot run in the loop: [^\\n]*$"):
            SelfModulation(method=name)
    assert len(refused) < 6 < 30 < len(METHODS)


def test_columns_are_named_after_what_a_method_reads():
    assert SelfModulation().columns == ("history_loss",)
    assert SelfModulation(gamma=0.0).columns == ()
    assert SelfModulation(history="base").columns == ()
    assert column_of("history.mass_above") == "history_mass_above"
