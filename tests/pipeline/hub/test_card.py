"""The dataset card and its pictures: what they say is so, and text from outside is text."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pyarrow as pa
import pytest
import yaml
from datasets import Features
from markdown_it import MarkdownIt

from sstoken.stages import tables
from sstoken.stages.hub.card import Shards, card
from sstoken.stages.hub.pictures import draw_scores, score_histogram
from sstoken.stages.hub.provenance import hub_names, public
from tests.pipeline.worlds import make_world

HOSTILE = "a|b<script>alert(1)</script>`x`[y](javascript:z)\n\n# *h*\x1b[31m\u202e{repo}"
METRICS = {"kept": 6, "response_tokens": 10, "kept_share": 0.6}
SHARDS = Shards(tables.MASKED, examples=12_345, tokens=20, arrow_bytes=900, file_bytes=500)


def facts(name="base"):
    checkpoint = {"name": name, "checkpoint": name, "dtype": "float32"}
    return {
        "method": "sstoken", "rho": 0.6, "gamma": 0.5, "scope": "sample", "seed": 0, "layer": -1, "max_length": 512,
        "checkpoints": dict.fromkeys(("history", "current", "attention"), checkpoint),
        "tokenizer": {"name": name, "fingerprint": "f", "vocab_size": 9}, "version": "1", "fingerprint": "0123",
    }  # fmt: skip


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_text_from_outside_is_text_in_the_card():
    text = card("me/x", facts(HOSTILE), METRICS, {"name": HOSTILE}, HOSTILE, SHARDS)
    assert front(text)["license"] == HOSTILE
    assert set(front(text)) == set(front(card("me/x", facts(), METRICS, {}, "mit", SHARDS)))
    body = text.split("---\n", 2)[2]
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    plain = (
        MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(card("me/x", facts(), METRICS, {"name": "n"}, "mit", SHARDS).split("---\n", 2)[2])
    )
    assert re.findall(r"<(\w+)", html) == re.findall(r"<(\w+)", plain)  # not one element more
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert html.count("alert(1)") == 6  # each is shown


def test_what_the_viewer_reads():
    origin = {
        "data": {"hub": "openai/gsm8k", "config": "main", "commit": "c0ffee"},
        "tokenizer": {"hub": "org/base", "commit": "b"},
        "checkpoints": {
            "history": {"hub": "org/base", "commit": "b"},
            "current": {
                "files": {"adapter_model.safetensors": "0"},
                "base": {"hub": "org/tuned", "commit": "t"},
            },
            "attention": None,
        },
        "name": "gsm8k:main",
    }
    text = card("me/x", facts(), METRICS, origin, ["mit", "apache-2.0"], SHARDS)
    found = front(text)
    assert found["license"] == ["mit", "apache-2.0"]
    assert found["source_datasets"] == ["openai/gsm8k"]
    assert found["base_model"] == ["org/base", "org/tuned"]
    assert found["size_categories"] == ["10K<n<100K"]
    assert {"token-masked", "sstoken"} <= set(found["tags"])
    assert found["configs"][0]["data_files"] == [{"split": "train", "path": "data/part-*.parquet"}]
    assert (
        Features._from_yaml_list(found["dataset_info"]["features"]).arrow_schema.remove_metadata()
        == tables.MASKED
    )
    assert "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k)" in text
    assert "openai/gsm8k at c0ffee" in text
    assert 'model="org/base"' in text
    assert "max_length=512" in text


@pytest.mark.parametrize(
    ("examples", "category"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (100_000, "100K<n<1M"),
     (10**9, "1B<n<10B")],
)  # fmt: skip
def test_size_categories(examples, category):
    shards = Shards(tables.MASKED, examples, 1, 1, 1)
    assert front(card("me/x", facts(), METRICS, {}, None, shards))["size_categories"] == [category]


def test_places_become_names_and_hub_repositories_stay():
    origin = {
        "tokenizer": {"hub": "org/base"},
        "checkpoints": {"current": {"base": {"hub": "org/b"}}, "x": None},
    }
    hub = hub_names(origin)
    assert hub == {"org/base", "org/b"}
    given = {
        "a": [
            "/home/me/models/sft",
            "~/x/y",
            "org/base",
            "org/base@v1",
            "runs/base",
            r"C:\me\z",
            "s3://key@b/p/q",
        ],
        "b": {"c": "../up", "d": 1, "e": None, "f": "step-20"},
    }
    assert public(given, hub) == {
        "a": ["sft", "y", "org/base", "org/base@v1", "base", "z", "q"],
        "b": {"c": "up", "d": 1, "e": None, "f": "step-20"},
    }


def save(folder, scores, keep):
    """One masked row."""
    folder.mkdir()
    n = len(keep)
    row = {
        "example_id": ["0"], "input_ids": [[1] * n], "labels": [[1] * n], "keep_mask": [keep], "rel": [scores],
        "response_mask": [[True] * n], "attention": [scores], "score": [scores],
    }  # fmt: skip
    table = pa.table({name: row[name] for name in tables.MASKED.names}, schema=tables.MASKED)
    tables.write_part(folder / tables.part_name(0), table, {})
    return folder


def test_every_token_with_a_score_is_counted_but_far_outliers(tmp_path):
    random = np.random.default_rng(0)
    scores = random.normal(size=20_000).astype(np.float32)
    scores[0] = 1e6
    keep = scores > 0.25
    folder = save(tmp_path / "m", scores.tolist(), keep.tolist())
    edges, kept, dropped = score_histogram(tables.parts(folder))
    assert len(edges) == len(kept) + 1 == len(dropped) + 1 <= 62
    assert kept.sum() + dropped.sum() >= 0.997 * len(scores)


@pytest.mark.parametrize(
    ("scores", "shown"),
    [([0.0] * 5, 5), ([0.1, 0.2, None, 0.3, 0.4], 4), ([None] * 5, None), ([-3.0, 1.0, 1.0, 1.0, 2.0], 5)],
)
def test_odd_scores(tmp_path, scores, shown):
    folder = save(tmp_path / "m", scores, [True, False, True, False, True])
    found = score_histogram(tables.parts(folder))
    assert (found is None) == (shown is None)
    if found is not None:
        edges, kept, dropped = found
        assert kept.sum() + dropped.sum() == shown
        assert edges[0] <= min(s for s in scores if s is not None) + 1e-6
    draw_scores(folder, {"kept_share_by_decile": [0.5, None] * 5}, tmp_path / "a.svg")
    draw_scores(folder, {"kept_share_by_decile": [0.5, None] * 5}, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


@pytest.mark.slow
def test_the_programs_of_the_card_run(hub, client, masked, tmp_path):
    client.works("publish", masked, "--repo", "me/trained", "--out", tmp_path / "prepared")
    programs = re.findall(
        r"```python\n(.*?)```", hub.files("me/trained")["README.md"].decode(), flags=re.DOTALL
    )
    assert len(programs) == 2
    here = {
        'model="your/model"': f'model="{make_world().base}"',
        'SFTConfig("trained", ': f'SFTConfig("{tmp_path}", bf16=False, report_to="none", max_steps=2, ',
        "max_length=4096": "max_length=64",
    }
    for program in programs:
        for given, wanted in here.items():
            assert given in program or program is programs[0]
            program = program.replace(given, wanted)
        done = client.python(program)
        assert done.code == 0, done.code
    assert (tmp_path / "checkpoint-2").is_dir()
