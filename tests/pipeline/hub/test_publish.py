"""A masked dataset onto the Hub: what arrives, in how many commits and uploads, and what is refused."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from sstoken.pipeline import api
from sstoken.stages import tables
from tests.pipeline.hub.rows import identical, loaded, masked_table
from tests.pipeline.hub.server import READ, STRANGER
from tests.pipeline.worlds import list_anew, make_world
from tests.support import PATIENCE, messages

SPLIT = ("--shard-tokens", 1)
"""A published file for each shard."""


def front_matter(hub, name, branch="main"):
    return yaml.safe_load(hub.files(name, branch)["README.md"].decode().split("---\n")[1])


def with_shards(folder, shard_rows):
    """A masked folder of 24 rows in shards of that size."""
    world = make_world()
    tokens = folder / "tokens"
    api.encode(data=str(world.data), model=str(world.base), out=tokens, shard_rows=shard_rows, workers=1)
    (folder / "scores").mkdir()
    api.select(
        tokens=tokens, scores=folder / "scores", out=folder / "masked", method="random", seed=shard_rows
    )
    return folder / "masked"


@pytest.fixture
def copy(masked, tmp_path):
    return shutil.copytree(masked, tmp_path / "masked")


def test_what_is_published_is_loaded_to_the_last_bit(hub, client, masked, tmp_path):
    client.works("publish", masked, "--repo", "me/whole", "--include-scores", "--out", tmp_path / "prepared")
    for table in loaded(client, "me/whole", tmp_path):
        assert table.schema.names == tables.MASKED.names
        assert identical(table, masked_table(masked))
    assert front_matter(hub, "me/whole")["dataset_info"]["splits"][0]["num_examples"] == 24


def test_without_scores_the_masks_are_published_and_nothing_large(hub, client, masked, tmp_path):
    client.works(
        "publish", masked, "--repo", "me/small", "--out", tmp_path / "prepared", "--branch", "rho/0.6"
    )
    names = ["example_id", "input_ids", "labels", "keep_mask", "response_mask"]
    for table in loaded(client, "me/small", tmp_path, "rho/0.6"):
        assert identical(table, masked_table(masked, names))
    assert hub.commits("me/small") == ["initial commit"]
    assert len(hub.commits("me/small", "rho/0.6")) == 2


def test_a_lean_dataset(client, tmp_path):
    world, lean = make_world(), tmp_path / "lean"
    api.select(tokens=world.tokens, scores=world.scores, out=lean, method="random", lean=True)
    line = client.fails(2, "publish", lean, "--repo", "me/lean", "--include-scores")
    assert "--include-scores" in line
    client.works("publish", lean, "--repo", "me/lean")
    for table in loaded(client, "me/lean", tmp_path):
        assert identical(table, masked_table(lean))


def test_the_second_time_nothing_is_sent_and_no_commit_is_made(hub, client, copy):
    first = client.works("publish", copy, "--repo", "me/twice")
    puts = len(hub.puts)
    shutil.rmtree(copy.with_name("masked.publish"))
    again = client.works("publish", copy, "--repo", "me/twice")
    assert again["commit"] == first["commit"]
    assert again["changed"] == again["removed"] == []
    assert "no commit was made" in client("publish", copy, "--repo", "me/twice").out
    assert len(hub.commits("me/twice")) == 2
    assert len(hub.puts) == puts


def test_another_selection_replaces_the_one_before_in_one_commit(hub, client, tmp_path):
    many, few = with_shards(tmp_path / "many", 5), with_shards(tmp_path / "few", 10)
    client.works("publish", many, "--repo", "me/again", *SPLIT)
    puts = len(hub.puts)
    second = client.works("publish", few, "--repo", "me/again", *SPLIT)
    assert second["removed"] == ["data/part-00003.parquet", "data/part-00004.parquet"]
    assert not any(path.startswith("tokenizer/") for path in second["changed"])
    assert len(hub.commits("me/again")) == 3
    assert len(hub.puts) == puts + 3
    for table in loaded(client, "me/again", tmp_path):
        assert identical(table, masked_table(few, table.schema.names))


def test_a_killed_upload_goes_on_where_it_stopped(hub, client, tmp_path):
    masked = with_shards(tmp_path, 2)
    start, hub.hold_puts_after = len(hub.puts), len(hub.puts) + 5
    hub.held.clear()
    process = client.start("publish", masked, "--repo", "me/killed", *SPLIT)
    assert hub.held.wait(60)
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    hub.hold_puts_after = None
    hub.release.set()
    assert hub.commits("me/killed") == ["initial commit"]  # nothing half-published is seen
    assert len(hub.puts) == start + 5

    client.works("publish", masked, "--repo", "me/killed", *SPLIT)
    sent = hub.puts[start:]
    assert len(sent) == len(set(sent)) == 12  # each shard once
    assert len(hub.commits("me/killed")) == 2
    for table in loaded(client, "me/killed", tmp_path):
        assert identical(table, masked_table(masked, table.schema.names))


def test_a_failing_hub_is_one_line_and_the_next_call_sends_nothing_again(hub, client, tmp_path):
    masked = with_shards(tmp_path, 7)
    hub.fail_commits = 1
    assert "the Hub failed (500)" in client.fails(1, "publish", masked, "--repo", "me/failing", *SPLIT)
    puts = len(hub.puts)
    client.works("publish", masked, "--repo", "me/failing", *SPLIT)
    assert len(hub.puts) == puts
    assert len(hub.commits("me/failing")) == 2


def test_a_change_by_somebody_else_meanwhile_is_not_overwritten(hub, client, copy):
    client.works("publish", copy, "--repo", "me/raced")
    hub.before_commit = lambda: hub.write("me/raced", "notes.md", b"theirs")
    assert "(412)" in client.fails(1, "publish", copy, "--repo", "me/raced", "--license", "mit")
    client.works("publish", copy, "--repo", "me/raced", "--license", "mit")
    assert hub.files("me/raced")["notes.md"] == b"theirs"
    assert front_matter(hub, "me/raced")["license"] == "mit"


def test_a_dry_run_shows_files_and_card_and_asks_for_nothing(hub, client, copy):
    requests = len(hub.log)
    shown = client("publish", copy, "--repo", "me/dry", "--dry-run", token="").out
    assert len(hub.log) == requests
    assert "me/dry" not in hub.repos
    assert re.search(r"^ +[\d,]+  data/part-00000\.parquet$", shown, re.MULTILINE)
    assert "# dry, token-masked" in shown
    facts = json.loads(client("publish", copy, "--repo", "me/dry", "--dry-run", "--json", token="").out)
    client.works("publish", copy, "--repo", "me/dry")
    published = hub.files("me/dry")
    assert {f["path"]: f["bytes"] for f in facts["files"]} == {
        path: len(content) for path, content in published.items() if path != ".gitattributes"
    }
    assert published["README.md"].decode() == facts["card"]


def test_nothing_of_this_machine_is_published(hub, client, copy):
    tokenizer = copy / "tokenizer/tokenizer_config.json"
    settings = json.loads(tokenizer.read_text()) | {"name_or_path": str(make_world().base)}
    tokenizer.write_text(json.dumps(settings))
    list_anew(copy)
    client.works("publish", copy, "--repo", "me/discreet")
    places = [str(make_world().base.parent), str(copy.parent), str(Path.home()), client.token]
    for path, content in hub.files("me/discreet").items():
        assert not [place for place in places if place.encode() in content], path
    metadata = tables.read_metadata(copy.with_name("masked.publish") / "data/part-00000.parquet")
    assert metadata["tokenizer"]["name"] == "base"
    assert metadata["checkpoints"]["current"]["checkpoint"] == "later"


def test_the_source_on_the_hub_gives_its_name_and_licence(hub, client, tmp_path):
    hub.create("another/questions")
    hub.write("another/questions", "README.md", b"---\nlicense: cc-by-4.0\n---\n# Questions\n")
    hub.write("another/questions", "rows.jsonl", make_world().data.read_bytes())
    model, tokens, masked = make_world().base, tmp_path / "tokens", tmp_path / "masked"
    client.works("encode", "--data", "another/questions", "--model", model, "--out", tokens)
    (tmp_path / "none").mkdir()
    client.works(
        "select", "--tokens", tokens, "--scores", tmp_path / "none", "--method", "random", "--out", masked
    )
    client.works("publish", masked, "--repo", "me/derived")
    front = front_matter(hub, "me/derived")
    assert front["license"] == "cc-by-4.0"
    assert front["source_datasets"] == ["another/questions"]
    assert front["pretty_name"] == "another/questions, token-masked"
    commit = hub.repos["another/questions"]["branches"]["main"]
    assert f"another/questions at {commit}" in hub.files("me/derived")["README.md"].decode()


def test_private(hub, client, copy):
    client.works("publish", copy, "--repo", "me/secret", "--private")
    assert hub.repos["me/secret"]["private"]
    assert "no such dataset" in client.fails(
        1, "pull", "me/secret", "--out", copy.with_name("x"), token=STRANGER
    )
    client.works("publish", copy, "--repo", "me/open")
    assert "is public" in client.fails(2, "publish", copy, "--repo", "me/open", "--private")


def test_who_may_not_publish_gets_one_line(hub, client, copy):
    publish = ("publish", copy, "--repo", "me/mine")
    assert "hf auth login" in client.fails(1, *publish, token="")
    assert "does not accept the token (401)" in client.fails(1, *publish, token="hf_of_nobody")
    assert "no right" in client.fails(1, *publish, token=READ)
    assert "no right" in client.fails(1, *publish, token=STRANGER)
    client.works(*publish)
    assert "(403)" in client.fails(1, *publish, "--license", "mit", token=READ)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--repo", "mine", "user/name"),
        ("--repo", "me/../../etc", "repo"),
        ("--repo", "me/a--b", "--"),
        ("--repo", "me/a\nb", "repo"),
        ("--repo", "me/[x](y)", "alphanumeric"),
        ("--branch", "a b", "branch"),
        ("--branch", "../main", "branch"),
        ("--branch", "refs/pr/1", "branch"),
    ],
)
def test_names_that_cannot_be(client, copy, option, value, said):
    arguments = {"--repo": "me/x"} | {option: value}
    line = client.fails(2, "publish", copy, *(part for pair in arguments.items() for part in pair))
    assert said in line
    assert not copy.with_name("masked.publish").exists()


def test_a_licence_that_the_hub_does_not_know_is_refused_before_the_upload(hub, client, copy):
    puts = len(hub.puts)
    line = client.fails(1, "publish", copy, "--repo", "me/licence", "--license", "My Own: [terms]")
    assert "license" in line
    assert len(hub.puts) == puts
    assert hub.commits("me/licence") == ["initial commit"]


def test_files_of_others_are_left_alone(hub, client, copy):
    hub.create("me/theirs")
    hub.write("me/theirs", "data/train.csv", b"a,b\n")
    assert "data/train.csv" in client.fails(2, "publish", copy, "--repo", "me/theirs")
    client.fails(2, "publish", copy, "--repo", "me/theirs", "--branch", "new")
    assert list(hub.repos["me/theirs"]["branches"]) == ["main"]
    client.works("publish", copy, "--repo", "me/ours")
    hub.write("me/ours", "data/part-99999.parquet", b"PAR1")
    assert "data/part-99999.parquet" in client.fails(2, "publish", copy, "--repo", "me/ours")


def test_unfinished_and_wrong_folders(client, copy, tmp_path):
    world = make_world()
    assert "written by 'encode'" in client.fails(2, "publish", world.tokens, "--repo", "me/x", "--dry-run")
    assert "no such folder" in client.fails(2, "publish", tmp_path / "none", "--repo", "me/x", "--dry-run")
    (copy / "manifest.json").unlink()
    assert "unfinished" in client.fails(1, "publish", copy, "--repo", "me/x", "--dry-run")


def test_without_a_network(client, copy, tmp_path):
    for arguments, environment, said in (
        (("publish", copy, "--repo", "me/x"), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        (
            ("pull", "me/x", "--out", tmp_path / "x"),
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "does not answer at http://127.0.0.1:9",
        ),
    ):
        done = client.separately(*arguments, **environment)
        assert done.returncode == 1
        assert len(messages(done.stderr)) == 1, done.stderr
        assert said in done.stderr
        assert client.token not in done.stderr


def test_the_page_of_its_tokens_goes_with_it(hub, client, masked, tmp_path):
    prepared = tmp_path / "prepared"
    client.works("publish", masked, "--repo", "me/page", "--with-report", "--out", prepared)
    files = hub.files("me/page")
    assert files["report.html"].startswith(b"<!doctype html>")
    assert b'<h1 id="summary-title">page</h1>' in files["report.html"]
    assert str(tmp_path).encode() not in files["report.html"]
    assert b"[report.html](resolve/main/report.html" in files["README.md"]
    client.works("pull", "me/page", "--out", tmp_path / "pulled")
    client.works("publish", masked, "--repo", "me/page", "--out", prepared)
    assert "report.html" not in hub.files("me/page")
