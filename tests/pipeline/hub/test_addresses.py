"""hf:// addresses: data and finished folders in a Hub repository are read as those on a disk are."""

from sstoken.stages import tables
from tests.pipeline.worlds import SHARD_ROWS, make_world

UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("me/raw", repo_type="dataset", exist_ok=True)
api.upload_file(path_or_fileobj=sys.argv[1], path_in_repo="data.jsonl", repo_id="me/raw", repo_type="dataset")
api.upload_folder(folder_path=sys.argv[2], path_in_repo="tokens", repo_id="me/raw", repo_type="dataset")
"""


def test_data_and_folders_on_the_hub_are_read(client, tmp_path):
    world = make_world()
    uploaded = client.python(UPLOAD, world.data, world.tokens)
    assert uploaded.code == 0, uploaded.err
    encoded = client(
        "encode", "--data", "hf://datasets/me/raw/data.jsonl", "--model", world.base, "--out", tmp_path / "tokens",
        "--shard-rows", SHARD_ROWS, "--workers", 1,
    )  # fmt: skip
    assert encoded.code == 0, encoded.err
    for ours, theirs in zip(tables.parts(tmp_path / "tokens"), tables.parts(world.tokens), strict=True):
        assert tables.read_table(ours).equals(tables.read_table(theirs))
    for tokens in (world.tokens, "hf://datasets/me/raw/tokens"):
        out = tmp_path / ("here" if tokens is world.tokens else "there")
        selected = client("select", "--tokens", tokens, "--scores", world.scores, "--out", out)
        assert selected.code == 0, selected.err
    for ours, theirs in zip(tables.parts(tmp_path / "here"), tables.parts(tmp_path / "there"), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    checked = client("verify", "hf://datasets/me/raw/tokens")
    assert (checked.code, checked.out) == (0, "1 finished folders checked, 0 problems\n"), checked.err
    missing = client("verify", "hf://datasets/me/raw/nothing")
    assert "no such folder" in missing.err
