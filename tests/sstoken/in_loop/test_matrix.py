"""Whatever people train with, crossed pairwise: loss and masks are those of full logits and eager attention."""

import itertools

import pytest

from sstoken import AttentionCapture, SstokenError, find_segments
from tests.sstoken.in_loop import matrix
from tests.sstoken.in_loop.small import flatten, make_model, make_scored_examples, save_tokenizer
from tests.support import needs_compiler

CASES = [
    pytest.param(case, id=matrix.name_of(case), marks=[pytest.mark.slow] * (case["extra"] == "torch.compile"))
    for case in matrix.pairwise()
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def check(case, watcher, logged):
    error, wrong = matrix.compare(case, watcher, logged)
    print(f"{matrix.name_of(case)}: loss {error:.1e}, masks {wrong:.3f}")
    first, last = (watcher.weights[step] for step in (0, matrix.STEPS - 1))
    assert any(not first[name].equal(last[name]) for name in first)
    assert error <= matrix.LOSS_TOLERANCE[case["precision"]]
    assert wrong <= matrix.MASK_TOLERANCE[case["precision"]]


@pytest.mark.parametrize("case", CASES)
def test_settings_that_go_together(tmp_path, tokenizer, case):
    check(case, *matrix.run(case, tmp_path, tokenizer))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("history", ["scores", "base"])
def test_compiled_to_machine_code(tmp_path, tokenizer, history):
    case = {
        "loop": "SFTTrainer",
        "precision": "bfloat16 autocast",
        "history": history,
        "batch": "padded",
        "extra": "torch.compile",
    }
    check(case, *matrix.run(case, tmp_path, tokenizer, backend="inductor"))


def test_every_two_settings_that_go_together_meet():
    possible = [dict(zip(matrix.AXES, v, strict=True)) for v in itertools.product(*matrix.AXES.values())]
    possible = [case for case in possible if not matrix.why_not(case)]
    chosen = matrix.pairwise()
    assert len(chosen) < 30 < len(possible)
    for pair in {pair for case in possible for pair in itertools.combinations(case.items(), 2)}:
        assert any(pair[0] in case.items() and pair[1] in case.items() for case in chosen), pair


def test_packed_rows_without_a_mask_are_refused():
    """What transformers does with position_ids where the model may use a cache: sequences would see each other."""
    batch = flatten(make_scored_examples(3))
    model = make_model()
    capture = AttentionCapture(model)
    labels, segments = batch.pop("labels"), find_segments(batch)
    capture.expect(labels != -100, segments)
    with pytest.raises(SstokenError, match="call the model with use_cache=False"):
        model(**batch)
    capture.expect(labels != -100, segments)
    model(**batch, use_cache=False)
    assert capture.take().any()


def test_the_tables_of_the_document_are_current(tmp_path):
    between = matrix.DOCUMENT.read_text().partition(matrix.BEGIN)[2].partition(matrix.END)[0]
    assert between == matrix.tables(tmp_path), "run: python -m tests.sstoken.in_loop.matrix"
