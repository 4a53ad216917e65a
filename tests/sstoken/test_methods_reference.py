"""Each method against a slow reference, token by token in plain Python; and numpy against torch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sstoken.methods import METHODS, Input, Tokens, get_method
from sstoken.signals import get_signal

SIGNALS = sorted({i for m in METHODS.values() for i in m.inputs})
RANGES = {"loss": 6.0, "loss_unconditional": 8.0, "entropy": 5.0, "entropy_top20": 2.9, "expected_rank": 40.0}


def make_tokens(seed, counts):
    """Random signals of examples of so many response tokens; losses in steps, so that ties are common."""
    random = np.random.default_rng(seed)
    offsets = np.cumsum([0, *counts]).astype(np.int64)
    n = int(offsets[-1])
    signals = {}
    for name in SIGNALS:
        kind = Input(name).signal.partition("@")[0]
        values = random.random(n) * RANGES.get(kind, 1.0)
        if kind in ("rank", "ties"):
            values = np.floor(values * (9 if kind == "rank" else 2))
        if kind == "expected_rank":
            values += 1
        if kind in ("loss", "entropy", "attention"):
            values = np.round(values * 4) / 4
        if kind == "loss_unconditional":
            values[offsets[:-1][np.array(counts) > 0]] = np.nan
        if kind == "critical":
            values = np.array([0.0, 1.0, np.nan])[(values * 3).astype(int)]
        signals[name] = values
    prompts = random.integers(1, 9, len(counts))
    positions = np.concatenate([[], *(np.arange(n) + p for n, p in zip(counts, prompts, strict=True))])
    return Tokens(offsets, signals, positions=positions, lengths=prompts + np.array(counts))


def first(k, scores):
    """The indices of the k highest, the earlier one first among equals."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: max(0, k)])


def quantile(values, q):
    ordered = sorted(values)
    at = (len(ordered) - 1) * q
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def mean(values):
    return sum(values) / len(values)


class Slow:
    """The definitions, over lists: `x[name]` holds one example's values, `all[name]` those of all examples."""

    def __init__(self, examples):
        self.examples = examples

    def together(self, of):
        return [v for x in self.examples for v in of(x)]

    def top_of_all(self, of, choose):
        flat = self.together(of)
        chosen = choose(flat)
        at, out = 0, []
        for x in self.examples:
            out.append([int(i in chosen) for i in range(at, at + x["n"])])
            at += x["n"]
        return out


def rel(x):
    return [h - c for h, c in zip(x["history.loss"], x["current.loss"], strict=True)]


def p(x, role="current"):
    return [math.exp(-v) for v in x[f"{role}.loss"]]


def each(of):
    return lambda s: [of(x) for x in s.examples]


def share(of, k):
    return lambda s: [[int(i in first(k(x["n"]), of(x))) for i in range(x["n"])] for x in s.examples]


def zipped(f, *names):
    return each(lambda x: [f(*row) for row in zip(*(x[name] for name in names), strict=True)])


def logit(value):
    return math.log(value) - math.log(1 - value)


def info(value, most=0.93):
    return 0.0 if value >= most else value * max(0.0, 1 - logit(value) / logit(most))


def ranktuner(loss, entropy, max_prob, rank, ties):
    h = entropy / math.log(2)
    s = 0.25 * 2**h + 1 if h >= 2 else 2 - max_prob
    k = 1 / math.log2(max(s, rank + ties + 1) + 1) ** 2
    return math.exp(-loss) * max(math.exp(-loss) * s, 1e-6) ** -k


def ranktuner_paper(loss, expected, rank):
    def f(value):
        return 1 / math.log2(value + 1)

    return math.exp(-loss) * 2 ** (f(expected) - f(rank + 1))


def minmax(values):
    return [(v - min(values)) / (max(values) - min(values) + 1e-8) for v in values]


def sstoken(x, gamma=0.5):
    scaled = minmax(rel(x)) if x["n"] else []
    return [gamma * a + (1 - gamma) * b for a, b in zip(scaled, x["current.attention"], strict=True)]


def cayley(s):
    f = mean(s.together(p)) / 2

    def weight(value):
        d = 1 - value + 1e-8
        a = min(1.0, max(0.001, f + (1 - f) * (1 - d) / (1 + d + 1e-8)))
        return value**a * a / (a + 1e-8)

    return [[weight(v) for v in p(x)] for x in s.examples]


def talr(s, by_token=False, least=0.01):
    losses = [x["current.loss"] for x in s.examples if x["n"]]
    tau = quantile([v for row in losses for v in row] if by_token else list(map(mean, losses)), 0.5)

    def weight(loss):
        return math.exp(-loss / tau) if tau else (0.0 if loss else math.nan)

    return [[max(weight(v), least) for v in x["current.loss"]] for x in s.examples]


def eaft_pilot(share):
    def keep(s):
        h, q = quantile(s.together(lambda x: x["current.entropy"]), share), quantile(s.together(p), share)
        return [
            [int(not (e <= h and v <= q)) for e, v in zip(x["current.entropy"], p(x), strict=True)]
            for x in s.examples
        ]

    return keep


def above(q, strict):
    def keep(s):
        cut = quantile(s.together(lambda x: x["current.entropy"]), q)
        return [[int(e > cut if strict else e >= cut) for e in x["current.entropy"]] for x in s.examples]

    return keep


def eksft(kl, entropy, share=0.2, combine=set.union):
    def keep(s):
        out = []
        for x in s.examples:
            k = int(share * x["n"])
            dropped = combine(first(k, x[kl]), first(k, x[entropy]))
            out.append([int(i not in dropped) for i in range(x["n"])])
        return out

    return keep


def tshirt(s, ratio=0.5):
    def size(x):
        pairs = zip(x["current.loss"], x["current.loss_unconditional"], strict=True)
        return [abs(a - b) for a, b in pairs]

    counted = [v for v in s.together(size) if not math.isnan(v)]
    cut = quantile(counted, 1 - ratio) if counted else 0.0
    return [[int(v > cut) for v in size(x)] for x in s.examples]


def forgetting(s, rho=0.7, forget=0.25):
    n = len(s.together(rel))
    positive = s.top_of_all(rel, lambda flat: first(int(n * rho), flat))
    either = s.top_of_all(rel, lambda flat: first(int(n * rho) + int(n * (1 - rho)), flat))
    return [
        [1.0 if a else -forget if b else 0.0 for a, b in zip(x, y, strict=True)]
        for x, y in zip(positive, either, strict=True)
    ]


def prefix(share):
    return each(lambda x: [int(at < max(1, int(x["length"] * share))) for at in x["positions"]])


def ceil_share(n, rho=0.6):
    return math.ceil(round(rho * n, 9))


def between(low, high):
    return each(lambda x: [int(low <= v <= high) for v in p(x)])


SETTINGS = {
    "sstoken gamma=0.2 rho=0.3": share(lambda x: sstoken(x, 0.2), lambda n: ceil_share(n, 0.3)),
    "trimming keep=low": share(lambda x: [-v for v in x["current.loss"]], ceil_share),
    "toss discard=0.5": lambda s: s.top_of_all(
        rel, lambda flat: set(range(len(flat))) - first(int(len(flat) * 0.5), flat)
    ),
    "stm drop=lowest tau=4.5": each(lambda x: [int(math.exp(v) >= 4.5) for v in x["history.loss"]]),
    "stm tau=0": each(lambda x: [1] * x["n"]),
    "stm-dpf tau=-1": each(lambda x: [1] * x["n"]),
    "dpf tau=9": zipped(lambda a, b: int(math.exp(b) - math.exp(a) <= 9), "history.loss", "current.loss"),
    "prift-mass tau=0.2": zipped(
        lambda v, m, t: int(1 - m - t * math.exp(-v) >= 0.2),
        "history.loss",
        "history.mass_above",
        "history.ties",
    ),
    "profit direction=lower tau=0.2": between(0, 0.2),
    "profit direction=middle tau=0.1 upper=0.5": between(0.1, 0.5),
    "profit direction=higher tau=0.3 upper=0.5": between(0.3, 1),
    "xtf-kn tau=0.7": each(lambda x: [int(1 - v >= 0.7) for v in p(x, "history")]),
    "p-q form=top tau=0.2": between(0.2, 1),
    "p-q form=bottom tau=0.2": between(0, 0.2),
    "eaft-pilot quantile=0.5": eaft_pilot(0.5),
    "eaft-masked quantile=0.6": above(0.6, strict=True),
    "token-entropy rho=0.6": above(1 - 0.6, strict=False),
    "se-kd rho=0.5": share(lambda x: x["current.entropy"], lambda n: max(1, ceil_share(n, 0.5))),
    **{
        f"eksft share=0.4 combine={word}": eksft("current.kl_at@history", "current.entropy_at", 0.4, combine)
        for word, combine in {
            "union": set.union,
            "intersection": set.intersection,
            "kl": lambda kl, entropy: kl,
            "entropy": lambda kl, entropy: entropy,
        }.items()
    },
    "t-shirt ratio=0.2": lambda s: tshirt(s, 0.2),
    "prefix share=0.8": prefix(0.8),
    "prefix of=response share=0.4": each(lambda x: [int(i < ceil_share(x["n"], 0.4)) for i in range(x["n"])]),
    "critical-tokens untried=keep": zipped(lambda critical: int(critical != 0), "current.critical"),
}
"""What methods keep with other parameters than the defaults."""
KEPT = SETTINGS | {
    "sstoken": share(sstoken, ceil_share),
    "rel": share(rel, ceil_share),
    "attention": share(lambda x: x["current.attention"], ceil_share),
    "loss": share(lambda x: x["current.loss"], ceil_share),
    "trimming": share(lambda x: x["current.loss"], ceil_share),
    "full": each(lambda x: [1] * x["n"]),
    "rho-1": lambda s: s.top_of_all(
        lambda x: [-v for v in rel(x)], lambda flat: first(ceil_share(len(flat)), flat)
    ),
    "token-cleaning": lambda s: s.top_of_all(rel, lambda flat: first(int(len(flat) * 0.6), flat)),
    "toss": lambda s: s.top_of_all(
        rel, lambda flat: set(range(len(flat))) - first(int(len(flat) * 0.2), flat)
    ),
    "t3s": each(lambda x: [int(v <= 0) for v in rel(x)]),
    "stm": each(lambda x: [int(math.exp(v) <= 2.5) for v in x["history.loss"]]),
    "stm-dpf": zipped(lambda a, b: int(math.exp(a) <= 2.5 and b <= a), "history.loss", "current.loss"),
    "dpf": zipped(lambda a, b: int(math.exp(b) - math.exp(a) <= 2.5), "history.loss", "current.loss"),
    "prift-mass": zipped(
        lambda v, m, t: int(1 - m - t * math.exp(-v) >= 0.5),
        "history.loss",
        "history.mass_above",
        "history.ties",
    ),
    "profit": each(lambda x: [int(v >= 0.1) for v in p(x)]),
    "xtf-kn": each(lambda x: [int(1 - v >= 0.05) for v in p(x, "history")]),
    "eaft-pilot": eaft_pilot(0.15),
    "eaft-masked": above(0.15, strict=True),
    "token-entropy": above(1 - 0.2, strict=False),
    "se-kd": share(lambda x: x["current.entropy"], lambda n: max(1, math.ceil(round(0.2 * n, 9)))),
    "eksft": eksft("current.kl_at@history", "current.entropy_at"),
    "eksft-aligned": eksft("current.kl@history", "current.entropy"),
    "typical": share(
        lambda x: [
            -abs(loss - h) / math.sqrt(v + 0.1)
            for loss, h, v in zip(
                x["current.loss"], x["current.entropy"], x["current.varentropy"], strict=True
            )
        ],
        ceil_share,
    ),
    "t-shirt": tshirt,
    "prefix": prefix(0.5),
    "critical-tokens": zipped(lambda critical: int(critical == 1), "current.critical"),
}
WEIGHTS = {
    "forgetting": forgetting,
    "dft": each(p),
    "asft": each(p),
    "prift-prob": each(lambda x: p(x, "history")),
    "infosft": each(lambda x: [info(v) for v in p(x)]),
    "talr": talr,
    "deft": zipped(lambda v, a: math.exp(-v) ** a * a / (a + 1e-6), "current.loss", "current.sum_p2"),
    "cayley": cayley,
    "p-q": each(p),
    "chord-phi": each(lambda x: [v * (1 - v) for v in p(x)]),
    "eaft": zipped(lambda h: h / 3, "current.entropy_top20"),
    "eaft-axolotl": zipped(lambda h: h, "current.entropy_top20"),
    "iw-sft": each(lambda x: [min(math.exp(mean(rel(x))), 16.0)] * x["n"] if x["n"] else []),
    "iw-sft-token": each(lambda x: [min(max(math.exp(v), 1 - 0.8), 1 + 0.8) for v in rel(x)]),
    "psft": each(lambda x: [math.exp(v) if math.exp(v) <= 1.28 else 0.0 for v in rel(x)]),
    "ranktuner": zipped(
        ranktuner, "current.loss", "current.entropy", "current.max_prob", "current.rank", "current.ties"
    ),
    "ranktuner-paper": zipped(ranktuner_paper, "current.loss", "current.expected_rank", "current.rank"),
    "forgetting rho=0.4 forget=2": lambda s: forgetting(s, 0.4, 2.0),
    "asft loss=sft": each(lambda x: [1.0] * x["n"]),
    "infosft P=0.7": each(lambda x: [info(v, 0.7) for v in p(x)]),
    "talr median=token w_min=0.2": lambda s: talr(s, True, 0.2),
    "p-q q=0.5": each(lambda x: [v**0.5 for v in p(x)]),
    "eaft alpha=2": zipped(lambda h: (h / 3) ** 2, "current.entropy_top20"),
    "eaft-axolotl alpha=0.5": zipped(lambda h: h**0.5, "current.entropy_top20"),
    "iw-sft temperature=0.5 most=1.5": each(
        lambda x: [min(math.exp(0.5 * mean(rel(x))), 1.5)] * x["n"] if x["n"] else []
    ),
    "iw-sft-token clip=0.3": each(lambda x: [min(max(math.exp(v), 1 - 0.3), 1 + 0.3) for v in rel(x)]),
    "psft clip=0": each(lambda x: [math.exp(v) if math.exp(v) <= 1 else 0.0 for v in rel(x)]),
}
ELSEWHERE = {"random", "pmi-band"}
"""Methods with a test of their own."""

some_tokens = st.builds(
    make_tokens, st.integers(0, 2**32 - 1), st.lists(st.integers(0, 13), min_size=1, max_size=5)
)
NO_DEADLINE = settings(deadline=None, max_examples=25)


def decide(called, tokens):
    """Run `method parameter=value ...`."""
    name, *given = called.split()
    method = get_method(name)
    if method.scope == "global":
        tokens = tokens.with_(own_units=np.array([0, tokens.num_tokens]))
    return method.decide(tokens, method.read_params(dict(setting.split("=") for setting in given)))


def slow(tokens):
    examples = []
    for e, (a, b) in enumerate(zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)):
        example = {name: values[a:b].tolist() for name, values in tokens.signals.items()}
        length = int(tokens.lengths[e])
        examples.append(
            example | {"n": int(b - a), "length": length, "positions": tokens.positions[a:b].tolist()}
        )
    return Slow(examples)


def test_every_method_has_a_reference():
    missing = set(METHODS) - set(KEPT) - set(WEIGHTS) - ELSEWHERE
    assert not missing, f"write a slow reference of {missing}"


@pytest.mark.parametrize("name", KEPT)
@NO_DEADLINE
@given(tokens=some_tokens)
def test_masks_equal_the_reference(name, tokens):
    if not tokens.num_tokens:
        return
    _, outcome = decide(name, tokens)
    wanted = [bool(v) for row in KEPT[name](slow(tokens)) for v in row]
    assert outcome.keep.tolist() == wanted
    assert outcome.weight is None or outcome.weight.tolist() == wanted


@pytest.mark.parametrize("name", WEIGHTS)
@NO_DEADLINE
@given(tokens=some_tokens)
def test_weights_equal_the_reference(name, tokens):
    if not tokens.num_tokens:
        return
    _, outcome = decide(name, tokens)
    wanted = [v for row in WEIGHTS[name](slow(tokens)) for v in row]
    np.testing.assert_allclose(outcome.weight, wanted, rtol=1e-9, atol=1e-12)
    expected = outcome.weight > 0 if name.startswith("forgetting") else outcome.weight != 0
    assert outcome.keep.tolist() == expected.tolist()


@pytest.mark.parametrize("name", [*KEPT, *WEIGHTS])
@NO_DEADLINE
@given(tokens=some_tokens)
def test_numpy_and_torch_agree(name, tokens):
    if not tokens.num_tokens:
        return
    tensors = tokens.with_(
        signals={key: torch.from_numpy(values) for key, values in tokens.signals.items()},
        positions=torch.from_numpy(tokens.positions),
    )
    (scores, outcome), (other_scores, other) = decide(name, tokens), decide(name, tensors)
    np.testing.assert_allclose(other_scores.numpy(), scores, rtol=1e-12, atol=1e-12)
    assert other.keep.tolist() == outcome.keep.tolist()
    if outcome.weight is not None:
        np.testing.assert_allclose(other.weight.numpy(), outcome.weight, rtol=1e-12, atol=1e-12)


EDGES = {
    "loss": [0.0, 40.0, 800.0],
    "loss_unconditional": [0.0, 800.0, math.nan],
    "critical": [0.0, 1.0, math.nan],
}


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", [*KEPT, *WEIGHTS, "pmi-band"])
@NO_DEADLINE
@given(st.data(), st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any))
def test_signals_at_the_ends_of_their_ranges_give_finite_scores_and_weights(name, data, counts):
    """One-token answers, signals that are equal throughout, and the lowest and highest values of each."""
    tokens, ends = make_tokens(0, counts), {}
    for key in get_method(name.split()[0]).inputs:
        signal = get_signal(Input(key).signal)
        legal = EDGES.get(signal.base, [signal.low, min(signal.high, 50.0)])
        values = st.sampled_from(legal)
        drawn = st.lists(values, min_size=tokens.num_tokens, max_size=tokens.num_tokens)
        ends[key] = np.array(data.draw(drawn | values.map(lambda v: [v] * tokens.num_tokens)))
    scores, outcome = decide(name, tokens.with_(signals=tokens.signals | ends))
    unknown = np.isnan(scores) if name.startswith("t-shirt") else np.zeros(scores.size, bool)
    assert (np.isfinite(scores) | unknown).all()
    assert not outcome.keep[unknown].any()
    assert outcome.weight is None or np.isfinite(outcome.weight).all()


def test_a_ratio_whose_product_is_not_what_it_seems():
    """The authors floor in floating point: 0.7 of 90 is 62."""
    tokens = make_tokens(0, [90])
    kept = get_method("token-cleaning")
    _, outcome = kept.decide(tokens, kept.read_params({"rho": 0.7}))
    assert outcome.keep.sum() == 62


@pytest.mark.parametrize("probability", [1.0, 0.93, 0.9299, 1e-30])
def test_infosft_at_the_ends(probability):
    method = get_method("infosft")
    loss = np.array([-math.log(probability), 1.0])
    scores, outcome = method.decide(Tokens(np.array([0, 2]), {"current.loss": loss}), method.read_params({}))
    assert np.isfinite(scores).all()
    assert outcome.weight[0] == pytest.approx(info(probability), abs=1e-9)
