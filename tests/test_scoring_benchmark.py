"""The scoring benchmarks: both sides compute the same numbers, and what is printed keeps its form."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import dtype, rounds
from benchmarks.scoring_parts import inputs, sides, steps
from tests.support import PATIENCE, ROOT

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
EXAMPLES = [(5, 9), (30, 2), (1, 1), (12, 40), (3, 17), (8, 8), (2, 25), (60, 11), (4, 4)]
"""More than the plain script's batch, of lengths that make it pad."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and tokens."""
    folder = tmp_path_factory.mktemp("benchmark")
    inputs.make_model(folder / "model", "tiny", vocabulary=3000)
    inputs.write_tokens(folder / "tokens", EXAMPLES, vocabulary=3000)
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    """Loss and prompt attention of all response tokens, [2, N], by the stage."""
    rows = inputs.read_rows(sides.score_stage(folder / "tokens", folder / "model", folder))
    values = steps.on_responses(rows, response_masks(folder))
    assert values.shape == (2, sum(response for _, response in EXAMPLES))
    assert np.isfinite(values).all()
    return values


def response_masks(folder):
    return [np.array(row["response_mask"]) for row in inputs.read_rows(folder / "tokens")]


@pytest.mark.parametrize("attention", ["eager", "one-layer"])
def test_the_plain_script_gives_the_numbers_of_the_stage(folder, measured, attention):
    kept = sides.plain_script(folder / "tokens", sides.plain_model(folder / "model", attention), attention)
    np.testing.assert_allclose(steps.on_responses(kept, response_masks(folder)), measured, atol=1e-4, rtol=0)


@pytest.mark.parametrize("step", steps.STEPS)
def test_every_step_gives_the_numbers_of_the_stage(folder, measured, step):
    kept = steps.stepwise(folder / "tokens", sides.plain_model(folder / "model", "sdpa"), steps.STEPS[step])
    np.testing.assert_allclose(steps.on_responses(kept, response_masks(folder)), measured, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "least", "most"), [("short", 16, 1200), ("mixed", 16, 1200), ("long", 2000, 4000)]
)
def test_lengths_are_of_the_kind_asked_for(lengths, least, most):
    examples = inputs.real_examples(5, lengths)
    assert len(examples) == 5
    assert all(least <= prompt + response <= most for prompt, response in examples)


@pytest.mark.parametrize("lengths", ["short", "mixed"])
def test_more_examples_than_the_data_has(lengths):
    assert len(inputs.real_examples(8000, lengths)) == 8000


def test_a_dtype_differs_from_float32_by_its_rounding(folder, tmp_path):
    inputs.make_model(tmp_path / "other", "tiny", vocabulary=3000, seed=1)
    found = dtype.compare(
        str(tmp_path / "other"), str(folder / "model"), folder / "tokens", rows=len(EXAMPLES), rounds=1
    )
    assert list(found) == ["float32, small batches", "bfloat16", "float16"]
    again, coarse, fine = found.values()
    assert again["rel_max"] < 1e-4
    assert again["attention_max"] < 1e-5
    assert again["mask_rel"] == 0
    assert 1e-4 < fine["loss_max"] < coarse["loss_max"] < 0.5


def test_the_share_of_masks_that_differ_is_counted():
    expected = {
        "history.loss": np.array([5.0, 4.0, 3.0, 2.0, 1.0]),
        "current.loss": np.zeros(5),
        "current.attention": np.full(5, 0.25),
    }
    found = expected | {"history.loss": np.array([5.0, 4.0, 2.0, 2.5, 1.0])}
    facts = dtype.differences(expected, found, np.array([0, 5]))
    assert facts["mask_rel"] == facts["mask_sstoken"] == 0.4  # of five tokens, one came and one went
    assert facts["rel_max"] == 1.0
    assert facts["rel_mean"] == pytest.approx(0.3)
    assert facts["loss_max"] == facts["attention_max"] == 0


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / name, *arguments], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["scoring.py", "dtype.py"])
def test_help_says_how_to_run_it(name):
    text = "\n".join(run(name, "--help"))
    assert f"python benchmarks/{name} --quick" in text
    assert "--json" in text


@pytest.mark.slow
def test_the_last_line_of_the_scoring_benchmark_is_its_figures():
    lines = run(
        "scoring.py", "--models", "tiny", "--rows", "4", "--rounds", "1", "--lengths", "short",
        "--parts", "speed", "memory", "--quick", "--json",
    )  # fmt: skip
    figures = json.loads(lines[-1])
    speed = figures["tiny short"]
    assert speed["share_of_limit"] > 0  # both sides of it are measured: on a busy machine it can exceed 1
    assert speed["tokens_per_second"] > 0
    assert speed["ratio_to_eager"] > 0
    small, large = figures["memory_mb"]["sstoken"].values()
    assert small["peak"] > small["before"] > 0
    assert large["above"] > 0


def test_no_benchmark_measures_fewer_than_three_times():
    """Each takes its number of rounds from benchmarks/rounds.py; those of `quality/` are over seeds."""
    assert rounds.at_least(1) == rounds.ROUNDS == 3
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        source = path.read_text()
        if "__main__" in source:
            assert re.search(r"from benchmarks\.rounds import (at_least|middle|ROUNDS)", source), path


def test_dtypes_need_all_of_their_inputs():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "dtype.py", "--history", "a"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "together" in done.stderr
