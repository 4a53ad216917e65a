"""The configuration: what is read, what is refused; and what a change of it makes a run do again."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sstoken.errors import SstokenError, UsageError
from sstoken.pipeline import api
from sstoken.pipeline.checkpoint_names import named_checkpoints
from sstoken.pipeline.config import load_config
from sstoken.stages import tables
from sstoken.stages.encoding.sources import locate
from tests import factories
from tests.pipeline.worlds import SHARD_ROWS, World, copy_model, snapshot

MINIMAL = "out: o\nencode: {data: d, model: m}\n"
HISTORY = ("step-0", "step-1", "step-2")


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


# Reading


def test_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.anchor is None
    assert (config.seed, config.select.method, config.select.rho, config.select.gamma) == (
        0,
        "sstoken",
        0.6,
        0.5,
    )
    assert config.score.checkpoints is None


@pytest.mark.parametrize("anchor", ["anchor:", "anchor: {}", "anchor: {epochs: 2}"])
def test_the_model_to_train_is_the_one_that_encodes(anchor: str, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL + anchor))
    assert config.anchor is not None
    assert config.anchor.model == "m"


def test_the_model_to_train_can_be_another(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL + "anchor: {model: other}"))
    assert config.anchor is not None
    assert config.anchor.model == "other"


def test_sections_with_nothing_under_them_have_their_defaults(tmp_path: Path) -> None:
    plain = load_config(write(tmp_path, MINIMAL))
    assert load_config(write(tmp_path, MINIMAL + "score:\nselect:\n  # rho: 0.5\n")) == plain


def test_a_pattern_beside_the_file_in_a_folder_whose_name_reads_as_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("runs[1]", "runs1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text('{"a": 1}\n')
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "runs[1]", MINIMAL.replace("data: d", "data: '*.jsonl'"))
    for folder in (".", "runs[1]"):
        monkeypatch.chdir(folder)
        (file,) = locate(load_config(path).encode.data)
        assert file.path == str(tmp_path / "runs[1]" / "rows.jsonl")


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "select: {rho: 0.5}")
    config = load_config(
        path,
        [
            "select.rho=0.4",
            "seed=7",
            "out=elsewhere",
            "anchor.max_steps=3",
            "encode.columns.question=text",
            "score.checkpoints=[step-0, last]",
            "select.history=a=b",
        ],
    )
    assert (config.select.rho, config.seed, config.out) == (0.4, 7, "elsewhere")
    assert config.anchor is not None
    assert (config.anchor.model, config.anchor.max_steps) == ("m", 3)
    assert config.encode.columns == {"question": "text"}
    assert config.score.checkpoints == ["step-0", "last"]
    assert config.select.history == "a=b"
    assert load_config(path).select.rho == 0.5


def bombs(levels: int) -> str:
    """Aliases of aliases: 9 to the power of `levels` values in so many lines."""
    lines = ["a0: &a0 [" + ", ".join(["x"] * 9) + "]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, levels)]
    return "out: o\n" + "\n".join(lines) + "\n"


BROKEN = {
    # what stands in the file: what the line has to say
    "": ("empty", "encode"),
    "# nothing\n": ("empty",),
    "- out: o\n": ("not a mapping",),
    "hello": ("not a mapping",),
    "out: o\nencode:\n\tdata: d\n": ("line 3, column 1", "indent with spaces"),
    "out: [o\n": ("not valid YAML", "line 2"),
    "out: o\n? [a, b]\n: c\n": ("line 2, column 3", "a key that is a list or a mapping"),
    "out: o\n? {a: b}\n: c\n": ("line 2, column 3", "a key that is a list or a mapping"),
    "out: " + "[" * 3000 + "]" * 3000: ("line 1", "more than 20 levels"),
    "out:" + "".join("\n" + " " * i + "a:" for i in range(1, 400)): ("line 21", "more than 20 levels"),
    "out: o\nencode:\n  data: &a [*a]\n": ("line 3", "alias inside its own target"),
    "out: o\nencode:\n  data: &a {b: *a}\n": ("line 3", "alias inside its own target"),
    bombs(6): ("line 6", "more than 10,000 values"),
    bombs(8): ("line 6", "more than 10,000 values"),
    "out: 2024-99-99\n": ("line 1, column 6", "month must be in"),
    "out: " + "9" * 5000 + "\n": ("line 1, column 6", "an impossible value"),
    "out: " + "x" * (1 << 19): ("bytes; a configuration has at most",),
    MINIMAL + "x" + "y" * 900 + ": 1\n": ("unknown key",),
    "out: o\nencode: " + "z" * 10_000: ("it has to be a section",),
    "out: o\n" + 2 * ("k" * 1000 + ": 1\n"): ("appears twice", "line 3"),
    "out: !!python/object/apply:os.system [echo]\n": ("line 1", "could not determine a constructor"),
    MINIMAL + "out: p\n": ("'out' appears twice", "line 3"),
    MINIMAL + "select: {rho: 1, rho: 2}\n": ("'rho' appears twice",),
    "encode: {data: d, model: m}\n": ("'out' is missing",),
    "out: o\n": ("'encode' is missing",),
    "out: o\nencode:\n": ("'encode.data' is missing",),
    "out: o\nencode: [d]\n": ("encode is ['d']", "a section with the fields data, model"),
    MINIMAL + "select: {rhoo: 0.5}": ("'select.rhoo'", "did you mean 'rho'"),
    MINIMAL + "selct: {rho: 0.5}": ("'selct'", "did you mean 'select'"),
    MINIMAL + "anchor: {max_step: 3}": ("'anchor.max_step'", "did you mean 'max_steps'"),
    MINIMAL + "score: {batchtokens: 3}": ("'score.batchtokens'", "did you mean 'batch_tokens'"),
    MINIMAL + "zzz: 1": ("'zzz'", "legal: out, seed, encode"),
    MINIMAL + "select: {gamma: -1}": ("select.gamma is -1", "legal is 0"),
    MINIMAL + "select: {rho: high}": ("select.rho is 'high'", "a number"),
    MINIMAL + "select: {scope: all}": ("select.scope is 'all'", "'sample' or 'global'"),
    MINIMAL + "anchor: {max_steps: 1.5}": ("anchor.max_steps is 1.5",),
    MINIMAL + "anchor: {learning_rate: .inf}": ("anchor.learning_rate is inf", "finite"),
    MINIMAL + "score: {checkpoints: 5}": ("score.checkpoints is 5",),
    MINIMAL + "seed: x": ("seed is 'x'", "whole number"),
    MINIMAL + "seed: -1": ("seed is -1", "legal is 0 or more"),
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:60])
def test_broken_configurations(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        load_config(write(tmp_path, text))
    line = str(raised.value)
    assert "\n" not in line
    assert len(line) < 700
    assert line.startswith(str(tmp_path / "run.yaml"))
    assert all(word in line for word in BROKEN[text]), line


def test_a_configuration_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(UsageError, match="is a folder; name a YAML file"):
        load_config(tmp_path)
    with pytest.raises(UsageError, match="no such file; name a YAML file"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("select.rho", "section.field=value"),
        ("=1", "section.field=value"),
        (".=1", "section.field=value"),
        ("select..rho=1", "section.field=value"),
        ("select.rho=[", "not valid YAML"),
        ("out.x=1", "'out' has no fields"),
        ("select.rhoo=1", "did you mean 'rho'"),
        ("selct.rho=1", "did you mean 'select'"),
        ("select.rho=", "select.rho is None"),
    ],
)
def test_broken_overrides(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        load_config(write(tmp_path, MINIMAL), [override])
    assert words in str(raised.value)


def test_names_of_checkpoints() -> None:
    assert named_checkpoints(["a/base", "x=a/base", "a/lr=1/step-2", "user/name@v1"]) == {
        "base": "a/base",
        "x": "a/base",
        "step-2": "a/lr=1/step-2",
        "name": "user/name@v1",
    }


def test_a_checkpoint_that_is_given_twice_is_no_second_one() -> None:
    with pytest.raises(
        UsageError, match=r"'a/base' is given twice; give it once, or write OTHER-NAME=a/base"
    ):
        named_checkpoints(["a/base", "b", "a/base"])


# What a change makes a run do again


@pytest.fixture(scope="module")
def template(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a model, a configuration and its finished run."""
    folder = tmp_path_factory.mktemp("template")
    shutil.copyfile(world.data, folder / "data.jsonl")
    shutil.copytree(world.base, folder / "base")
    text = f"""
out: run
encode: {{data: data.jsonl, model: base, shard_rows: {SHARD_ROWS}, workers: 1}}
anchor: {{max_steps: 2, snapshots: 2, learning_rate: 1.0e-2, warmup_ratio: 0}}
score: {{checkpoints: [step-0, step-1, last]}}
"""
    write(folder, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        results = api.run("run.yaml")
    assert list(results) == ["encode", "anchor", *(f"score/{name}" for name in HISTORY), "select"]
    assert not any(result.skipped for result in results.values())
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and the working directory."""
    folder = tmp_path / "place"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    return folder


def runs(*overrides: str, **options: Any) -> list[str]:
    """Run; the steps that were not skipped. `plan` must have said so."""
    planned = {p.step: p.state for p in api.plan("run.yaml", overrides=overrides)}
    results = api.run("run.yaml", overrides=overrides, **options)
    again = [name for name, result in results.items() if not result.skipped]
    if not options:
        stages = {name.partition("/")[0] for name in again}
        announced = {name.partition("/")[0] for name, state in planned.items() if state != "finished"}
        assert announced == stages, planned
        if "anchor" not in announced:
            assert [name for name, state in planned.items() if state != "finished"] == again
    return again


SCORES = [f"score/{name}" for name in HISTORY]


def test_nothing_changed(place: Path) -> None:
    assert runs() == []  # remembers the digests of files that the copy gave new places
    before = snapshot(place)
    assert runs() == []
    assert snapshot(place) == before


def test_a_copy_of_a_run_is_as_finished_as_the_run(place: Path) -> None:
    """Content counts, not places and times (the runs of this file are copies)."""
    (place / "run" / "digests.json").unlink()
    for file in (place / "data.jsonl", place / "base" / "model.safetensors"):
        os.utime(file, (1, 1))
    assert runs() == []


@pytest.mark.parametrize(
    ("overrides", "again"),
    [
        (["select.rho=0.4"], ["select"]),
        (["select.gamma=1"], ["select"]),
        (["select.method=random"], ["select"]),
        (["select.history=step-1"], ["select"]),
        (["select.workers=2", "score.workers=1", "encode.workers=2", "anchor.data_workers=0"], []),
        (["score.batch_tokens=64"], []),
        (["score.device=cpu"], []),
        (["score.dtype=bfloat16"], [*SCORES, "select"]),
        (["score.layer=0"], ["score/step-2", "select"]),
        (["anchor.learning_rate=0.005"], ["anchor", "score/step-1", "score/step-2", "select"]),
        (["seed=1"], ["anchor", "score/step-1", "score/step-2", "select"]),
        (["encode.max_length=50"], ["encode", "anchor", *SCORES, "select"]),
    ],
    ids=str,
)
def test_settings(overrides: list[str], again: list[str], place: Path) -> None:
    assert runs(*overrides) == again
    assert runs(*overrides) == []


def test_the_datas_content(place: Path) -> None:
    data = place / "data.jsonl"
    data.write_text(data.read_text().replace("w9", "w10"))
    assert runs() == ["encode", "anchor", *SCORES, "select"]
    assert runs() == []


def test_the_same_data_and_model_at_another_path(place: Path) -> None:
    (place / "sub").mkdir()
    shutil.copy(place / "data.jsonl", place / "sub/data.jsonl")
    shutil.copytree(place / "base", place / "sub/base")
    for prefix in ("sub/", "./sub/../sub/", f"{place}/sub/", ""):
        assert runs(f"encode.data={prefix}data.jsonl", f"encode.model={prefix}base") == []


def test_another_working_directory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "elsewhere").mkdir()
    (place / "elsewhere/run.yaml").write_text((place / "run.yaml").read_text())
    monkeypatch.chdir(place / "elsewhere")
    moved = ["out=../run", "encode.data=../data.jsonl", "encode.model=../base"]
    results = api.run("run.yaml", overrides=moved, until="anchor")
    assert all(result.skipped for result in results.values())


def test_other_data_or_another_model_is_another_run(place: Path) -> None:
    (place / "other.jsonl").write_text((place / "data.jsonl").read_text().replace("w9", "w10"))
    copy_model(place / "base", place / "other", lambda w: w["model.norm.weight"].mul_(2))
    for override in ("encode.data=other.jsonl", "encode.model=other"):
        with pytest.raises(UsageError, match=r"holds the run of data 'data.jsonl' and model 'base'"):
            api.run("run.yaml", overrides=[override])
    assert runs() == []


def test_the_mark_that_an_older_version_left_on_a_run(place: Path) -> None:
    mark = place / "run/run.json"
    for data, fits in (("data.jsonl", True), ("other.jsonl", False)):
        mark.write_text(json.dumps({"data": data, "model": "base"}))
        if fits:
            assert runs() == []
        else:
            with pytest.raises(UsageError, match=r"holds the run of data 'other.jsonl'"):
                api.run("run.yaml")


def test_the_models_content(place: Path) -> None:
    (place / "base").rename(place / "old")
    copy_model(place / "old", place / "base", lambda w: w["model.norm.weight"].mul_(2))
    assert runs() == ["anchor", *SCORES, "select"]


def test_what_stands_at_a_path_now_is_used(world: World, tmp_path: Path) -> None:
    """One process, one path, other content: what was loaded before and kept in memory is not taken for it."""
    model, found = tmp_path / "model", []
    for number, factor in enumerate((1.0, 2.0)):
        shutil.rmtree(model, ignore_errors=True)
        copy_model(world.base, model, lambda w, factor=factor: w["model.norm.weight"].mul_(factor))  # type: ignore[misc]
        out = tmp_path / f"scores-{number}"
        api.score(tokens=world.tokens, checkpoints=[str(model)], out=out)
        found.append(losses(out / "model"))
    assert not np.allclose(found[0], found[1], equal_nan=True)
    factories.save_tokenizer(model, "w")  # of the words that are in the data
    api.encode(data=str(world.data), model=str(model), out=tmp_path / "w", workers=1)
    factories.save_tokenizer(model, "v")  # of others
    with pytest.raises(SstokenError, match="changed by the tokenizer"):
        api.encode(data=str(world.data), model=str(model), out=tmp_path / "v", workers=1)


def losses(folder: Path) -> np.ndarray[Any, Any]:
    return np.concatenate([tables.flatten(tables.read_table(p)["loss"])[0] for p in tables.parts(folder)])


@pytest.mark.parametrize(
    ("overrides", "step", "changed"),
    [
        (["select.rho=0.4"], "select", ["select.rho 0.6 -> 0.4"]),
        (
            ["select.method=rel", "select.gamma=0.25"],
            "select",
            ["select.method 'sstoken' -> 'rel'", "select.gamma 0.5 -> 0.25"],
        ),
        (["select.history=step-1"], "select", ["select reads another input history, now step-1"]),
        (["anchor.max_steps=3", "seed=2"], "anchor", ["anchor.max_steps 2 -> 3", "seed 0 -> 2"]),
        (["score.dtype=bfloat16"], "score/step-0", ["score.dtype 'float32' -> 'bfloat16'"]),
        (
            ["encode.data=other.jsonl", "encode.limit=9"],
            "encode",
            ["encode.limit none -> 9", "encode.data 'data.jsonl' -> 'other.jsonl'"],
        ),
    ],
    ids=str,
)
def test_plan_and_run_say_what_changed(
    overrides: list[str], step: str, changed: list[str], place: Path
) -> None:
    (place / "other.jsonl").write_text((place / "data.jsonl").read_text().replace("w9", "w10"))
    planned = {p.step: p for p in api.plan("run.yaml", overrides=overrides)}
    assert list(planned[step].changed) == changed
    assert planned[step].state != "finished"
    if step == "select":
        results = api.run("run.yaml", overrides=overrides)
        assert list(results["select"].replaced) == changed
        assert not results["encode"].replaced
        assert not any(p.changed for p in api.plan("run.yaml", overrides=overrides))


def test_content_that_changed_is_said(place: Path) -> None:
    data = place / "data.jsonl"
    data.write_text(data.read_text().replace("w9", "w10"))
    planned = {p.step: p for p in api.plan("run.yaml")}
    assert planned["encode"].changed == ("encode.data, whose content changed",)
    assert planned["select"].changed == ()


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({"force": ["score"]}, SCORES),
        ({"force": ["select"]}, ["select"]),
        ({"until": "score"}, []),
        ({"force": ["score"], "until": "score"}, SCORES),
        ({"force": ["encode"], "until": "encode"}, ["encode"]),
    ],
    ids=str,
)
def test_force_and_until(options: dict[str, Iterable[str]], again: list[str], place: Path) -> None:
    assert runs(**options) == again
    assert runs() == [], "the same settings give the same fingerprint"


def test_until_ends_a_run_that_a_later_one_goes_on_from(place: Path) -> None:
    shutil.rmtree(place / "run")
    planned = api.plan("run.yaml")
    assert [(p.step, p.state) for p in planned] == [
        ("encode", "not run yet"),
        ("anchor", "waits for encode"),
        ("score", "waits for anchor"),
        ("select", "waits for anchor"),
    ]
    assert not (place / "run").exists(), "planning does nothing"
    assert list(api.run("run.yaml", until="encode")) == ["encode"]
    assert {p.name for p in (place / "run").iterdir() if p.is_dir()} == {"tokens"}
    assert [p.state for p in api.plan("run.yaml")][:2] == ["finished", "not run yet"]
    assert runs() == ["anchor", *SCORES, "select"]


@pytest.mark.parametrize("name", ["scor", "anchr", ""])
def test_stages_that_are_not(name: str, place: Path) -> None:
    for options in ({"until": name}, {"force": [name]}):
        if not name and "until" in options:
            continue
        with pytest.raises(UsageError, match="legal: encode, anchor, score, select"):
            api.run("run.yaml", **options)


def test_a_snapshot_that_is_not(place: Path) -> None:
    with pytest.raises(UsageError, match=r"'step-7'.*step-0, step-1, step-2"):
        api.run("run.yaml", overrides=["select.history=step-7"])


def test_what_has_changed_is_said(place: Path) -> None:
    states = {p.step: p.state for p in api.plan("run.yaml", overrides=["select.rho=0.3"])}
    assert states.pop("select") == "settings or inputs changed: runs again"
    assert set(states.values()) == {"finished"}


def test_a_lost_file_is_not_finished_work(place: Path) -> None:
    (place / "run" / "scores" / "step-0" / "part-00001.parquet").unlink()
    for command in (api.plan, api.run):
        with pytest.raises(SstokenError, match=r"part-00001.parquet: missing.*--force"):
            command("run.yaml")
    assert api.verify("run")[1] == ["run/scores/step-0/part-00001.parquet: missing"]
    api.run("run.yaml", force=["score"])
    assert api.verify("run")[1] == []


def test_without_an_anchor_run(world: World, tmp_path: Path) -> None:
    config = write(
        tmp_path,
        f"out: {tmp_path / 'run'}\nencode: {{data: {world.data}, model: {world.base}}}\n"
        f"score: {{checkpoints: {{before: {world.base}, after: {world.later}}}}}\n",
    )
    results = api.run(config)
    assert list(results) == ["encode", "score/before", "score/after", "select"]
    assert "mean_attention" in results["score/after"].metrics
    assert "mean_attention" not in results["score/before"].metrics
    metadata = tables.read_metadata(tables.parts(tmp_path / "run" / "masked")[0])
    assert {role: c["name"] for role, c in metadata["checkpoints"].items()} == {
        "history": "before",
        "current": "after",
        "attention": "after",
    }
    swapped = api.run(config, overrides=["select.history=after", "select.current=before"])
    assert [n for n, r in swapped.items() if not r.skipped] == ["score/before", "select"]
    back = api.run(config)
    assert [n for n, r in back.items() if not r.skipped] == ["select"], (
        "scores with attention serve without it"
    )
