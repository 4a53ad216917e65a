"""The select stage against the definition, example by example."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sstoken.errors import SstokenError, UsageError
from sstoken.methods import METHODS
from sstoken.methods.excess_loss import KEEP_SHARE
from sstoken.selection import num_kept
from sstoken.stages import joins, tables
from sstoken.stages.select import Select
from sstoken.stages.selecting.shard import SHOWN
from tests.factories import save_tokenizer
from tests.stages.context import ProcessEngine, make_context
from tests.support import slow_but

PARTS, ROWS = 3, 9
QUICK = ("sstoken", "rho-1", "forgetting", "t3s", "random", "dft", "talr", "cayley", "iw-sft")
"""One of each policy, with and without signals, at each scope."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Tokens and scores with many ties; one example of each shard has no response token."""
    root = tmp_path_factory.mktemp("inputs")
    random = np.random.default_rng(0)
    folders = {name: root / name for name in ("tokens", "history", "current", "attention")}
    for folder in folders.values():
        folder.mkdir()
    save_tokenizer(folders["tokens"] / "tokenizer")
    for part in range(PARTS):
        rows = []
        for i in range(ROWS):
            n = int(random.integers(2, 25))
            start = n if i == 4 else int(random.integers(1, n))
            rows.append((f"{part}-{i}", random.integers(1, 99, n).tolist(), [j >= start for j in range(n)]))
        name = tables.part_name(part)
        ids, tokens, masks = zip(*rows, strict=True)
        table = pa.table([ids, tokens, masks], schema=tables.TOKENS)
        facts = {"kind": "tokens", "tokenizer": {"fingerprint": "f", "name": "t"}, "stats": {}}
        said = {joins.TOKENS: joins.tokens_fingerprint(table)}
        facts |= said
        tables.write_part(folders["tokens"] / name, table, facts)

        def values(levels, masks=masks):
            return [[float(random.integers(levels)) / levels if r else None for r in mask] for mask in masks]

        provenance = {"kind": "scores", "checkpoint": "c", "dtype": "float32", "layer": -1, **said}
        for role in ("history", "current"):
            tables.write_part(folders[role] / name, scores(ids, loss=values(8)), provenance)
        both = scores(ids, loss=values(8), attention=values(4))
        tables.write_part(folders["attention"] / name, both, provenance)
    return folders


def scores(ids, **signals):
    """A shard of scores, as `score` writes it."""
    return pa.table({"example_id": ids} | {n: pa.array(v, tables.VALUES) for n, v in signals.items()})


def select(inputs, out, seed=0, **fields):
    metrics = Select(**fields).run(make_context(out, inputs, seed=seed))
    return pa.concat_tables([pq.read_table(p) for p in tables.parts(out)]).to_pylist(), metrics


def raw(inputs, role, column):
    rows = pa.concat_tables([pq.read_table(p) for p in tables.parts(inputs[role])]).to_pylist()
    return {row["example_id"]: row[column] for row in rows}


def reference_scores(inputs, gamma):
    """Score of each response token by (example, position), from the formula."""
    history, current = raw(inputs, "history", "loss"), raw(inputs, "current", "loss")
    attention, masks = raw(inputs, "attention", "attention"), raw(inputs, "tokens", "response_mask")
    scores = {}
    for example, mask in masks.items():
        rel = {i: history[example][i] - current[example][i] for i, r in enumerate(mask) if r}
        for i, value in rel.items():
            low, high = min(rel.values()), max(rel.values())
            scores[example, i] = (
                gamma * (value - low) / (high - low + 1e-8) + (1 - gamma) * attention[example][i]
            )
    return scores


@pytest.mark.parametrize(("gamma", "rho"), [(0.5, 0.6), (0.3, 0.4), (1, 0.5), (0, 0.8)])
@pytest.mark.parametrize("scope", ["sample", "global"])
def test_masks_follow_the_definition(inputs, tmp_path, gamma, rho, scope):
    rows, metrics = select(inputs, tmp_path, gamma=gamma, rho=rho, scope=scope)
    scores = reference_scores(inputs, gamma)
    order = sorted(scores, key=lambda at: -scores[at])  # stable: dataset order among equals
    if scope == "global":
        expected = set(order[: num_kept(len(scores), rho)])
    else:
        expected = set()
        for row in rows:
            own = [at for at in order if at[0] == row["example_id"]]
            expected |= set(own[: num_kept(len(own), rho)])
    kept = {(row["example_id"], i) for row in rows for i, keep in enumerate(row["keep_mask"]) if keep}
    assert kept == expected
    assert metrics["kept"] == len(expected)
    assert metrics["kept"] + metrics["dropped"] == metrics["response_tokens"] == len(scores)


def test_the_columns_of_the_masked_dataset(inputs, tmp_path):
    rows, metrics = select(inputs, tmp_path, method="sstoken")
    assert metrics["examples"] == PARTS * (ROWS - 1)
    assert metrics["left_out"] == PARTS
    history, current = raw(inputs, "history", "loss"), raw(inputs, "current", "loss")
    for row in rows:
        example = row["example_id"]
        assert len({len(row[c]) for c in row if c != "example_id"}) == 1
        for i, (token, label, keep, response) in enumerate(
            zip(row["input_ids"], row["labels"], row["keep_mask"], row["response_mask"], strict=True)
        ):
            assert label == (token if keep else -100)
            assert response or not keep
            assert (row["score"][i] is None) == (not response)
            if response:
                assert row["rel"][i] == pytest.approx(history[example][i] - current[example][i])


def test_the_files_are_bare_parquet_with_provenance(inputs, tmp_path):
    select(inputs, tmp_path, rho=0.4)
    for part in tables.parts(tmp_path):
        schema = pq.read_schema(part)
        assert set(schema.metadata) == {b"sstoken"}
        assert schema.field("input_ids").type.value_type == pa.int32()
        assert schema.field("labels").type.value_type == pa.int32()
        facts = json.loads(schema.metadata[b"sstoken"])
        assert (facts["method"], facts["rho"], facts["gamma"]) == ("sstoken", 0.4, 0.5)
        assert facts["checkpoints"]["history"]["name"] == "history"
        assert facts["tokenizer"]["fingerprint"] == "f"
        assert facts["version"]
        assert facts["fingerprint"]


def test_lean_drops_the_last_four_columns(inputs, tmp_path):
    select(inputs, tmp_path, lean=True)
    names = pq.read_schema(tables.parts(tmp_path)[0]).names
    assert names == ["example_id", "input_ids", "labels", "keep_mask"]


def test_methods_without_signals_need_no_scores(inputs, tmp_path):
    only_tokens = {"tokens": inputs["tokens"]}
    rows, metrics = select(only_tokens, tmp_path / "full", method="full", rho=0.1)
    assert metrics["kept_share"] == 1
    assert all(row["keep_mask"] == row["response_mask"] for row in rows)
    assert all(row["rel"] is None and row["attention"] is None for row in rows)
    rows, metrics = select(only_tokens, tmp_path / "random", method="random", rho=0.5)
    again, _ = select(only_tokens, tmp_path / "again", method="random", rho=0.5)
    other, _ = select(only_tokens, tmp_path / "other", method="random", rho=0.5, seed=1)
    assert rows == again
    assert rows != other


@pytest.mark.parametrize(
    "method", slow_but(QUICK, [m.name for m in METHODS.values() if set(m.inputs) <= set(SHOWN)])
)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_method_runs_in_any_number_of_processes(inputs, tmp_path, method, workers):
    context = make_context(tmp_path / "out", inputs)
    scope = "global" if "global" in METHODS[method].scopes else None
    stage = Select(method=method, scope=scope, workers=workers)
    object.__setattr__(context, "engine", ProcessEngine(workers))
    metrics = stage.run(context)
    select(inputs, tmp_path / "plain", method=method, scope=scope)
    for part in tables.parts(tmp_path / "plain"):
        assert part.read_bytes() == (tmp_path / "out" / part.name).read_bytes()
    if METHODS[method].policy is KEEP_SHARE:
        assert metrics["kept"] == num_kept(metrics["response_tokens"], 0.6)


def test_the_summary_by_hand(inputs, tmp_path):
    rows, metrics = select(inputs, tmp_path, method="rel", rho=0.5)
    masks = [[k for k, r in zip(row["keep_mask"], row["response_mask"], strict=True) if r] for row in rows]
    deciles = [[] for _ in range(10)]
    for mask in masks:
        for i, keep in enumerate(mask):
            deciles[10 * i // len(mask)].append(keep)
    assert metrics["kept_share_by_decile"] == [pytest.approx(np.mean(d), abs=1e-4) for d in deciles]
    attention, _ = select(inputs, tmp_path / "attention", method="attention", rho=0.5)
    both = sum(
        a and b
        for x, y in zip(rows, attention, strict=True)
        for a, b in zip(x["keep_mask"], y["keep_mask"], strict=True)
    )
    assert metrics["signal_overlap"] == pytest.approx(both / metrics["kept"])


def test_scores_of_other_tokens_are_refused(inputs, tmp_path):
    strange = tmp_path / "strange"
    strange.mkdir()
    for part in tables.parts(inputs["history"]):
        table = pq.read_table(part).slice(1)
        tables.write_part(strange / part.name, table, tables.read_metadata(part))
    with pytest.raises(SstokenError, match="not row-aligned"):
        select(inputs | {"history": strange}, tmp_path / "out")
    (strange / tables.part_name(0)).unlink()
    with pytest.raises(SstokenError, match=r"part-00000.parquet: missing"):
        select(inputs | {"history": strange}, tmp_path / "out2")


@pytest.mark.parametrize("fields", [{"rho": 0}, {"rho": 1.5}, {"method": "best"}])
def test_what_is_out_of_range_is_refused_before_any_work(fields):
    with pytest.raises(UsageError, match="legal"):
        Select(**fields).check()


def masks(rows):
    """The keep masks over the response tokens."""
    return [[k for k, r in zip(row["keep_mask"], row["response_mask"], strict=True) if r] for row in rows]


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_a_budget_keeps_the_best_tokens_of_the_dataset(inputs, tmp_path, budget):
    rows, metrics = select(inputs, tmp_path, budget=budget)
    scores = reference_scores(inputs, 0.5)
    expected = set(sorted(scores, key=lambda at: -scores[at])[:budget])
    assert {(r["example_id"], i) for r in rows for i, keep in enumerate(r["keep_mask"]) if keep} == expected
    assert metrics["kept"] == min(budget, len(scores))
    assert "signal_overlap" not in metrics, "at which share?"
    said = f"budget is {budget:,}, and there are {len(scores):,} response tokens: all are kept"
    assert (said in metrics.get("notes", [])) == (budget > len(scores))


def one_example(tmp_path, mask, loss, **more):
    """Write the tokens and losses of an example; `more` is metadata of the tokens."""
    folders = {name: tmp_path / name for name in ("tokens", "current")}
    for folder in folders.values():
        folder.mkdir()
    save_tokenizer(folders["tokens"] / "tokenizer")
    table = pa.table([["a"], [list(range(1, len(mask) + 1))], [mask]], schema=tables.TOKENS)
    said = {joins.TOKENS: joins.tokens_fingerprint(table)}
    facts = {"kind": "tokens", "tokenizer": {"fingerprint": "f", "name": "t"}, "stats": {}} | said | more
    tables.write_part(folders["tokens"] / tables.part_name(0), table, facts)
    scores = pa.table({"example_id": ["a"], "loss": pa.array([loss], tables.VALUES)})
    about = {"kind": "scores", "checkpoint": "c", "dtype": "float32"} | said
    tables.write_part(folders["current"] / tables.part_name(0), scores, about)
    return folders


def test_each_turn_is_selected_by_itself(tmp_path):
    mask = [False, True, True, True, True, False, True, True, False]
    folders = one_example(tmp_path, mask, [None, 4.0, 3.0, 2.0, 1.0, None, 0.1, 0.2, None])
    by_turn, _ = select(folders, tmp_path / "turn", method="loss", rho=0.5, scope="turn")
    assert masks(by_turn) == [[True, True, False, False, False, True]]
    by_example, _ = select(folders, tmp_path / "sample", method="loss", rho=0.5)
    assert masks(by_example) == [[True, True, True, False, False, False]]


@pytest.mark.parametrize(("max_length", "kept"), [(9, [4, 7]), (10, [4, 7, 8])])
def test_a_truncated_turn_has_no_end_to_protect(tmp_path, max_length, kept):
    mask = [False, True, True, True, True, False, True, True, True]
    loss = [None, 0.1, 0.1, 0.1, 0.1, None, 0.1, 9.0, 0.1]
    folders = one_example(tmp_path, mask, loss, max_length=max_length)
    rows, _ = select(folders, tmp_path / "out", method="loss", rho=0.1, protect=("end_of_turn",))
    assert np.flatnonzero(rows[0]["keep_mask"]).tolist() == kept


def test_protected_tokens_are_kept_and_counted(inputs, tmp_path):
    plain, _ = select(inputs, tmp_path / "plain", rho=0.2)
    rows, metrics = select(inputs, tmp_path / "protected", rho=0.2, protect=("end_of_turn", "regex:w7"))
    added = 0
    for before, after in zip(masks(plain), masks(rows), strict=True):
        assert after[-1]
        assert all(b or not a for a, b in zip(before, after, strict=True))
        added += sum(after) - sum(before)
    assert metrics["protected"]["end_of_turn"] == len(rows)
    assert metrics["protected"]["regex:w7"] > 0
    assert metrics["protected_added"] == added > 0


@pytest.mark.parametrize("scope", ["sample", "global"])
def test_pooled_sentences_are_kept_or_dropped_as_one(inputs, tmp_path, scope):
    """No text here ends a sentence: each turn is one."""
    rows, _ = select(inputs, tmp_path, method="loss", pool="sentence", scope=scope, rho=0.3)
    found = masks(rows)
    assert all(len(set(mask)) == 1 for mask in found)
    assert {mask[0] for mask in found} == ({True} if scope == "sample" else {True, False})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 5, "rho": 0.5}, "leave rho and scope out"),
        ({"budget": 5, "method": "dft"}, "does not rank tokens"),
        ({"scope": "global", "method": "dft"}, "judges each token alone; leave scope out"),
        ({"scope": "turn", "method": "toss"}, "takes scope global"),
        ({"protect": ("eos",)}, "legal is end_of_turn"),
        ({"method": "dft", "rho": 0.4}, "'dft' has no parameter 'rho'; it has none"),
        ({"rho": 0.4, "params": {"rho": 0.5}}, "give it once"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        Select(**fields).check()
