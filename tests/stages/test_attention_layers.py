"""The layer that is steadiest between snapshots, from scores folders; against numpy's correlation."""

import numpy as np
import pytest

from sstoken import SstokenError, UsageError
from sstoken.stages.attention_layers import layer_stability
from sstoken.stages.joins import RUN, TOKENS
from sstoken.stages.scores_file import write_scores
from sstoken.stages.tables import part_name

COUNTS = ([3, 0, 5], [4])


def save(folder, layers, tokens="same"):
    """Two shards; `layers`: attention by layer, [12] over all response tokens."""
    folder.mkdir()
    start = 0
    for number, counts in enumerate(COUNTS):
        stop = start + sum(counts)
        lengths = [1 + n for n in counts]
        offsets = np.cumsum([0, *lengths])
        response = np.ones(offsets[-1], bool)
        response[offsets[:-1]] = False
        signals = {f"attention@{layer}": v[start:stop].astype(np.float32) for layer, v in layers.items()}
        facts = {"checkpoint": folder.name, "layer": None, "dtype": "float32", RUN: folder.name}
        ids = [f"{number}-{i}" for i in range(len(counts))]
        write_scores(
            folder / part_name(number),
            ids,
            offsets,
            response,
            signals,
            facts | {TOKENS: f"{tokens}-{number}"},
        )
        start = stop
    return folder


def test_stability_is_the_mean_correlation_of_an_example(tmp_path):
    random = np.random.default_rng(0)
    steady, shaky = random.random(12), random.random((3, 12))
    constant = np.full(12, 0.25)
    folders = [
        save(tmp_path / f"step-{i}", {0: shaky[i], 1: steady * (1 + 0.1 * i) / 2, -1: constant})
        for i in range(3)
    ]
    found = layer_stability(folders)
    assert found[0].layer == 1
    by_layer = {layer.layer: layer for layer in found}
    assert by_layer[1].stability == pytest.approx(1, abs=1e-6)
    assert by_layer[-1].stability == by_layer[-1].spread == 0
    assert by_layer[-1].attention == pytest.approx(0.25)
    examples = [slice(0, 3), slice(3, 8), slice(8, 12)]
    expected = [np.corrcoef(shaky[i][e], shaky[i + 1][e])[0, 1] for i in (0, 1) for e in examples]
    assert by_layer[0].stability == pytest.approx(np.mean(expected), abs=1e-6)
    assert by_layer[0].spread == pytest.approx(
        np.mean([shaky[i][e].std() for i in (0, 1) for e in examples]), abs=1e-6
    )


def test_scores_that_cannot_be_compared(tmp_path):
    values = {0: np.linspace(0, 1, 12)}
    first = save(tmp_path / "step-0", values)
    with pytest.raises(UsageError, match="name the scores of two or more"):
        layer_stability([first])
    with pytest.raises(UsageError, match=r"no attention@LAYER is in all of step-0, step-1"):
        layer_stability([first, save(tmp_path / "step-1", {1: values[0]})])
    with pytest.raises(SstokenError, match="scores of other tokens"):
        layer_stability([first, save(tmp_path / "step-2", values, tokens="others")])
    with pytest.raises(UsageError, match=r"no part-\*.parquet"):
        layer_stability([first, tmp_path])
