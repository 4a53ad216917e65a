"""`load_dataset` on a folder gives that folder's rows, whatever it loaded before from one of the same name."""

import datasets
import pytest

from sstoken import curate


def kept(folder, tmp_path):
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    return sum(label >= 0 for row in rows for label in row["labels"])


def select(world, out, rho, **options):
    result = curate.select(
        tokens=world.tokens, scores=world.scores, out=out, method="random", rho=rho, **options
    )
    return result.metrics["kept"]


def test_masked_folders_of_one_name(world, tmp_path):
    found = [select(world, tmp_path / f"run-{rho}" / "masked", rho) for rho in (0.3, 0.6)]
    assert [kept(tmp_path / f"run-{rho}" / "masked", tmp_path) for rho in (0.3, 0.6)] == found


def test_a_masked_folder_made_anew(world, tmp_path):
    for rho in (0.3, 0.6):
        assert select(world, tmp_path / "masked", rho, force=True) == kept(tmp_path / "masked", tmp_path)


@pytest.mark.parametrize("target", ["trl", "transformers", "jsonl"])
def test_exports_of_one_name(world, tmp_path, target):
    for rho in (0.3, 0.6):
        masked, export = tmp_path / str(rho) / "masked", tmp_path / str(rho) / "export"
        found = select(world, masked, rho)
        curate.export(masked=masked, to=target, out=export)
        assert kept(export, tmp_path) == found
