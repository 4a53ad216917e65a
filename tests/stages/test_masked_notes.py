"""What `select` says where a selection looks wrong though nothing forbids it, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sstoken.errors import SstokenError
from sstoken.methods import Params, Policy, Tokens, Weight, Where, get_method, registry
from sstoken.stages import joins, tables
from sstoken.stages.masked_stats import notes_on, signal_stats
from sstoken.stages.scores_file import write_scores
from sstoken.stages.select import Select
from tests.factories import VOCABULARY, save_tokenizer
from tests.stages.context import make_context

ROWS, LENGTH, PROMPT = 12, 10, 4


def write(folder: Path, history: dict[str, np.ndarray], current: dict[str, np.ndarray]) -> dict[str, Path]:
    """Tokens in two shards, and the signals of both checkpoints: each [ROWS * response]."""
    inputs = {name: folder / name for name in ("tokens", "history", "current")}
    for place in inputs.values():
        place.mkdir(parents=True)
    save_tokenizer(inputs["tokens"] / "tokenizer")
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (ROWS, LENGTH))
    mask = np.arange(LENGTH) >= PROMPT
    half = ROWS // 2
    for part in (0, 1):
        rows = range(part * half, (part + 1) * half)
        columns = [[f"e{r}" for r in rows], [ids[r].tolist() for r in rows], [mask.tolist() for _ in rows]]
        table = pa.table(columns, schema=tables.TOKENS)
        said = {joins.TOKENS: joins.tokens_fingerprint(table)}
        about = {"kind": "tokens", "tokenizer": {"fingerprint": "f", "name": "t"}, "stats": {}, **said}
        tables.write_part(inputs["tokens"] / tables.part_name(part), table, about)
        per_part = half * (LENGTH - PROMPT)
        for role, signals in (("history", history), ("current", current)):
            compact = {
                name: values[part * per_part : (part + 1) * per_part].astype(np.float32)
                for name, values in signals.items()
            }
            write_scores(
                inputs[role] / tables.part_name(part),
                columns[0],
                np.arange(half + 1, dtype=np.int32) * LENGTH,
                np.tile(mask, half),
                compact,
                {"checkpoint": f"models/{role}", "layer": -1, "dtype": "float32", **said},
            )
    return inputs


def losses(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 3, ROWS * (LENGTH - PROMPT))


def notes(inputs: dict[str, Path], out: Path, **fields: object) -> list[str]:
    return Select(**fields).run(make_context(out, inputs)).get("notes", [])


def test_nothing_is_said_where_nothing_is_wrong(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", {"loss": losses(0) + 1}, {"loss": losses(1)})
    assert notes(inputs, tmp_path / "out", method="rel", protect=("end_of_turn",)) == []


def test_one_checkpoint_in_two_roles(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", {"loss": losses(0)}, {"loss": losses(0)})
    found = notes(inputs, tmp_path / "out", method="rel")
    assert any("look like one checkpoint" in line for line in found)


def test_exchanged_checkpoints(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", {"loss": losses(1)}, {"loss": losses(0) + 1})
    [line] = [n for n in notes(inputs, tmp_path / "out", method="rel") if "REL" in n]
    assert line.startswith("mean REL is -")
    assert "may be swapped" in line


def test_pmi_band_with_a_base_that_does_not_know_such_answers() -> None:
    offsets = np.array([0, 3, 7])
    inputs = ("history.loss", "history.loss_unconditional")

    def said(*levels: float) -> list[str]:
        stats = []
        for level in levels:
            values = np.linspace(-0.5, 0.5, 7) + level
            tokens = Tokens(offsets, dict.fromkeys(inputs, values))
            stats.append(
                {"response_tokens": 7, "kept": 7}
                | signal_stats(tokens, np.ones(7, dtype=bool), inputs, offsets)
            )
        return [line for line in notes_on(stats, "pmi-band") if "mean loss" in line]

    assert said(1.5) == said(4.9, 1.0) == []
    [line] = said(4.9, 4.7)
    assert line.startswith("the base's mean loss is 4.80 nats a token")


def test_a_constant_signal(tmp_path: Path) -> None:
    constant = np.full(ROWS * (LENGTH - PROMPT), 0.25)
    inputs = write(tmp_path / "in", {"loss": losses(0) + 1}, {"loss": losses(1), "attention": constant})
    found = notes(inputs, tmp_path / "out", method="sstoken")
    assert any(line.startswith("current.attention is 0.25 on every token") for line in found)


def test_a_constant_count_of_ties_is_nothing_unusual(tmp_path: Path) -> None:
    named = ("loss", "mass_above")
    history = {name: losses(seed) / 10 for seed, name in enumerate(named)}
    history["ties"] = np.zeros(ROWS * (LENGTH - PROMPT))
    inputs = write(tmp_path / "in", history, {"loss": losses(2)})
    assert not [n for n in notes(inputs, tmp_path / "out", method="prift-mass") if "learns nothing" in n]


def test_a_selection_that_keeps_nothing(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", {"loss": losses(0)}, {"loss": losses(1)})
    [line] = notes(inputs, tmp_path / "out", method="profit", params={"tau": 1})
    assert line.startswith("no token is kept")


def test_turn_ends_that_are_dropped(tmp_path: Path) -> None:
    loss = np.tile(np.arange(LENGTH - PROMPT, 0, -1.0), ROWS)
    inputs = write(tmp_path / "in", {"loss": losses(0)}, {"loss": loss})
    [line] = notes(inputs, tmp_path / "out", method="loss", rho=0.5)
    assert line.startswith(f"the last token of {ROWS} of {ROWS} turns is dropped")
    assert notes(inputs, tmp_path / "kept", method="loss", rho=0.5, protect=("end_of_turn",)) == []


def test_a_signal_that_was_not_measured_names_the_command_that_measures_it(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", {"loss": losses(0)}, {"loss": losses(1)})
    with pytest.raises(SstokenError) as raised:
        notes(inputs, tmp_path / "out", method="eaft")
    line = str(raised.value)
    assert "\n" not in line
    assert "method 'eaft' needs current.entropy_top20, which was not measured; there are loss" in line
    assert f"score --tokens {inputs['tokens']} --ckpt current=models/current" in line
    assert "--signal loss --signal entropy_top20" in line
    assert not list((tmp_path / "out").iterdir())


def test_a_comparison_that_was_not_measured_names_the_other_checkpoint(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", {"loss": losses(0)}, {"loss": losses(1)})
    command = "--ckpt history=models/history --ckpt current=models/current --signal loss --signal entropy "
    command += "--signal kl@history --attention-from none"
    with pytest.raises(
        SstokenError, match=f"needs current.kl@history and current.entropy, which were .*{command}"
    ):
        notes(inputs, tmp_path / "out", method="eksft-aligned")


def test_a_role_without_scores(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", {"loss": losses(0)}, {"loss": losses(1)})
    del inputs["history"]
    with pytest.raises(SstokenError, match=r"needs history\.loss, and no scores were given for 'history'"):
        notes(inputs, tmp_path / "out", method="rel")


def test_says_what_was_compared_and_how_far_the_loss_fell(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", {"loss": losses(0) + 1}, {"loss": losses(1)})
    found = Select(method="rel").run(make_context(tmp_path / "out", inputs))
    assert found["compared"] == {"history": "history", "current": "current"}
    fallen = (losses(0) + 1).astype(np.float32) - losses(1).astype(np.float32)
    assert found["mean_rel"] == pytest.approx(fallen.mean(), abs=1e-6)


def test_one_token_that_sets_the_range(tmp_path: Path) -> None:
    alike = np.random.default_rng(2).uniform(1, 1.1, ROWS * (LENGTH - PROMPT))
    attention = losses(3) / 10
    few, many = alike.copy(), alike.copy()
    few[:: 4 * (LENGTH - PROMPT)] += 5
    many[:: LENGTH - PROMPT] += 5
    for name, history, said in (("few", few, 0), ("many", many, 1)):
        inputs = write(tmp_path / name, {"loss": history}, {"loss": alike * 0.5, "attention": attention})
        for method, expected in (("sstoken", said), ("rel", 0)):
            found = notes(inputs, tmp_path / f"{name}-{method}", method=method)
            lines = [line for line in found if "a single token" in line]
            assert len(lines) == expected
            if lines:
                assert lines[0].startswith(f"in {ROWS} of {ROWS} examples")


def broken(scores: np.ndarray, *_: object) -> np.ndarray:
    raise ValueError("two\nlines")


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Where("keeps some", broken), r"failed on these signals \(ValueError: two lines\)"),
        (Weight(of=broken), r"failed on these signals \(ValueError: two lines\)"),
        (Weight(of=lambda scores, *_: scores / 0), "gave a weight that is not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_method_of_a_package_that_fails(
    policy: Policy, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write(tmp_path / "in", {"loss": losses(0)}, {"loss": losses(1)})
    method = replace(get_method("loss"), name="theirs", policy=policy, params=Params)
    monkeypatch.setattr(registry, "_found", lambda: {"theirs": method})
    with pytest.raises(SstokenError, match=f"method 'theirs' {said}"):
        notes(inputs, tmp_path / "out", method="theirs")


def test_an_option_that_the_method_does_without(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", {"loss": losses(0)}, {"loss": losses(1)})
    kept = {"protect": ("end_of_turn",)}
    [line] = notes(inputs, tmp_path / "out", method="random", gamma=0.9, **kept)
    assert line == "method 'random' has no gamma; it changes nothing here"
    assert notes(inputs, tmp_path / "bare", method="random", **kept) == []
