"""Every method against the values that its authors' published code gives, from a scores folder to a masked one.

`../shared/golden/methods` holds the signals of 32 real examples and what each method makes of them; the signals are
written as `score` writes them, and `select` runs on them.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from sstoken.methods import get_method
from sstoken.signals import get_signal
from sstoken.stages import joins, tables
from sstoken.stages.scores_file import measured_tokens, write_scores
from sstoken.stages.select import Select
from tests.factories import save_tokenizer
from tests.stages.context import make_context

GOLDEN = Path(__file__).parents[2] / "shared/golden/methods"
SHARDS = (13, 19)
"""Rows of each shard: what is asked of the whole dataset has to be found across them."""
NAMES = {"num_ties": "ties", "loss_uncond": "loss_unconditional"}
PAIRS = {
    "kl@base": "kl_sft_base",
    "reverse_kl@base": "kl_base_sft",
    "kl_at@base": "kl_at_sft_base",
    "entropy_at": "entropy_at_sft",
}
"""Signals of sft beside base."""

BOTH, ONE = "both", "one"
COLUMNS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dft__llamafactory": ("dft", {}, "weight"),
    "dft__trl": ("dft", {}, "weight"),
    "dft__authors": ("dft", {}, "weight"),
    "eaft__llamafactory_alpha1": ("eaft", {}, "weight"),
    "eaft__llamafactory_alpha2": ("eaft", {"alpha": 2}, "weight"),
    "eaft__msswift_alpha1": ("eaft", {}, "weight"),
    "eaft__axolotl_alpha1_k20": ("eaft-axolotl", {}, "weight"),
    "deft__authors": ("deft", {}, "weight"),
    "bll__p": ("p-q", {}, "weight"),
    "bll__GeneralFamily-0.5": ("p-q", {"q": 0.5}, "weight"),
    "bll__GeneralFamily-10": ("p-q", {"q": 10}, "weight"),
    "bll__OnlyTopLogP-0.1": ("p-q", {"form": "top", "tau": 0.1}, "keep_mask"),
    "bll__OnlyBottomLogP-0.1": ("p-q", {"form": "bottom", "tau": 0.1}, "keep_mask"),
    "prift__u": ("prift-mass", {}, "score"),
    "prift__prob": ("prift-prob", {}, "weight"),
    "prift__mass0.5": ("prift-mass", {}, "keep_mask"),
    "profit__higher_0.1": ("profit", {"tau": 0.1}, "keep_mask"),
    "profit__lower_0.8": ("profit", {"direction": "lower", "tau": 0.8}, "keep_mask"),
    "profit__middle_0.3_0.7": ("profit", {"direction": "middle", "tau": 0.3, "upper": 0.7}, "keep_mask"),
    "infosft__P0.93": ("infosft", {}, "weight"),
    "ranktuner__code": ("ranktuner", {}, "weight"),
    "ranktuner__paper": ("ranktuner-paper", {}, "weight"),
    "chord_phi__msswift": ("chord-phi", {}, "weight"),
    "asft__loss_kl0.1": ("asft", {}, "score"),
    "asft__loss_sft+kl0.1": ("asft", {"loss": "sft"}, "score"),
    "iwsft__sequence_temp1": ("iw-sft", {}, "weight"),
    "iwsft__token_clip0.8": ("iw-sft-token", {}, "weight"),
    "eksft__selected_by_kl_0.2": ("eksft", {"combine": "kl"}, "dropped"),
    "eksft__selected_by_entropy_0.2": ("eksft", {"combine": "entropy"}, "dropped"),
    "eksft__keep_union_0.2": ("eksft", {}, "keep_mask"),
    "eksft__keep_intersection_0.2": ("eksft", {"combine": "intersection"}, "keep_mask"),
    "eksft__keep_union_0.2_aligned": ("eksft-aligned", {}, "keep_mask"),
    "stm__ppl": ("stm", {}, "score"),
    "stm__keep_2.5": ("stm", {}, "keep_mask"),
    "stm__keep_lowest_2.5": ("stm", {"drop": "lowest"}, "keep_mask"),
    "stm__stm_dpf_keep_2.5__base_sft": ("stm-dpf", {}, "keep_mask"),
    "stm__dpf_keep_2.5__base_sft": ("dpf", {}, "keep_mask"),
    "token_cleaning__global_0.6": ("token-cleaning", {}, "keep_mask"),
    "token_cleaning__sample_0.6": ("token-cleaning", {"scope": "sample"}, "keep_mask"),
    "toss__keep_discard0.2": ("toss", {}, "keep_mask"),
    "forgetting__sign_0.7": ("forgetting", {"forget": 1}, "weight"),
    "sstoken__gamma0.5_rho0.6": ("sstoken", {}, "keep_mask"),
    "sstoken__gamma0.3_rho0.4": ("sstoken", {"gamma": 0.3, "rho": 0.4}, "keep_mask"),
    "sstoken__gamma1_rho0.5": ("sstoken", {"gamma": 1, "rho": 0.5}, "keep_mask"),
    "sstoken__gamma0_rho0.8": ("sstoken", {"gamma": 0, "rho": 0.8}, "keep_mask"),
    "sekd__top20_entropy": ("se-kd", {}, "keep_mask"),
    "top_entropy__rho0.2": ("token-entropy", {}, "keep_mask"),
    "cayley__authors": ("cayley", {}, "weight"),
    "prefix__sequence_0.5": ("prefix", {}, "keep_mask"),
    "prefix__response_0.5": ("prefix", {"of": "response"}, "keep_mask"),
    "tshirt__delta_loss": ("t-shirt", {}, "score"),
    "tshirt__in_sifd_0.5": ("t-shirt", {}, "keep_mask"),
    "talr__tau_seqmedian_wmin0.01": ("talr", {}, "weight"),
    "talr__tau_tokmedian_wmin0.01": ("talr", {"median": "token"}, "weight"),
    "eaft_pilot__drop_15_15": ("eaft-pilot", {}, "keep_mask"),
    "eaft_masked__tau15": ("eaft-masked", {}, "keep_mask"),
    "trim__keep_high_loss_0.6": ("trimming", {}, "keep_mask"),
    "trim__keep_low_loss_0.6": ("trimming", {"keep": "low"}, "keep_mask"),
    "t3s__keep": ("t3s", {}, "keep_mask"),
    "xtf_kn__keep": ("xtf-kn", {}, "keep_mask"),
    "psft__ratio_clip0.28": ("psft", {}, "weight"),
}
"""By golden column, without the checkpoint: method, its parameters (and scope), the column that has to equal it."""

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared")


def golden_columns() -> list[str]:
    if not GOLDEN.is_dir():
        return []
    return [c["column"] for c in json.loads((GOLDEN / "methods.json").read_text())["columns"]]


@pytest.fixture(scope="module")
def golden() -> pl.DataFrame:
    return pl.read_parquet(GOLDEN / "methods.parquet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokens, and the scores of both checkpoints, as `encode` and `score` write them."""
    root = tmp_path_factory.mktemp("golden-methods")
    found = {name: root / name for name in ("tokens", "base", "sft")}
    for folder in found.values():
        folder.mkdir()
    save_tokenizer(found["tokens"] / "tokenizer")
    signals = pl.read_parquet(GOLDEN / "signals.parquet")
    for part, rows in enumerate((signals[: SHARDS[0]], signals[SHARDS[0] :])):
        table = rows.select("example_id", "input_ids", "response_mask").to_arrow().cast(tables.TOKENS)
        said = {joins.TOKENS: joins.tokens_fingerprint(table)}
        about = {
            "kind": "tokens",
            "tokenizer": {"fingerprint": "golden", "name": "golden"},
            "stats": {},
            **said,
        }
        tables.write_part(found["tokens"] / tables.part_name(part), table, about)
        offsets = tables.flatten(table["input_ids"])[1]
        response = np.concatenate(rows["response_mask"].to_list())
        for role in ("base", "sft"):
            sources = {
                NAMES.get(name, name): f"{name}__{role}"
                for name in (c.removesuffix(f"__{role}") for c in rows.columns if c.endswith(f"__{role}"))
            } | (PAIRS if role == "sft" else {})
            values = {}
            for name, column in sources.items():
                signal = get_signal(name)
                kept = measured_tokens(signal, response, offsets)
                flat = np.array(rows[column].explode().to_list(), dtype=np.float64)
                values[name] = flat[kept].astype(signal.dtype)
            write_scores(
                found[role] / tables.part_name(part),
                table["example_id"].to_pylist(),
                offsets,
                response,
                values,
                {"checkpoint": role, "layer": -1, "dtype": "float32", **said},
            )
    return found


SPECIFIED = Path(__file__).parents[2] / "shared/METHODS.md"
NO_METHOD = {
    "token-cleaning-self-evolving": "token-cleaning by the steps of configs/self-evolving.yaml",
    "eaft-hard-masks": "eaft-pilot and eaft-masked",
}
"""Rows of the specification that are no method by themselves."""


@pytest.mark.skipif(not SPECIFIED.is_file(), reason="needs ../shared")
def test_every_method_of_the_specification_is_found_by_its_name_there() -> None:
    table = SPECIFIED.read_text().partition("## Table")[2].partition("## Blocks")[0]
    names = [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("| ")][1:]
    names = [name for cell in names if "CFT" not in cell for name in re.split(r" / ", cell)]
    assert len(names) > 30
    for name in names:
        kebab = re.sub(r"[^a-z0-9]+", "-", name.partition(" (")[0].lower()).strip("-")
        assert kebab in NO_METHOD or get_method(kebab), name


def matching(column: str) -> tuple[str, str | None]:
    """The entry of `COLUMNS`, and the checkpoint where the column is of one."""
    for checkpoint in ("base", "sft"):
        if column.removesuffix(f"__{checkpoint}") in COLUMNS:
            name = column.removesuffix(f"__{checkpoint}")
            return name, checkpoint if name != column else None
    raise AssertionError(f"no method is compared with {column}")


def flat(values: pl.Series) -> np.ndarray[Any, Any]:
    return np.array(values.explode().to_list(), dtype=np.float64)


@pytest.mark.parametrize("column", golden_columns())
def test_golden(column: str, golden: pl.DataFrame, folders: dict[str, Path], tmp_path: Path) -> None:
    entry, checkpoint = matching(column)
    name, params, where = COLUMNS[entry]
    scope = params.get("scope")
    params = {k: v for k, v in params.items() if k != "scope"}
    roles = {"history": folders["base"], "current": folders["sft"]}
    if checkpoint is not None:
        roles = dict.fromkeys(get_method(name).roles, folders[checkpoint])
    inputs = {"tokens": folders["tokens"], **roles}
    Select(method=name, params=params, scope=scope).run(make_context(tmp_path / "masked", inputs))
    masked = pl.read_parquet(tmp_path / "masked/part-*.parquet")
    assert masked["example_id"].to_list() == golden["example_id"].to_list()
    response = flat(masked["response_mask"]) > 0
    wanted = flat(golden[column])[response]
    found = flat(masked[where if where != "dropped" else "keep_mask"])[response]
    if where == "dropped":
        found = 1 - found
    if where in ("keep_mask", "dropped"):
        assert 0 < wanted.sum() < wanted.size
        np.testing.assert_array_equal(found, wanted)
    else:
        assert np.unique(wanted[np.isfinite(wanted)]).size > 2
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-4)
