"""The registry of backends: another package's is found, its settings are checked and fingerprinted."""

import subprocess
import sys
from typing import Annotated

import numpy as np
import pyarrow as pa
import pytest
from pydantic import Field

from sstoken.errors import SstokenError, UsageError
from sstoken.stages import checkpoints, tables
from sstoken.stages.backends import Backend, BackendOptions, make_backend, read_settings
from sstoken.stages.score import Score
from sstoken.stages.stage import SPEED_ONLY, Settings
from tests.factories import save_model
from tests.stages.context import make_context
from tests.support import ROOT


class TableSettings(Settings):
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Decides numbers."""
    threads: Annotated[int, SPEED_ONLY] = 1
    """Decides nothing."""


class TableBackend(Backend):
    """The loss of a token is its id; a stand-in for an engine of somebody else's."""

    settings = TableSettings
    several_workers = False

    @classmethod
    def refusal(cls, options):
        return "bfloat16 is not for tables; use --backend hf" if options.dtype == "bfloat16" else None

    def __init__(self, options):
        self._scale = read_settings("table", options).scale

    vocab_size, max_length = 1000, None

    def measure(self, sequences, response_masks):
        for i, (ids, mask) in enumerate(zip(sequences, response_masks, strict=True)):
            yield i, {"loss": (self._scale * ids[mask]).astype(np.float32)}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """What pip leaves of a package that declares the backend."""
    info = tmp_path / "elsewhere" / "tables_for_sstoken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tables-for-sstoken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sstoken.backends]\ntable = {__name__}:TableBackend\n")
    monkeypatch.syspath_prepend(info.parent)
    return info.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("models") / "base"))


def options(checkpoint, dtype="float32", **settings):
    return BackendOptions(checkpoint, ("loss",), -1, dtype, "cpu", 512, False, tuple(settings.items()))


def test_another_packages_backend_is_found_by_its_entry_point(installed, model):
    backend = make_backend("table", options(model, scale="2.5"))
    [(_, signals)] = backend.measure([np.array([1, 2, 3], np.int32)], [np.array([False, True, True])])
    np.testing.assert_array_equal(signals["loss"], np.array([5, 7.5], np.float32))


def test_without_the_package_its_name_is_not_known(model):
    with pytest.raises(UsageError, match="backend 'table' is not known; legal: auto, hf"):
        make_backend("table", options(model))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scala": 2}, "table has no option 'scala'; legal: scale, threads"),
        ({"scale": "big"}, "scale is 'big'; it has to be a number"),
        ({"scale": 0}, "scale is 0; legal is more than 0"),
    ],
)
def test_its_settings_are_checked_before_any_work(installed, model, settings, words):
    with pytest.raises(UsageError, match=words):
        Score(checkpoint=model, backend="table", backend_options=settings).check()


def test_what_it_refuses_is_refused_before_any_work(installed, model):
    with pytest.raises(UsageError, match="bfloat16 is not for tables; use --backend hf"):
        Score(checkpoint=model, backend="table", dtype="bfloat16").check()
    with pytest.raises(UsageError, match="workers is 2; table spreads over the devices itself, legal is 1"):
        Score(checkpoint=model, backend="table", workers=2).check()


@pytest.mark.parametrize("backend", ["table", "vllm"])
def test_signals_that_it_does_not_measure_are_refused_by_name(installed, model, backend):
    stage = Score(
        checkpoint=model, backend=backend, signals=("loss", "rank", "kl@x"), references={"x": model}
    )
    with pytest.raises(
        UsageError, match=f"{backend} does not measure rank, kl@x; it measures .*loss.*; use --backend hf"
    ):
        stage.check()


def test_the_fingerprint_has_what_decides_numbers_and_nothing_else(installed, model):
    def fingerprinted(**settings):
        return Score(checkpoint=model, backend="table", backend_options=settings).fingerprinted()

    plain = fingerprinted()
    assert plain["backend"] == "table"
    assert fingerprinted(threads=8) == fingerprinted(scale=1.0) == fingerprinted(scale="1") == plain
    assert fingerprinted(scale=2, threads=8)["backend_options"] == {"scale": 2.0}


def test_what_it_leaves_out_is_missed(installed, model, tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    row = {"example_id": "a", "input_ids": [1, 2, 3], "response_mask": [False, True, True]}
    table = pa.Table.from_pylist([row], schema=tables.TOKENS)
    facts = {
        "fingerprint": checkpoints.tokenizer_fingerprint(checkpoints.load_tokenizer(model)),
        "name": "tiny",
    }
    tables.write_part(folder / tables.part_name(0), table, {"tokenizer": facts})
    stage = Score(checkpoint=model, backend="table", attention=True)
    with pytest.raises(SstokenError, match=r"did not measure 1 of 1 examples .*'a'"):
        stage.run(make_context(tmp_path / "scores", {"tokens": folder}))


def test_auto_is_transformers_here(model):
    assert Score(checkpoint=model).fingerprinted()["backend"] == "hf"


def test_options_are_hashable():
    assert hash(BackendOptions("m", ("loss", "attention"), -1, "float32", "cpu", 1, False))


def test_the_registry_loads_no_heavy_library():
    code = (
        "import sys; from sstoken.stages import backends; backends.known_backends();"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
