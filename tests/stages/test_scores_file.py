"""Scores folders: compact signals in, one column each out, null where nothing was measured."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from sstoken.signals import get_signal
from sstoken.stages import tables
from sstoken.stages.scores_file import measured_tokens, summarize_scores, write_scores

ABOUT = {"checkpoint": "c", "layer": None, "dtype": "float32"}


@given(st.lists(st.lists(st.booleans(), max_size=6), min_size=1, max_size=6))
def test_values_stand_at_their_tokens_and_all_else_is_null(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("scores")
    response = np.array([r for row in rows for r in row], dtype=bool)
    offsets = np.cumsum([0, *map(len, rows)])
    firsts = {
        next((a + i for i, r in enumerate(row) if r), None) for row, a in zip(rows, offsets, strict=False)
    }
    count = int(response.sum())
    later = [p for p in np.flatnonzero(response) if p not in firsts]
    assert measured_tokens(get_signal("loss_unconditional"), response, offsets).nonzero()[0].tolist() == later
    signals = {
        "loss": np.arange(count, dtype=np.float32),
        "rank": np.arange(count, dtype=np.int32) * 7,
        "loss_unconditional": np.arange(len(later), dtype=np.float32),
    }
    ids = [str(i) for i in range(len(rows))]
    write_scores(folder / tables.part_name(0), ids, offsets, response, signals, ABOUT)
    table = pq.read_table(folder / tables.part_name(0))
    places = {"loss": np.flatnonzero(response), "rank": np.flatnonzero(response), "loss_unconditional": later}
    for name, at in places.items():
        expected = [None] * response.size
        for place, value in zip(at, signals[name].tolist(), strict=True):
            expected[place] = value
        assert [x for row in table[name].to_pylist() for x in row] == expected
        assert table[name].combine_chunks().offsets.to_pylist() == offsets.tolist()
    assert table["rank"].type == pa.list_(pa.int32())
    assert tables.is_sound(folder / tables.part_name(0))
    summary = summarize_scores(folder, "c")
    assert summary["mean_loss"] == (count - 1) / 2 if count else summary["mean_loss"] == 0
    assert summary["mean_loss_unconditional"] == max(0, (len(later) - 1) / 2)


def test_each_column_says_its_unit_and_meaning(tmp_path):
    path = tmp_path / tables.part_name(0)
    write_scores(
        path, ["a"], np.array([0, 1]), np.array([True]), {"attention@-1": np.ones(1, np.float32)}, ABOUT
    )
    said = json.loads(pq.read_schema(path).metadata[b"sstoken"])["signals"]
    assert list(said) == ["attention@-1"]
    assert said["attention@-1"]["unit"] == "probability"
    assert said["attention@-1"]["meaning"].endswith("layer -1")
