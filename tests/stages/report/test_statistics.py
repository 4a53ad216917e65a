"""The numbers of a report against counting in plain Python, token by token."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import tables
from sstoken.stages.report import ngrams
from sstoken.stages.report.figures import correlation
from sstoken.stages.report.folders import open_folders
from sstoken.stages.report.ngrams import NGrams
from sstoken.stages.report.quality import flags
from sstoken.stages.report.sampling import Highest, Uniform
from sstoken.stages.report.statistics import NUM_DECILES, Statistics, measure
from sstoken.stages.report.token_classes import ALL_CLASSES, TokenClasses
from tests.factories import byte_tokenizer
from tests.stages.report.small_folders import EOS, tokens_table, write_masked, write_signals, write_tokens

CONVERSATIONS = [
    [("How many? ", f"{n} of {n + 1}, so {n * 7}.")] for n in range(12)
] + [
    [("Hi ", "Good day!"), ("Code ", "```\nx = 1\n```\nDone")],
    [("Loop ", "ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab")],
    [("One ", "4")],
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    shards = [tokens_table(CONVERSATIONS).slice(start, 5) for start in (0, 5, 10)]
    tokens = write_tokens(folder / "tokens", shards)
    for seed, name in enumerate(("base", "step-10", "step-9")):
        write_signals(folder / "scores" / name, tokens, seed, "loss", "entropy")
    write_masked(folder / "masked", tokens, drop=("e3", "e7"))
    write_masked(folder / "other", tokens, seed=1, drop=("e4",))
    return folder


@pytest.fixture(scope="module")
def stats(place: Path) -> Statistics:
    return measure(open_folders({"masked": place / "masked"}))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pl.concat([pl.read_parquet(part) for part in tables.parts(folder)]).to_dicts()


def response_tokens(folder: Path) -> list[dict[str, Any]]:
    """A dictionary for each response token."""
    found = []
    for number, row in enumerate(rows_of(folder)):
        places = [i for i, r in enumerate(row["response_mask"]) if r]
        turn = -1
        for n, i in enumerate(places):
            turn += n == 0 or places[n - 1] != i - 1
            facts = {name: row[name][i] for name in row if name != "example_id"}
            found.append({**facts, "row": number, "turn": turn, "decile": n * NUM_DECILES // len(places)})
    return found


def test_every_breakdown_is_that_of_counting(place: Path, stats: Statistics) -> None:
    tokens = response_tokens(place / "masked")
    assert stats.examples == 13
    assert stats.response_tokens == len(tokens)
    for name in ("turn", "decile"):
        for tokens_too, counted in ((True, stats.by[name].tokens), (False, stats.by[name].kept[0])):
            wanted = Counter(t[name] for t in tokens if tokens_too or t["keep_mask"])
            assert {i: n for i, n in enumerate(counted.tolist()) if n} == wanted


def test_classes_follow_text_and_place(place: Path, stats: Statistics) -> None:
    shard = next(s for s in open_folders({"m": place / "masked"}).shards([10]))
    at = shard.example_ids.index("e12")
    inside = slice(shard.offsets[at], shard.offsets[at + 1])
    response = shard.response[inside]
    ids = shard.ids[inside][response]
    ends = np.flatnonzero(ids == EOS)
    classes = stats.token_classes.classify(ids, np.array([0, ends[0] + 1, ids.size]))
    names = [ALL_CLASSES[c] for c in classes]
    assert names[: ends[0] + 1] == ["word"] * 4 + ["white space"] + ["word"] * 3 + [
        "punctuation",
        "end of turn",
    ]
    assert names[-1] == "end of turn"
    assert names[-5:-1] == ["word"] * 4 or "code" in names


@pytest.mark.parametrize("whole", [True, False])
def test_a_fence_is_found_in_one_token_and_in_several(whole: bool, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(["<end>"], eos_token="<end>")
    if whole:
        tokenizer.add_tokens(["```"])
    tokenizer.save_pretrained(tmp_path)
    fence = ["```"] if whole else ["`"] * 3
    pieces = [*"a`b` ", *fence, *"x 1", *fence, "c", "<end>"]
    ids = np.array(tokenizer.convert_tokens_to_ids([p.replace(" ", "\u0120") for p in pieces]), np.int32)
    found = TokenClasses(tmp_path).classify(ids, np.array([0, ids.size]))
    names = [ALL_CLASSES[c] for c in found]
    start, stop = 5, len(pieces) - 2
    assert names[start:stop] == ["code"] * (stop - start)
    assert "code" not in names[:start] + names[stop:]


def test_losses_and_their_order(place: Path, stats: Statistics) -> None:
    assert list(stats.losses) == ["base", "step-9", "step-10"]
    masked = {(r["example_id"]): r for r in rows_of(place / "masked")}
    kept = dropped = 0.0
    for row in rows_of(place / "scores/base"):
        if row["example_id"] in masked:
            keep = masked[row["example_id"]]["keep_mask"]
            kept += sum(v for v, k in zip(row["loss"], keep, strict=True) if v is not None and k)
            dropped += sum(v for v, k in zip(row["loss"], keep, strict=True) if v is not None and not k)
    assert stats.losses["base"][[0, 2]] == pytest.approx([kept, dropped], rel=1e-5)


def test_a_small_dataset_is_sampled_whole(place: Path, stats: Statistics) -> None:
    columns = stats.sample.columns()
    wanted = sorted(t["score"] for t in response_tokens(place / "masked"))
    assert sorted(columns["score"].tolist()) == wanted
    assert [s.key for s in stats.present()] == [
        "score", "rel", "attention", *(f"{c}.{n}" for c in ("base", "step-9", "step-10") for n in ("loss", "entropy")),
    ]  # fmt: skip
    assert stats.pair == ("rel", "attention")


def test_flags_name_the_rows(place: Path, stats: Statistics) -> None:
    rows = rows_of(place / "masked")
    ends = [[k for i, k in zip(r["input_ids"], r["keep_mask"], strict=True) if i == EOS] for r in rows]
    dropped = [n for n, kept in enumerate(ends) if not all(kept)]
    assert stats.flags["end_dropped"] == (len(dropped), dropped[:5])
    assert stats.flags["repetition"] == (1, [11])
    said = {flag["kind"]: flag for flag in flags(stats)}
    assert said["one-token-answers"]["rows"] == [12]
    assert said["repetition"]["examples"] == 1
    nothing = [n for n, r in enumerate(rows) if not any(r["keep_mask"])]
    assert said.get("nothing-kept", {"rows": []})["rows"] == nothing[:1]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngrams_are_those_of_counting(place: Path, stats: Statistics, n: int) -> None:
    counts: Counter[tuple[int, ...]] = Counter()
    kept: dict[tuple[int, ...], float] = defaultdict(float)
    tokens = response_tokens(place / "masked")
    for at in range(len(tokens) - n + 1):
        run = tokens[at : at + n]
        if len({(t["row"], t["turn"]) for t in run}) == 1:
            key = tuple(t["input_ids"] for t in run)
            counts[key] += 1
            kept[key] += sum(t["keep_mask"] for t in run) / n
    share = stats.kept_share()
    for least in (True, False):
        found = stats.ngrams.extremes(n, share, 1000, least=least)
        side = {
            k for k, c in counts.items() if c >= 5 and (kept[k] / c < share if least else kept[k] / c > share)
        }
        assert {tuple(e["ids"]) for e in found} == side
        for entry in found:
            key = tuple(entry["ids"])
            assert entry["count"] == counts[key]
            assert entry["kept"] == pytest.approx(kept[key] / counts[key], abs=1e-6)
            assert entry["lift"] == pytest.approx(entry["kept"] / share)
            ids = rows_of(place / "masked")[entry["row"]]["input_ids"]
            assert any(tuple(ids[i : i + n]) == key for i in range(len(ids)))


def test_rare_ngrams_are_forgotten_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "MOST_HELD", 50)
    held = NGrams()
    random = np.random.default_rng(0)
    for _ in range(20):
        ids = np.concatenate([random.integers(0, 1000, 90), [5, 6] * 10]).astype(np.int32)
        held.add(ids, np.array([0, ids.size]), np.ones(ids.size, bool), np.zeros(ids.size, np.int64))
    assert all(frame.height <= 50 for frame in held.held.values())
    assert held.forgotten[2] > 0
    (entry,) = [e for e in held.extremes(2, 0.5, 100, least=False) if e["ids"] == [5, 6]]
    assert 200 - held.forgotten[2] <= entry["count"] <= 200


def test_samples_keep_what_they_promise() -> None:
    random = np.random.default_rng(0)
    keys = random.random(5000)
    keys[::7] = np.nan
    highest, uniform = Highest(20), Uniform(100, 0)
    for start in range(0, 5000, 313):
        part = slice(start, start + 313)
        highest.add(keys[part], {"row": np.arange(5000)[part]})
        more = {"late": np.arange(5000.0)[part]} if start > 2000 else {}
        uniform.add(keys[part].size, {"row": np.arange(5000)[part], **more})
    wanted = np.argsort(np.where(np.isnan(keys), -1, keys))[::-1][:20]
    assert highest.columns()["row"].tolist() == wanted.tolist()
    rows, late = uniform.columns()["row"], uniform.columns()["late"]
    assert len(set(rows.tolist())) == 100
    assert abs(np.mean(rows) - 2500) < 600
    assert np.isnan(late[rows < 2191]).all()
    assert (late[rows >= 2191] == rows[rows >= 2191]).all()


def test_two_folders_share_the_rows_that_both_have(place: Path) -> None:
    folders = open_folders({"a": place / "masked", "b": place / "other"})
    stats = measure(folders)
    by_id = {r["example_id"]: r for r in rows_of(place / "other")}
    number = -1
    for shard in folders.shards():
        for at, example in enumerate(shard.example_ids):
            number += 1
            inside = slice(shard.offsets[at], shard.offsets[at + 1])
            assert shard.has[1][at] == (example in by_id)
            if example in by_id:
                assert shard.keeps[1][inside].tolist() == by_id[example]["keep_mask"]
            else:
                assert not shard.keeps[1][inside].any()
    assert stats.kept(1) == sum(
        sum(r["keep_mask"]) for r in by_id.values() if r["example_id"] not in ("e3", "e7")
    )
    assert stats.rows_to_show()["disagreeing"]


def test_rank_correlation() -> None:
    a = np.array([1.0, 2, 3, 4, np.nan])
    assert correlation(a, a**3) == pytest.approx(1)
    assert correlation(a, -a) == pytest.approx(-1)


def test_tokens_alone_are_shown_with_their_scores(place: Path) -> None:
    stats = measure(open_folders({"tokens": place / "tokens"}))
    assert stats.kept() == stats.response_tokens
    assert not stats.selective
    assert stats.pair == ("base.loss", "step-10.entropy")


def test_what_cannot_be_shown_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        open_folders({"x": tmp_path / "none"})
    with pytest.raises(UsageError, match="a folder of scores"):
        open_folders({"x": place / "scores/base"})
    with pytest.raises(SstokenError, match="unfinished"):
        open_folders({"x": tmp_path})
    with pytest.raises(UsageError, match="only masked folders"):
        open_folders({"a": place / "masked", "b": place / "tokens"})
    others = write_tokens(tmp_path / "tokens", [tokens_table(CONVERSATIONS[:3])])
    another = write_masked(tmp_path / "masked", others)
    with pytest.raises(SstokenError, match="other tokens than"):
        open_folders({"a": place / "masked", "b": another})
    with pytest.raises(SstokenError, match="not the scores of the tokens"):
        open_folders({"a": another}, [place / "scores/base"])
    with pytest.raises(UsageError, match="no scores there"):
        open_folders({"a": another}, [tmp_path / "tokens" / "tokenizer"])


def test_scores_of_other_tokens_beside_it_are_named(place: Path, tmp_path: Path) -> None:
    others = write_tokens(tmp_path / "tokens", [tokens_table(CONVERSATIONS[:3])])
    write_signals(tmp_path / "scores" / "strange", place / "tokens", 0, "loss")
    folders = open_folders({"a": write_masked(tmp_path / "masked", others)})
    assert not folders.scores
    assert "strange" in folders.notes[0]
