"""Batch plans: within their budgets, complete, and without a cheaper plan that is as simple."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sstoken.measure.batching import by_class, plan_packed, plan_padded

lengths = st.lists(st.integers(1, 40), max_size=30)
budgets = st.integers(1, 120)


@given(lengths, budgets)
def test_padded_batches_hold_at_most_the_budget(lengths, budget):
    batches = plan_padded(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1


@given(lengths, budgets)
def test_padded_batches_are_filled_from_the_longest_on(lengths, budget):
    batches = plan_padded(lengths, budget)
    planned = [lengths[i] for batch in batches for i in batch]
    assert planned == sorted(lengths, reverse=True)
    for batch, following in zip(batches, batches[1:], strict=False):
        assert (len(batch) + 1) * lengths[batch[0]] > budget, f"{following} could start in {batch}"


@given(lengths, budgets)
def test_packed_batches_keep_the_order_and_the_budget(lengths, budget):
    batches = plan_packed(lengths, budget)
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    for batch in batches:
        assert batch
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
    for batch, following in zip(batches, batches[1:], strict=False):
        assert sum(lengths[i] for i in batch) + lengths[following[0]] > budget


@pytest.mark.parametrize("plan", [plan_padded, plan_packed])
def test_equal_lengths_fill_the_budget_exactly(plan):
    assert plan([4, 4, 4, 4, 4], 8) == [[0, 1], [2, 3], [4]]
    assert plan([], 8) == []
    assert plan([9, 3, 3], 8) == [[0], [1, 2]]


def test_classes_stay_apart_and_in_order():
    assert by_class([3, 1, 2, 0], ["b", "a", "b", "a"]) == [[3, 2], [1, 0]]
    with pytest.raises(ValueError, match="argument"):
        by_class([1, 2], ["a"])
