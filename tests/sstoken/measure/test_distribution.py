"""Signals of a distribution, tile by tile, against the full logits in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sstoken.measure import distribution, token_loss
from sstoken.measure.distribution import OF_DISTRIBUTION, measure_distribution
from sstoken.measure.divergence import measure_divergence
from sstoken.measure.expected_rank import ExpectedRank
from sstoken.measure.scorer import Scorer
from sstoken.measure.token_loss import ComputedLogits, OutputHead
from sstoken.measure.top_logits import TopLogits
from tests.sstoken.measure.architectures import VOCABULARY, make_model

KINDS = st.sampled_from(["plain", "bias", "softcap", "large", "later tiles far above", "equal", "masked"])


def on_grid(values):
    """So coarse that products are exact in any order: what ties in one product ties in another."""
    return (values * 32).round() / 32


def make_head(kind, size, width, generator):
    weight = on_grid(torch.randn(size, width, generator=generator) / width**0.5)
    if kind == "large":
        weight *= 30
    if kind == "later tiles far above":
        weight[-1] += 300.0
    if kind == "equal":
        weight[:] = weight[:1]
    weight[size // 2 :: 3] = weight[0].clone()  # ties
    bias = on_grid(torch.randn(size, generator=generator)) if kind in ("bias", "masked") else None
    if kind == "masked":  # as padding of a vocabulary; here whole tiles and the sample too
        bias[: size * 3 // 4] = -torch.inf
        bias[::28] = -torch.inf
        bias[-1] = 0.0
    return OutputHead(weight, bias, 1.5, 5.0 if kind == "softcap" else None)


def draw_targets(head, rows, generator):
    """Tokens that the distributions can give."""
    possible = torch.arange(head.size) if head.bias is None else head.bias.isfinite().nonzero()[:, 0]
    return possible[torch.randint(len(possible), (rows,), generator=generator)]


def largest_logit(head, hidden):
    logits = head.logits(hidden)
    return float(logits[logits.isfinite()].abs().max())


def reference(hidden, targets, head):
    logits = head.logits(hidden).double()
    log_p = logits.log_softmax(1)
    p, own = log_p.exp(), logits.gather(1, targets[:, None])
    top = logits.topk(min(20, logits.shape[1]), 1).values.log_softmax(1)
    ranks = torch.arange(1, logits.shape[1] + 1)
    return {
        "loss": -log_p.gather(1, targets[:, None])[:, 0],
        "entropy": torch.special.entr(p).sum(1),
        "varentropy": (p * (log_p.clamp_min(-1e9) + torch.special.entr(p).sum(1)[:, None]).square()).sum(1),
        "entropy_top20": torch.special.entr(top.exp()).sum(1),
        "rank": (logits > own).sum(1),
        "ties": (logits == own).sum(1) - 1,
        "mass_above": (p * (logits > own)).sum(1),
        "max_prob": p.amax(1),
        "sum_p2": p.square().sum(1),
        "expected_rank": (p.sort(1, descending=True).values * ranks).sum(1),
    }


@given(st.integers(1, 90), st.integers(1, 900), KINDS, st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_all_signals_are_those_of_the_full_logits(rows, size, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    head = make_head(kind, size, 16, generator)
    hidden = on_grid(torch.randn(rows, 16, generator=generator))
    targets = draw_targets(head, rows, generator)
    before = token_loss.TILE_ELEMENTS["cpu"]
    token_loss.TILE_ELEMENTS["cpu"] = rows * 256  # several tiles
    try:
        found = measure_distribution(hidden, targets, head, OF_DISTRIBUTION)
        alone = {name: measure_distribution(hidden, targets, head, [name])[name] for name in OF_DISTRIBUTION}
        given = ComputedLogits(torch.arange(size))
        computed = measure_distribution(head.logits(hidden), targets, given, OF_DISTRIBUTION)
    finally:
        token_loss.TILE_ELEMENTS["cpu"] = before
    for name, expected in reference(hidden, targets, head).items():
        exact = name in ("rank", "ties")
        scale = 1 + largest_logit(head, hidden) / 10  # fp32 rounds large logits more
        share = 1.1e-4 if name == "expected_rank" else 1e-5
        torch.testing.assert_close(
            found[name].double(), expected.double(), atol=0 if exact else 1e-5 * scale, rtol=share, msg=name
        )
        torch.testing.assert_close(alone[name], found[name], atol=1e-6 * scale, rtol=1e-6)
        torch.testing.assert_close(
            computed[name].double(),
            expected.double(),
            atol=0 if exact else 1e-5 * scale,
            rtol=share,
            msg=name,
        )
        assert (found[name].dtype == torch.int32) == exact


@pytest.mark.parametrize("kind", ["plain", "softcap", "large", "later tiles far above", "equal", "masked"])
def test_what_an_entry_defines_is_computed_from_the_row(kind, monkeypatch):
    """Functions that give signals measured in tiles: the loss (by the token's id), the entropy, the likeliest token."""
    defined = {
        "loss": lambda log_p, targets: -log_p.gather(1, targets[:, None])[:, 0],
        "entropy": lambda log_p, targets: torch.special.entr(log_p.exp()).sum(1),
        "max_prob": lambda log_p, targets: log_p.amax(1).exp(),
    }
    for name, function in defined.items():
        monkeypatch.setitem(distribution.BY_ROW, f"own_{name}", function)
    monkeypatch.setitem(token_loss.TILE_ELEMENTS, "cpu", 1)  # parts of as few rows as there can be
    generator = torch.Generator().manual_seed(0)
    head = make_head(kind, 900, 16, generator)
    hidden = torch.randn(150, 16, generator=generator)
    targets = draw_targets(head, 150, generator)
    found = measure_distribution(hidden, targets, head, [*defined, *(f"own_{name}" for name in defined)])
    scale = 1 + largest_logit(head, hidden) / 10  # fp32 rounds large logits more
    for name in defined:
        torch.testing.assert_close(found[f"own_{name}"], found[name], atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.parametrize("kind", ["smooth", "peaked", "ties", "far apart", "one bucket", "not a number"])
def test_expected_ranks_from_buckets_are_within_their_bounds_or_say_so(kind):
    generator = torch.Generator().manual_seed(0)
    logits = 2.5 * torch.randn(8, 20000, generator=generator)
    if kind == "peaked":
        logits[:, 7:9] += 25
    elif kind == "ties":
        logits[:, ::3] = 1.0
    elif kind == "far apart":
        logits[:, ::2] -= 1000
    elif kind == "one bucket":
        logits = logits * 1e-4 + 3.0
        logits[:, 0] = 50.0
    elif kind == "not a number":
        logits[0, 3] = float("nan")
    shifted = logits - logits.nan_to_num(0).amax(1, keepdim=True)
    buckets = ExpectedRank(shifted[:, ::40])
    for part in shifted.split(3000, 1):
        buckets.see(part, part.exp())
    found, off = buckets.values()
    p = logits.double().softmax(1).sort(1, descending=True).values
    error = ((p @ torch.arange(1.0, 20001).double()) / found - 1).abs()
    assert ((error <= 1.05 * off + 2e-6) | ~(off < 1e-2)).all()
    if kind in ("smooth", "peaked"):
        assert off.max() < 1e-4
        assert error.max() < 2e-5
    if kind in ("ties", "not a number"):
        assert not off[0] < 1e-4


@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 99))
@settings(deadline=None)
def test_the_largest_of_tiles_are_those_of_the_row(widths, levels, seed):
    """With many ties, in ascending rows (each tile above the last) and random ones."""
    random = np.random.default_rng(seed)
    rows = random.integers(levels, size=(5, sum(widths))).astype(np.float32)
    rows[1] = np.sort(rows[1])
    rows[2] = random.normal(size=sum(widths))
    rows[3, : random.integers(sum(widths))] = -np.inf
    top = TopLogits(20)
    for part in torch.from_numpy(rows).split(widths, 1):
        top.see(part)
    found = top.values()
    number = min(20, rows.shape[1])
    np.testing.assert_array_equal(found[:, -number:], np.sort(rows)[:, -number:])
    assert torch.isinf(found[:, :-number]).all()


def test_a_row_with_few_candidates_keeps_them_when_another_row_has_many():
    rows = torch.zeros(2, 480)
    rows[0, :19] = torch.arange(1.0, 20.0)  # in as many groups, so 19 candidates above a bound of 0
    rows[0, 330] = 0.5
    rows[1] = torch.arange(480.0)
    top = TopLogits(20)
    for part in rows.split(160, 1):
        top.see(part)
    torch.testing.assert_close(top.values(), rows.sort(1).values[:, -20:])


@given(st.integers(1, 60), st.integers(1, 700), KINDS, st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_divergence_is_that_of_the_full_distributions(rows, size, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    heads = [make_head(k, size, width, generator) for k, width in ((kind, 16), ("plain", 8))]
    hidden = [torch.randn(rows, width, generator=generator) for width in (16, 8)]
    p, q = (h.logits(x).double().log_softmax(1) for h, x in zip(heads, hidden, strict=True))
    rounding = 4e-7 * max(largest_logit(h, x) for h, x in zip(heads, hidden, strict=True))
    forward, reverse = measure_divergence(hidden[0], heads[0], hidden[1], heads[1])
    for found, a, b in ((forward, p, q), (reverse, q, p)):
        expected = torch.where(a.exp() > 0, a.exp() * (a - b), 0).sum(1)
        torch.testing.assert_close(found.double(), expected, atol=max(1e-4, rounding), rtol=1e-4)
    same, back = measure_divergence(hidden[0], heads[0], hidden[0], heads[0])
    assert same.max() < 1e-6
    assert back.max() < 1e-6


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_what_a_scorer_reads_is_what_the_models_say(layout):
    """Predicting positions and the tokens' own, two checkpoints, several turns, the last token of a batch."""
    random = np.random.default_rng(3)
    sequences = [random.integers(3, VOCABULARY, n).astype(np.int32) for n in (40, 7, 23, 2, 1)]
    masks = [np.arange(ids.size) % 10 > 3 for ids in sequences]
    masks[3] = np.array([False, True])
    model, other = make_model("llama"), make_model("llama")
    with torch.no_grad():
        for p in other.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    names = ["loss", "entropy", "entropy_at", "rank", "kl@b", "reverse_kl@b", "kl_at@b"]
    scorer = Scorer(model, signals=names, references={"b": other}, batch_tokens=60, layout=layout)
    log_p = {}
    for name, m in (("a", make_model("llama")), ("b", other)):
        with torch.no_grad():
            log_p[name] = [
                m(torch.tensor(ids[None]).long()).logits[0].double().log_softmax(-1) for ids in sequences
            ]
    seen = set()
    for index, signals in scorer.measure(sequences, masks):
        seen.add(index)
        assert list(signals) != []
        at = torch.from_numpy(np.flatnonzero(masks[index]))
        a, b = log_p["a"][index], log_p["b"][index]
        before, own = a[at - 1], a[at - 1, torch.from_numpy(sequences[index]).long()[at]]
        expected = {
            "loss": -own,
            "entropy": torch.special.entr(before.exp()).sum(1),
            "entropy_at": torch.special.entr(a[at].exp()).sum(1),
            "rank": (before > own[:, None]).sum(1),
            "kl@b": (before.exp() * (before - b[at - 1])).sum(1),
            "reverse_kl@b": (b[at - 1].exp() * (b[at - 1] - before)).sum(1),
            "kl_at@b": (a[at].exp() * (a[at] - b[at])).sum(1),
        }
        assert signals.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(signals[name], values, atol=2e-5, rtol=1e-5, err_msg=name)
    assert seen == set(range(len(sequences)))


def test_attention_of_the_row_that_predicts_the_token():
    random = np.random.default_rng(4)
    sequences = [random.integers(3, VOCABULARY, n).astype(np.int32) for n in (130, 12, 40)]
    masks = [np.arange(ids.size) % 9 > 3 for ids in sequences]
    twin = make_model("llama").double()
    twin.set_attn_implementation("eager")
    names = ["attention_predicting@1", "attention@1", "attention_predicting"]
    for index, signals in Scorer(make_model("llama"), signals=names).measure(sequences, masks):
        with torch.no_grad():
            out = twin(torch.tensor(sequences[index][None]).long(), output_attentions=True, use_cache=False)
        for name, layer, back in (
            ("attention_predicting@1", 1, 1),
            ("attention@1", 1, 0),
            ("attention_predicting", -1, 1),
        ):
            weights = out.attentions[layer][0].mean(0).numpy() @ ~masks[index]
            expected = weights[np.flatnonzero(masks[index]) - back]
            np.testing.assert_allclose(signals[name], expected, atol=1e-5, rtol=0, err_msg=name)
