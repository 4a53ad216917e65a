"""The signal `critical` against regenerating everything one by one; what it says of what it does not try."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sstoken import curate
from sstoken.errors import SstokenError, UsageError
from sstoken.stages import tables
from sstoken.stages.criticality.judge import chosen_positions
from tests.factories import save_model
from tests.pipeline.small_run import save_conversations

NEW = 9
CHECKERS = '''
"""Checkers whose verdict a random model meets now and then."""

def congruent(answer, reference):
    return len(answer.split()) % 3 == len(reference.split()) % 3

def touchy(answer, reference):
    if "w7" in answer.split():
        raise ValueError("seven\\nof them")
    return congruent(answer, reference)

def broken(answer, reference):
    raise RuntimeError("no")

def never(answer, reference):
    return answer == reference
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critical")
    save_model(folder / "model", positions=128)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "model")
    save_conversations(folder / "data.jsonl", 16, longest=9)
    curate.encode(
        data=folder / "data.jsonl",
        model=str(folder / "model"),
        out=folder / "tokens",
        shard_rows=6,
        workers=1,
    )
    (folder / "checkers_of_test.py").write_text(CHECKERS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def measure(world, out, checker="congruent", **fields):
    fields = {"max_new_tokens": NEW, "backend": "hf", "device": "cpu"} | fields
    return curate.critical(
        tokens=world / "tokens",
        checkpoint=str(world / "model"),
        checker=f"checkers_of_test:{checker}",
        out=out,
        **fields,
    )


def column(folder, name):
    return [row for part in tables.parts(Path(folder)) for row in tables.rows(tables.read_table(part)[name])]


def regenerate(world, check, max_positions, alternatives=2):
    """Each continuation by itself, from nothing, with all logits: the column `critical`."""
    model = AutoModelForCausalLM.from_pretrained(world / "model", attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "tokens" / "tokenizer")

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def go_on(ids):
        ids, start = list(ids), len(ids)
        while len(ids) < start + NEW:
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        return ids

    for ids, mask in zip(
        column(world / "tokens", "input_ids"), column(world / "tokens", "response_mask"), strict=True
    ):
        ids, found = ids.tolist(), np.full(ids.size, np.nan)
        places = np.flatnonzero(mask)
        first = next(p for p in places if mask[p : places[-1] + 1].all())
        response = ids[first : places[-1] + 1]
        if check(text(go_on(ids[:first])[first:]), text(response)):
            for place in chosen_positions(len(response), max_positions):
                position = first + place
                with torch.no_grad():
                    ranked = (
                        model(torch.tensor([ids[:position]])).logits[0, -1].argsort(descending=True).tolist()
                    )
                others = [token for token in ranked if token != ids[position]][:alternatives]
                right = False
                for other in others:
                    start = [*ids[:position], other]
                    said = start if other == tokenizer.eos_token_id else go_on(start)
                    right |= check(text(said[first:]), text(response))
                found[position] = not right
        yield found


@pytest.mark.parametrize(("max_positions", "batch_tokens"), [(0, None), (3, 70)])
def test_it_is_what_regenerating_everything_one_by_one_gives(world, tmp_path, max_positions, batch_tokens):
    import checkers_of_test

    result = measure(world, tmp_path / "out", max_positions=max_positions, batch_tokens=batch_tokens)
    expected = list(regenerate(world, checkers_of_test.congruent, max_positions))
    found = column(tmp_path / "out", "critical")
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    facts, values = result.metrics, np.concatenate(found)
    assert facts["tried"] == np.isfinite(values).sum() > facts["critical"] == (values == 1).sum() > 0
    assert facts["outcomes"]["right"] > 0 < facts["outcomes"]["wrong"]
    assert facts["tried"] + sum(facts["not_tried"].values()) == facts["response_tokens"]
    assert sum(facts["outcomes"].values()) == facts["examples"] == 16
    assert facts["not_tried"]["earlier turn"] > 0
    assert ("over max_positions" in facts["not_tried"]) == (max_positions == 3)


def test_a_method_selects_from_it(world, tmp_path):
    measure(world, tmp_path / "scores" / "critical")
    (critical,) = [np.concatenate(column(tmp_path / "scores" / "critical", "critical"))]
    response = np.concatenate(column(world / "tokens", "response_mask"))
    for untried, expected in (("drop", critical == 1), ("keep", response & (critical != 0))):
        out = tmp_path / untried
        curate.select(
            tokens=world / "tokens",
            scores=tmp_path / "scores",
            out=out,
            method="critical-tokens",
            params={"untried": untried},
        )
        np.testing.assert_array_equal(np.concatenate(column(out, "keep_mask")), expected)


def test_scores_without_it_name_the_command_that_measures_it(world, tmp_path):
    curate.score(tokens=world / "tokens", checkpoints=[str(world / "model")], out=tmp_path / "scores")
    with pytest.raises(SstokenError, match="run sstoken-curate critical --tokens"):
        curate.select(
            tokens=world / "tokens",
            scores=tmp_path / "scores",
            out=tmp_path / "masked",
            method="critical-tokens",
            current="model",
        )
    with pytest.raises(UsageError, match="run sstoken-curate critical"):
        curate.score(
            tokens=world / "tokens",
            checkpoints=[str(world / "model")],
            signals=["critical"],
            out=tmp_path / "other",
        )


def test_finished_shards_are_kept_and_the_result_is_the_same_to_the_byte(world, tmp_path, monkeypatch):
    measure(world, tmp_path / "whole", max_positions=2)
    real = tables.write_part

    def stops(path, *rest, **more):
        if path.name == "part-00001.parquet":
            raise KeyboardInterrupt
        real(path, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(tables, "write_part", stops)
        with pytest.raises(KeyboardInterrupt):
            measure(world, tmp_path / "resumed", max_positions=2)
    kept = tmp_path / "resumed.partial" / "part-00000.parquet"
    stamp = kept.stat().st_mtime_ns
    measure(world, tmp_path / "resumed", max_positions=2)
    assert (tmp_path / "resumed" / "part-00000.parquet").stat().st_mtime_ns == stamp
    for part in tables.parts(tmp_path / "whole"):
        assert part.read_bytes() == (tmp_path / "resumed" / part.name).read_bytes()


def test_where_a_checker_raises_nothing_is_tried_and_all_else_is(world, tmp_path):
    touchy = measure(world, tmp_path / "touchy", "touchy").metrics
    congruent = column(measure(world, tmp_path / "all").folder, "critical")
    raised = touchy["outcomes"].get("checker raised", 0) + touchy["not_tried"].get("checker raised", 0)
    assert raised > 0
    assert "ValueError: seven of them" in touchy["first_error"]
    assert touchy["tried"] + sum(touchy["not_tried"].values()) == touchy["response_tokens"]
    for mine, theirs in zip(column(tmp_path / "touchy", "critical"), congruent, strict=True):
        tried = np.isfinite(mine)
        np.testing.assert_array_equal(mine[tried], theirs[tried])


def test_wrong_answers_are_counted_and_left_untouched(world, tmp_path, capsys):
    from sstoken.pipeline.printing import print_result

    result = measure(world, tmp_path / "out", "never")
    assert result.metrics["outcomes"] == {"wrong": 16}
    assert np.isnan(np.concatenate(column(tmp_path / "out", "critical"))).all()
    print_result("critical", result)
    said = capsys.readouterr().out
    assert "wrong 16" in said
    assert "critical-tokens drops what was not tried" in said
    assert "first example answered wrongly: " in said


def test_bad_input_is_one_line(world, tmp_path):
    with pytest.raises(SstokenError, match=r"raised RuntimeError: no \(example .*fix the checker") as error:
        measure(world, tmp_path / "a", "broken")
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="does not import"):
        measure(world, tmp_path / "b", "missing")
    with pytest.raises(UsageError, match="alternatives"):
        measure(world, tmp_path / "c", alternatives=9)
    assert not list(tmp_path.iterdir()) or all(path.name.startswith(".") for path in Path(tmp_path).iterdir())


@pytest.mark.parametrize(("count", "most"), [(1, 1), (7, 3), (100, 99), (5, 0), (3, 10)])
def test_positions_are_spread_and_each_once(count, most):
    chosen = chosen_positions(count, most)
    assert len(set(chosen.tolist())) == chosen.size == min(count, most or count)
    assert 0 <= chosen[0] <= chosen[-1] < count
    assert np.ptp(np.diff(chosen)) <= 1 if chosen.size > 2 else True


SECTIONS = """
out: run
encode: {{data: {data}, model: {model}, shard_rows: 6, workers: 1}}
critical: {{checker: "checkers_of_test:congruent", max_new_tokens: 9, max_positions: 2, device: cpu}}
select: {{method: critical-tokens, params: {{untried: [drop, keep]}}}}
"""
STEPS = """
out: steps
steps:
  tokens: {{stage: encode, data: {data}, model: {model}, shard_rows: 6, workers: 1}}
  train: {{stage: anchor, model: {model}, max_steps: 1, snapshots: 1}}
  tried: {{stage: critical, checkpoint: train/last, checker: "checkers_of_test:congruent", max_new_tokens: 9,
    max_positions: 2, device: cpu}}
  scores: {{stage: score, checkpoints: {{base: {model}, sft: train/last}}, attention_from: none}}
  rel: {{stage: select, method: rel}}
  critical: {{stage: select, method: critical-tokens}}
"""


def test_it_is_a_section_of_a_run_that_goes_on_where_it_stopped(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(SECTIONS.format(data=world / "data.jsonl", model=world / "model"))
    names = ["encode", "critical", "select/params.untried-drop", "select/params.untried-keep"]
    names = [name.replace("params.", "") for name in names]
    assert [step.step for step in curate.plan("run.yaml")] == names
    curate.run("run.yaml", until="critical")
    results = curate.run("run.yaml")
    assert [(name, result.skipped) for name, result in results.items()] == [
        *((name, True) for name in names[:2]),
        *((name, False) for name in names[2:]),
    ]
    by_verb = measure(world, tmp_path / "verb", max_positions=2)
    assert results["critical"].metrics == by_verb.metrics
    critical = np.concatenate(column("run/critical", "critical"))
    np.testing.assert_array_equal(critical, np.concatenate(column(tmp_path / "verb", "critical")))
    np.testing.assert_array_equal(
        np.concatenate(column("run/masked-untried-drop", "keep_mask")), critical == 1
    )
    again = curate.run("run.yaml", overrides=["critical.max_positions=1"])
    assert [name for name, result in again.items() if not result.skipped] == names[1:]


def test_it_is_a_named_step_of_a_snapshot_beside_other_selections(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(STEPS.format(data=world / "data.jsonl", model=world / "model"))
    planned = {step.step: step.state for step in curate.plan("run.yaml")}
    assert planned["tried"] == "waits for train"
    assert planned["critical"] == "waits for train"
    results = curate.run("run.yaml")
    assert results["tried"].metrics["checkpoint"].endswith("train/step-1")
    assert results["critical"].metrics["compared"] == {"current": "tried"}
    assert all(result.skipped for result in curate.run("run.yaml").values())


def test_a_run_without_the_step_that_a_method_reads(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(line for line in SECTIONS.splitlines() if not line.startswith("critical:"))
    Path("run.yaml").write_text(text.format(data=world / "data.jsonl", model=world / "model"))
    with pytest.raises(
        UsageError,
        match=r"select\.critical needs one step .* before it, there are: none \(a step of critical\)",
    ):
        curate.run("run.yaml")
    assert not Path("run").exists()
