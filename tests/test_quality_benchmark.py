"""The quality benchmark: what it plants, how it marks and counts, and a small study from end to end."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.quality import data
from benchmarks.quality.intervals import (
    auroc,
    average_precision,
    over_examples,
    paired_difference,
)
from benchmarks.quality.marking import right
from benchmarks.quality.page import WEIGHT_ON_NOISE, told_apart
from benchmarks.quality.planting import KINDS, PHRASES, Row, plant
from benchmarks.quality.published import LEFT_OUT, Decision, share_kept
from benchmarks.quality.scores import SCORES, ranks, without_position
from benchmarks.quality.settings import STUDIES, MethodRun, Seed, Study, read_study
from benchmarks.quality.student import BASES, load_tokenizer
from benchmarks.quality.tokens import CONTENT, END, Encoded, encode
from benchmarks.quality.training import batches, train, weighted_loss
from sstoken.errors import UsageError
from sstoken.in_loop.rule import check_in_loop
from sstoken.methods import Tokens, get_method
from sstoken.methods.registry import own_methods

NO_DEADLINE = settings(deadline=None, max_examples=60)
needs_shared = pytest.mark.skipif(not data.SHARED.is_dir(), reason="needs ../shared")


def rows(seed=0, number=6):
    return data.families("train", number, seed)


@NO_DEADLINE
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_without_its_spans_an_answer_is_clean_but_for_what_was_replaced(seed, rate):
    inserted = [k for k in KINDS if k not in ("shuffled", "typo", "wrong")]
    for example in plant(rows(), rows(), rate=rate, seed=seed, kinds=inserted):
        text = example.answer
        for span in reversed(example.spans):
            text = text[: span.start] + text[span.end :]
        assert text.split() == example.row.answer.split()


@NO_DEADLINE
@given(st.integers(0, 10**6))
def test_what_is_replaced_differs_from_what_was_there(seed):
    for example in plant(rows(), rows(), rate=1.0, seed=seed, kinds=("shuffled", "typo", "wrong")):
        assert example.spans
        assert example.answer != example.row.answer
        for span in example.spans:
            planted = example.answer[span.start : span.end]
            if span.kind == "wrong":
                assert planted.isdigit()
            elif span.kind == "shuffled":
                assert sorted(planted.split()) != planted.split() or len(set(planted.split())) > 1


def test_each_kind_occurs_and_its_phrases_are_of_the_half_asked_for():
    for half in ("tune", "held"):
        found = set()
        for example in plant(rows(number=80), rows(number=80), rate=0.5, seed=1, half=half):
            for span in example.spans:
                found.add(span.kind)
                text = example.answer[span.start : span.end].strip()
                assert (span.kind, half) not in PHRASES or text in PHRASES[span.kind, half]
        assert found == set(KINDS)
    assert not set(PHRASES["opening", "tune"]) & set(PHRASES["opening", "held"])


def test_more_rows_leave_those_before_as_they_are():
    few, many = (plant(rows(number=n), rows(), rate=0.5, seed=3) for n in (4, 6))
    assert many[:4] == few


def test_held_out_questions_are_never_trained_on():
    trained = {row.question for row in data.families("train", 500, 0)}
    assert not trained & {row.question for row in data.families("test", 200, 0)}


@needs_shared
def test_tokens_know_what_they_are():
    tokenizer = load_tokenizer("small")
    row = Row("x", "What is 2 + 3?", ("Adding gives 2 + 3 = 5.", "It is 5."), "5", " ")
    (example,) = plant([row], [row], rate=1.0, seed=0, kinds=("opening",), half="tune")
    (encoded,) = encode(tokenizer, [example], 512)
    texts = [tokenizer.decode([i]) for i in encoded.ids[encoded.start :]]
    planted = "".join(t for t, kind in zip(texts, encoded.kinds, strict=True) if kind == "opening")
    assert planted.strip() == example.answer[: example.spans[0].end].strip()
    assert encoded.kinds[-1] == END == encoded.classes[-1]
    assert texts[-1] == "<|im_end|>"
    result = [i for i, c in enumerate(encoded.classes) if c == "result"]
    assert [texts[i].strip() for i in result] == ["5"]
    assert result[0] > max(i for i, t in enumerate(texts) if t.strip() == "3")
    assert set(encoded.kinds) == {CONTENT, END, "opening"}


@pytest.mark.parametrize(
    ("row_id", "result", "text", "is_right"),
    [
        ("gsm8k-test-0", "18", "2 + 16 = 18\n#### 18", True),
        ("gsm8k-test-0", "18", "2 + 16 = 18\n#### 19", False),
        ("gsm8k-test-0", "1,800", "So $1800 are left.", True),
        ("families-test-0-0", "18", "It is 18. I hope this helps!", True),
        ("families-test-0-0", "18", "First 18. Then 20. Ada now has 118 eggs.", False),
        ("families-test-0-0", "18", "", False),
    ],
)
def test_marking(row_id, result, text, is_right):
    assert right(Row(row_id, "?", ("",), result), text) == is_right


@NO_DEADLINE
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_the_share_of_pairs(drawn):
    scores = np.array([s for s, _ in drawn], dtype=np.float64)
    noise = np.array([n for _, n in drawn])
    if noise.all() or not noise.any():
        return
    pairs = [(c > n) + (c == n) / 2 for c in scores[~noise] for n in scores[noise]]
    found = over_examples(auroc, scores, ~noise, noise, np.array([0, len(scores)]), num_resamples=2)
    assert found.value == pytest.approx(np.mean(pairs))


def test_average_precision_by_hand():
    # dropped in this order: noise, content, noise
    assert average_precision((np.array([0.0, 1, 0]), np.array([1.0, 0, 1]))) == pytest.approx((1 + 2 / 3) / 2)


def test_a_paired_interval_holds_the_difference_and_not_what_both_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 10, (5, 1)) + rng.normal(0, 10, (1, 60))
    ones = np.ones((5, 60))
    better = shared - 0.5 + rng.normal(0, 0.1, (5, 60))
    value, low, high = paired_difference(better, ones, shared, ones)
    assert low < -0.5 < high < 0
    assert high - low < 0.1
    assert value == pytest.approx((better - shared).mean())


@pytest.mark.parametrize(
    ("of_seed", "of_answer"), [(1, 0), (0, 1), (0.3, 1)], ids=["seeds", "answers", "both"]
)
def test_as_many_intervals_hold_the_truth_as_they_say_whatever_varies(of_seed, of_answer):
    rng = np.random.default_rng(0)
    ones, zeros = np.ones((5, 40)), np.zeros((5, 40))
    held = []
    for _ in range(500):
        drawn = of_seed * rng.normal(size=(5, 1)) + of_answer * rng.normal(size=(1, 40))
        _, low, high = paired_difference(drawn + rng.normal(size=(5, 40)), ones, zeros, ones)
        held.append(low < 0 < high)
    assert 0.93 < np.mean(held) < 0.98  # resampling the seeds: 0.87 where they vary most


def test_ranks_and_position_by_hand():
    np.testing.assert_allclose(
        ranks(np.array([3.0, 1, 9, 5]), np.array([0, 3, 4])), [1.5 / 3, 0.5 / 3, 2.5 / 3, 0.5]
    )
    values = np.array([4.0, 1, 2, 3])
    np.testing.assert_allclose(without_position(values, np.array([0, 2, 4]), width=1), [1, -1, -1, 1])


@pytest.mark.parametrize(
    ("name", "registered", "params"),
    [
        ("sstoken", "sstoken", {}),
        ("rel", "rel", {}),
        ("attention", "attention", {}),
        ("loss", "loss", {}),
        ("low-loss", "trimming", {"keep": "low"}),
        ("pmi-band", "pmi-band", {}),
    ],
)
def test_a_score_ranks_as_the_method_of_its_name(name, registered, params):
    rng = np.random.default_rng(0)
    offsets = np.array([0, 5, 12])
    names = ("history.loss", "history.loss_unconditional", "current.loss", "current.attention")
    signals = {signal: rng.random(12) * 3 for signal in names}
    method = get_method(registered)
    own = method.score(Tokens(offsets, signals), method.read_params(params))
    np.testing.assert_allclose(SCORES[name](signals, offsets), own)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_can_tell(path):
    study = read_study(path.stem)
    assert study.name == path.stem
    methods = {method.method for method in study.methods}
    assert not methods or study.variance or {"full", "random", "prefix", "worst"} <= methods
    assert study.base in BASES


def test_every_method_is_trained_as_published_or_left_out_with_the_reason():
    study = read_study("every-method")
    trained = {how: {m.method for m in study.methods if m.published == how} for how in ("offline", "in-loop")}
    baselines = {"full", "random"}
    assert trained["offline"] | set(LEFT_OUT) | baselines == {m.name for m in own_methods()}
    assert not trained["offline"] & (set(LEFT_OUT) | baselines)
    for name in trained["offline"]:
        try:
            check_in_loop(get_method(name), "snapshot" if name.startswith("eksft") else "scores")
            differs = "current" in get_method(name).roles  # what reads the base alone decides as offline
        except UsageError:
            differs = False
        assert (name in trained["in-loop"]) == differs, name


def test_a_published_method_has_no_settings_but_its_own():
    with pytest.raises(ValidationError, match="rho"):
        MethodRun(method="sstoken", published="offline", rho=0.5)


def test_losses_are_weighted_by_hand():
    losses, weights = torch.tensor([1.0, 2, 3, 4]), np.array([1.0, 0.5, -0.25, -0.25])
    # learned: 1 and 1; forgotten: 0.25 * (3 + 4), over two tokens in the place of two learned ones
    assert weighted_loss(losses, weights, None).item() == pytest.approx((1 + 1 - 0.25 * 7) / 2)
    assert weighted_loss(losses[:2], weights[:2], 5).item() == pytest.approx(2 / 5)


def test_a_batch_of_which_nothing_is_kept_is_a_step_like_the_others():
    class Bigrams:
        """A student that predicts each token from itself."""

        def __init__(self):
            torch.manual_seed(0)
            self.model = torch.nn.Embedding(9, 9)

        def response_logits(self, batch, chosen):
            ids = torch.from_numpy(
                np.concatenate([e.ids[e.start :][k] for e, k in zip(batch, chosen, strict=True)])
            )
            return self.model(ids), ids

    kinds = np.array([CONTENT] * 4)
    examples = [Encoded(np.arange(5) + i, 1, kinds, kinds) for i in range(4)]
    options = {"num_steps": 3, "batch_size": 2, "learning_rate": 0.1, "seed": 0}
    order = batches(4, 2, 3, 0)
    keep = [np.full(4, i not in order[0]) for i in range(4)]
    kept = [sum(int(keep[i].sum()) for i in batch) for batch in order]
    left_out, weighed, steps = Bigrams(), Bigrams(), []
    assert train(left_out, examples, keep, **options, after_step=steps.append) == (sum(kept), kept.count(0))
    assert steps == [1, 2, 3]
    train(weighed, examples, [np.ones(4, bool)] * 4, [k.astype(float) for k in keep], **options)
    torch.testing.assert_close(left_out.model.weight, weighed.model.weight)


def test_what_is_to_be_forgotten_is_not_kept():
    kinds, weight = np.array([CONTENT, CONTENT, "typo", END]), np.array([1.0, -0.25, 0.5, 0])
    example = Encoded(np.arange(5), 1, kinds, np.array(["word", "word", "word", END]))
    share = share_kept(Decision([weight != 0], [weight], "kept"), [example])
    assert (share["all"], share["content"], share["noise"], share[END]) == (0.5, 0.5, 1, 0)
    assert share[WEIGHT_ON_NOISE] == pytest.approx(0.5 / 1.5)


def test_methods_are_told_apart_by_their_own_intervals_and_by_those_of_all():
    def row(low, high, width):
        own = {"all": (0.0, low, high)}
        return {"loss": own, "at_once": {"full": (0.0, low - width, high + width)}}

    methods = {"full": {"at_once": {}}, "a": row(-3, -2, 1), "b": row(-3, -2, 2), "c": row(-1, 1, 1)}
    methods |= {"d": row(2, 3, 2), "e": row(2, 3, 1)}
    assert list(told_apart(methods, "full").values()) == [["a"], ["b"], ["c"], ["d"], ["e"]]


@needs_shared
def test_in_the_loop_the_trainer_takes_the_benchmarks_steps_and_offline_the_methods_decide(tmp_path):
    from benchmarks.quality.study import Cells

    full = MethodRun(method="full")
    loop, dft, sstoken, stm = (
        MethodRun(method=name, published=how)
        for name, how in (("full", "in-loop"), ("dft", "in-loop"), ("sstoken", "offline"), ("stm", "offline"))
    )
    study = Study(
        name="published", about="A test.", base="small", data="families", num_train=4, noise_rate=0.5, batch_size=2,
        learning_rate=1e-3, num_held_out=2, max_length=96, methods=(full, loop, dft, sstoken, stm),
        seeds=(Seed(data=0, noise=0, order=0),),
    )  # fmt: skip
    cells = Cells(study, tmp_path, lambda line: None)
    cells.run()
    found = {m.key: json.loads(cells.path(m, study.seeds[0]).read_text()) for m in study.methods}

    def losses(key):
        return [answer["loss_all"] for answer in found[key]["held_out"]]

    assert losses("in-loop full") == pytest.approx(losses("full"), rel=1e-4), "other batches, rates or losses"
    assert losses("in-loop dft") != pytest.approx(losses("full"), rel=1e-3)
    assert found["in-loop full"]["trained_tokens"] == found["full"]["trained_tokens"]
    training = cells.training_set(study.seeds[0])
    ours = cells.decide(MethodRun(method="sstoken"), study.seeds[0], training).keep
    theirs = cells.decide(sstoken, study.seeds[0], training).keep
    assert np.mean(np.concatenate(ours) == np.concatenate(theirs)) > 0.98  # but where batches round otherwise
    assert 0 < found["published stm"]["kept"]["all"] < 1


@pytest.mark.slow
@needs_shared
def test_a_study_from_end_to_end_and_again(tmp_path):
    from benchmarks.quality.report import write_report
    from benchmarks.quality.study import Cells

    seeds = (Seed(data=0, noise=0, order=0), Seed(data=1, noise=1, order=1))
    methods = tuple(MethodRun(method=m) for m in ("full", "random", "sstoken", "pmi-band", "noise"))
    study = Study(
        name="tiny", about="A test.", base="small", data="families", num_train=6, noise_rate=0.5, batch_size=3,
        learning_rate=1e-3, num_held_out=4, num_greedy=2, max_new_tokens=4, num_forgetting=2, max_length=128,
        methods=methods, seeds=seeds, checkpoints=(1,), layers=True,
    )  # fmt: skip
    said: list[str] = []
    cells = Cells(study, tmp_path / "cells", said.append)
    cells.run()
    assert len(said) == (len(methods) + 1) * len(seeds)  # the attention of every layer, once a seed
    figures = write_report(cells, tmp_path / "results", "a command")
    kept = {name: f["kept"] for name, f in figures["methods"].items()}
    assert kept["full"]["noise"] == 1
    assert kept["noise"]["noise"] == 0
    assert kept["noise"]["content"] == 1
    assert kept["random 0.6"]["all"] == pytest.approx(0.6, abs=0.02)
    assert figures["found"]["sstoken"]["auroc"]["all"][0] > 0
    table = pq.read_table(tmp_path / "results" / "tiny.parquet")
    assert table.num_rows == len(methods) * len(seeds) * (4 + 2 + 2 + 2)  # held out, greedy, roleplay, plain
    assert "| noise |" in (tmp_path / "results" / "tiny.md").read_text()
    first = json.loads((tmp_path / "results" / "tiny.json").read_text())
    Cells(study, tmp_path / "cells", said.append).run()
    assert len(said) == (len(methods) + 1) * len(seeds), "a finished cell ran again"
    cells.path(methods[1], seeds[0]).unlink()
    Cells(study, tmp_path / "cells", said.append).run()
    write_report(cells, tmp_path / "results", "a command")
    again = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert again["methods"] == first["methods"], "another result from the same seeds"
    layers = first["sweeps"]["Prompt attention of the base by layer"]["rows"]
    assert len(layers) == len(set(layers)) >= 4
    [histories] = [table for title, table in first["sweeps"].items() if "by checkpoint" in title]
    assert list(histories["rows"]) == [
        "the base to after step 1",
        "the base to after all steps",
        "after step 1 to after all steps",
    ]
    write_report(Cells(study, tmp_path / "nothing", said.append), tmp_path / "results", "a command")
    of_table = json.loads((tmp_path / "results" / "tiny.json").read_text())
    for method, figures in again["methods"].items():
        assert of_table["methods"][method]["loss"] == figures["loss"]
        assert of_table["methods"][method].get("right") == figures.get("right")
    assert of_table["found"] == again["found"]


@needs_shared
def test_each_source_of_variance_moves_what_it_names_alone(tmp_path):
    from benchmarks.quality.study import Cells

    random = MethodRun(method="random")
    first = Seed(data=0, noise=0, order=0)
    study = Study(
        name="sources", about="A test.", base="small", data="families", num_train=6, noise_rate=0.5,
        methods=(MethodRun(method="full"), random), seeds=(first,),
    )  # fmt: skip
    cells = Cells(study, tmp_path, lambda line: None)

    def drawn(seed):
        training = cells.training_set(seed)
        clean = [row.question for row in data.draw("families", "train", 6, seed.data)]
        noisy = [e.ids.tolist() for e in training]
        return (
            clean,
            noisy,
            batches(6, 2, 9, seed.order),
            np.concatenate(cells.decide(random, seed, training).keep),
        )

    here = drawn(first)
    for seed, moved in (
        (Seed(data=1, noise=0, order=0), (True, True, False)),
        (Seed(data=0, noise=1, order=0), (False, True, False)),
        (Seed(data=0, noise=0, order=1, draw=0), (False, False, True)),
        (Seed(data=0, noise=0, order=0, draw=1), (False, False, False)),
    ):
        there = drawn(seed)
        assert tuple(a != b for a, b in zip(here[:3], there[:3], strict=True)) == moved, seed
        if not any(moved[:2]):
            assert np.array_equal(here[3], there[3]) == (seed.drawn == 0)
    assert cells.path(random, first) != cells.path(random, Seed(data=0, noise=0, order=0, draw=1))


@needs_shared
@pytest.mark.parametrize("upper_layers", [None, 1])
def test_the_last_of_all_layers_is_the_layer_that_is_measured(upper_layers):
    from benchmarks.quality.signals import measure, measure_layers
    from benchmarks.quality.student import Student

    examples = encode(load_tokenizer("small"), plant(rows(number=2), rows(), rate=0.5, seed=0), 64)
    student = Student("small", upper_layers, 0, attention="eager")
    every = measure_layers(student, examples, "history")
    last = measure(student, examples, "history", attention=True, unconditional=False)["history.attention"]
    assert len(every) == student.model.config.num_hidden_layers
    np.testing.assert_allclose(every[f"history.attention@{len(every) - 1}"], last, atol=1e-6)
    assert not np.allclose(every["history.attention@0"], last, atol=1e-3)


def test_a_standard_deviation_and_its_interval():
    from benchmarks.quality.variance import deviation

    rng = np.random.default_rng(0)
    found = [deviation(rng.normal(0, 2, 5)) for _ in range(400)]
    assert 0.92 < np.mean([low < 2 < high for _, low, high in found]) < 0.98
    assert deviation(np.array([1.0, 3, 5])).value == pytest.approx(2)


@needs_shared
def test_a_lesson_is_taught_once_and_shared(tmp_path):
    from benchmarks.quality.settings import Lesson
    from benchmarks.quality.study import Cells

    methods = (MethodRun(method="base"), MethodRun(method="full"))
    seeds = (Seed(data=0, noise=0, order=0), Seed(data=1, noise=0, order=0))
    study = Study(
        name="taught", about="A test.", base="small", data="families", num_train=4, noise_rate=0, batch_size=2,
        learning_rate=1e-3, num_held_out=3, num_forgetting=2, max_length=96, methods=methods,
        lesson=Lesson(num_train=8, batch_size=4), seeds=seeds,
    )  # fmt: skip
    said: list[str] = []
    Cells(study, tmp_path / "taught", said.append).run()
    Cells(study.model_copy(update={"name": "other"}), tmp_path / "other", said.append).run()
    assert [line for line in said if "taught the base" in line] == [
        "taught  taught the base: small-families-8-4-0.002"
    ]
    base, full = (
        [json.loads(p.read_text()) for p in sorted((tmp_path / "taught" / "cells").glob(f"{name}-*"))]
        for name in ("base", "full")
    )
    assert base[0]["held_out"] == base[1]["held_out"], "the base differs between seeds"
    assert base[0]["steps"] == base[0]["trained_tokens"] == 0
    assert full[0]["held_out"] != base[0]["held_out"]
    assert {"forgetting", "plain"} <= set(full[0])
    plain = Study.model_validate(study.model_dump() | {"lesson": None, "name": "plain"})
    Cells(plain, tmp_path / "plain", said.append).run()
    untaught = json.loads(next((tmp_path / "plain" / "cells").glob("base-*")).read_text())
    taught, raw = (
        sum(r["loss_all"] for r in found["held_out"]) / sum(r["tokens_all"] for r in found["held_out"])
        for found in (base[0], untaught)
    )
    assert taught < raw
