"""The simulator of the scheduler agrees with what can be worked out by hand, and no shard gets lost in it."""

import pytest

from benchmarks.scale_sim import World, arithmetic, simulate


def test_equal_shards_take_what_arithmetic_says() -> None:
    assert simulate(World(10, (36.0,)), 1000) == {"hours": 1.0, "efficiency": 1.0, "quarantined": 0}
    assert simulate(World(10, (36.0,)), 1001)["efficiency"] == pytest.approx(1001 / 1010, abs=1e-3)


def test_the_driver_is_the_limit_where_it_is_slower_than_all_workers() -> None:
    found = simulate(World(1000, (10.0,), driver=0.1), 5000)
    assert found["hours"] == pytest.approx((5000 * 0.1 + 10) / 3600, abs=1e-3)


def test_storage_is_the_limit_where_it_serves_too_few() -> None:
    assert simulate(World(100, (1.0,), storage=0.1), 3000)["hours"] == pytest.approx(300 / 3600, rel=0.01)


def test_shards_of_workers_that_die_are_done_by_others() -> None:
    found = simulate(World(20, (60.0,), deaths=3.0), 2000)
    assert found["efficiency"] < 0.98
    # one of 20 attempts dies: three in a row are 0.012 % of the shards
    assert found["quarantined"] <= 5
    assert simulate(World(20, (60.0,), deaths=300.0), 200)["quarantined"] > 100


def test_the_arithmetic() -> None:
    found = arithmetic(1e12, 8e9, 400, 2e7)
    assert found["device_hours_per_checkpoint"] == 11111
    assert found["shards"] * found["seconds_per_shard"] == pytest.approx(11111 * 3600, rel=0.01)
