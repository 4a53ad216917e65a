"""Selection against a slow, obvious reference."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sstoken.errors import UsageError
from sstoken.selection import (
    MINMAX_EPSILON,
    Cut,
    global_cuts,
    global_quantile,
    keep_above,
    keep_per_example,
    keep_top,
    keep_top_tensor,
    minmax,
    num_kept,
    places,
    runs,
    sortable_keys,
    sums,
)

# Few distinct values, so that ties are common.
scores = st.lists(st.sampled_from([-3.5, -0.0, 0.0, 1e-300, 0.25, 0.5, 7.0, 1e300]), max_size=30)
examples = st.lists(scores, max_size=6)
ratios = st.sampled_from([0.01, 0.1, 0.3, 0.55, 0.6, 0.999, 1.0])


def flat(rows):
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    return np.array([x for row in rows for x in row], dtype=np.float64), offsets


def reference_keep(row, k):
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    return [i in order[:k] for i in range(len(row))]


@given(st.lists(st.lists(st.booleans(), max_size=6), max_size=6))
def test_places_sums_and_runs_equal_a_loop_over_the_examples(rows):
    values, offsets = flat(rows)
    mask = values.astype(bool)
    assert places(offsets).tolist() == [i for row in rows for i in range(len(row))]
    assert sums(mask.astype(np.int64), offsets).tolist() == [sum(row) for row in rows]
    begins, seen = [], 0
    for row in rows:
        for before, now in zip([False, *row], row, strict=False):
            if now and not before:
                begins.append(seen)
            seen += now
    assert runs(mask, offsets).tolist() == [*begins, seen]


def test_sums_of_counts_are_counts():
    assert sums(np.array([2, 3]), np.array([0, 1, 2])).dtype.kind == "i"


@given(examples, ratios)
def test_keep_per_example_equals_sorting_each_example(rows, rho):
    values, offsets = flat(rows)
    expected = [x for row in rows for x in reference_keep(row, math.ceil(Fraction(str(rho)) * len(row)))]
    assert keep_per_example(values, offsets, rho).tolist() == expected


@given(examples, ratios)
def test_tensors_keep_the_same(rows, rho):
    values, offsets = flat(rows)
    quotas = [num_kept(len(row), rho) for row in rows]
    unit = torch.from_numpy(np.repeat(np.arange(len(rows)), np.diff(offsets)))
    kept = keep_top_tensor(torch.from_numpy(values), unit, quotas)
    assert kept.tolist() == keep_top(values, offsets, quotas).tolist()


@given(examples, ratios)
def test_minmax_equals_the_formula(rows, rho):
    values, offsets = flat([[x / 1e299 for x in row] for row in rows])
    expected = []
    for a, b in zip(offsets[:-1], offsets[1:], strict=True):
        row = values[a:b]
        expected += [(x - row.min()) / (row.max() - row.min() + MINMAX_EPSILON) for x in row]
    np.testing.assert_array_equal(minmax(values, offsets), expected)


@given(examples, ratios)
def test_global_cut_equals_sorting_everything(rows, rho):
    values, _ = flat(rows)
    if values.size == 0:
        return
    k = num_kept(values.size, rho)
    chunks = [np.array(row, dtype=np.float64) for row in rows]
    [cut] = global_cuts(lambda: chunks, [k])
    kept, ties = [], 0
    for chunk in chunks:
        mask, ties = keep_above(chunk, cut, ties)
        kept += mask.tolist()
    assert kept == reference_keep(values.tolist(), k)


def test_several_cuts_in_one_go_and_those_that_keep_nothing():
    values = np.array([2.0, -1.0, np.inf, 2.0])
    ks = [0, 2, 0, 4]
    cuts = global_cuts(lambda: [values], ks)
    assert [int(keep_above(values, cut, 0)[0].sum()) for cut in cuts] == ks
    assert cuts == [global_cuts(lambda: [values], [k])[0] for k in ks]
    assert cuts[0] == cuts[2] == Cut(2**64 - 1, 0)  # above every score
    assert (cuts[1].value, cuts[3].value) == (2.0, -1.0)


@given(st.lists(st.lists(st.floats(-9, 9), max_size=9), max_size=5), st.floats(0, 1))
def test_global_quantile_equals_numpys(rows, q):
    values, _ = flat(rows)
    chunks = [np.array(row, dtype=np.float64) for row in rows]
    expected = np.quantile(values, q) if values.size else 0.0
    assert global_quantile(lambda: chunks, q) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_sortable_keys_keep_the_order(a, b):
    keys = sortable_keys(np.array([a, b]))
    assert (keys[0] < keys[1]) == (a < b)
    assert (keys[0] == keys[1]) == (a == b)


def test_rho_is_read_as_the_decimal_it_is_written_as():
    assert 0.55 * 100 > 55  # what binary floating point makes of it
    assert num_kept(100, 0.55) == 55
    assert num_kept(0, 0.6) == 0
    assert num_kept(1, 0.01) == 1
    assert num_kept(7, 1) == 7


def test_equal_scores_keep_the_earlier_tokens():
    kept = keep_per_example(np.zeros(5), np.array([0, 5]), 0.6)
    assert kept.tolist() == [True, True, True, False, False]


def test_a_constant_signal_normalises_to_zero():
    assert minmax(np.full(3, 2.5), np.array([0, 3])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("rho", [0, -0.1, 1.5, math.nan, math.inf])
def test_a_ratio_out_of_range_is_refused(rho):
    with pytest.raises(UsageError, match="legal is 0 < rho <= 1"):
        num_kept(10, rho)
