"""Input made to harm: text that drives a terminal, files that claim to be huge, links and names that lead elsewhere."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sstoken.pipeline import api
from tests.pipeline.small_run import environment
from tests.pipeline.worlds import CommandLine, World, make_world
from tests.support import PATIENCE, ROOT

EVIL = "\x1b[31m\x1b]0;title\x07\x9b2J\u202etxt\u2066\u200b\r\b\x00\u2028"
_HARMFUL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202f\u2060-\u206f]")
SECRET = "planted-4f1d09c2"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "WANDB_API_KEY")


@pytest.fixture
def world() -> World:
    return make_world()


def rows(path: Path, *found: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.mark.parametrize("where", ["text", "id", "column", "option", "template", "path"])
def test_nothing_printed_drives_the_terminal(
    where: str, world: World, cli: CommandLine, tmp_path: Path
) -> None:
    good = {"question": "w1 w2", "answer": "w3 w4"}
    data, more = tmp_path / "data.jsonl", []
    if where == "text":
        rows(data, {"question": f"w1 {EVIL}", "answer": f"w3 {EVIL}"}, {"question": EVIL, "answer": EVIL})
    elif where == "id":
        rows(data, good | {"example_id": EVIL}, {"question": "w1", "answer": 3, "example_id": EVIL})
    elif where == "column":
        rows(data, {f"q{EVIL}": "w1", f"a{EVIL}": "w2"})
    elif where == "option":
        rows(data, good)
        more = ["--format", EVIL.replace("\x00", "")]
    elif where == "template":
        rows(data, good)
        template = tmp_path / "evil.jinja"
        template.write_text("{{ raise_exception('" + EVIL.replace("\r", "").replace("\u2028", "") + "') }}")
        more = ["--chat-template", template]
    else:
        data = tmp_path / ("data" + EVIL.replace("\x00", ""))
    outcome = cli(
        "encode", "--data", data, "--model", world.base, "--out", tmp_path / "out", "--workers", 1, *more
    )
    assert not _HARMFUL.search(outcome.out + outcome.err), repr(outcome.out + outcome.err)
    assert "Traceback" not in outcome.err


def test_no_verb_prints_what_drives_the_terminal(world: World, cli: CommandLine, tmp_path: Path) -> None:
    """Names of files, columns, examples, datasets: wherever one is printed."""
    name = EVIL.replace("\x00", "").replace("\r", "")
    out, base = tmp_path / f"o{name}", tmp_path / f"b{name}"
    shutil.copytree(world.base, base)
    some = [
        {"question": f"w{i} {EVIL}", "answer": f"w{i} w9", "example_id": f"{i}{EVIL}", EVIL: 1}
        for i in range(6)
    ]
    data = rows(tmp_path / f"d{name}.jsonl", *some, {"question": "w1", "answer": 3})
    encode = (
        "encode",
        "--data",
        data,
        "--model",
        base,
        "--workers",
        1,
        "--on-bad-row",
        "skip",
        "--out",
        out / "t",
    )
    score = (
        "score",
        "--tokens",
        out / "t",
        "--ckpt",
        f"a={base}",
        "--ckpt",
        f"b={world.later}",
        "--out",
        out / "s",
    )
    select = ("select", "--tokens", out / "t", "--scores", out / "s", "--history", "a", "--current", "b")
    commands = [
        encode,
        encode,
        (*encode, "--max-length", 9),
        score,
        (*select, "--out", out / "m"),
        (*select, "--method", "random", "--out", out / "r"),
        ("compare", f"x{name}={out}/m", out / "r"),
        ("critical", "--tokens", out / "t", "--ckpt", base, "--checker", "exact", "--out", out / "c"),
        ("audit", data, "--model", base),
        ("audit", out / "t"),
        ("audit", out / "m"),
        ("show", out / "m", "--rows", 9),
        ("report", out / "m", "--out", out / "r.html"),
        ("export", out / "m", "--to", "trl", "--out", out / "e"),
        ("publish", out / "m", "--repo", "me/it", "--dry-run", "--out", out / "p"),
        ("init", "--model", base, "--data", data, "--out", out / "run", "--file", out / "run.yaml"),
        ("plan", out / "run.yaml"),
        ("verify", out),
    ]
    for command in commands:
        outcome = cli(*command)
        assert not _HARMFUL.search(outcome.out + outcome.err), (command[0], outcome)
        assert "Traceback" not in outcome.err
        (out / "m" / f"stray{name}").touch() if command[0] == "publish" else None
    assert outcome.code == 1


def test_lines_are_printed_by_one_function() -> None:
    """It escapes them; what paints in colours, and progress, are the others, which escape by themselves."""
    own = {"saying.py", "progress.py", "first_example.py", "audit_screen.py", "demo/run.py", "cli.py"}
    for path in (ROOT / "pipeline").rglob("*.py"):
        calls = re.findall(r"(?<![\w.])(?:print|click\.echo|console\.print)\(", path.read_text())
        assert not calls or path.relative_to(ROOT / "pipeline").as_posix() in own, path


def test_a_parquet_file_that_claims_rows_without_end(world: World, cli: CommandLine, tmp_path: Path) -> None:
    table = pa.table({"question": ["w1"], "answer": ["w2"]})
    file = tmp_path / "data.parquet"
    pq.write_table(table, file, store_schema=False)
    content = file.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - length : -8]
    claimed = footer.replace(b"\x16\x02\x19", b"\x16" + b"\x80" * 8 + b"\x20\x19", 1)  # 2^60 rows
    assert claimed != footer
    file.write_bytes(content[: -8 - length] + claimed + len(claimed).to_bytes(4, "little") + b"PAR1")
    assert pq.read_metadata(file).num_rows == 1 << 60
    outcome = cli("encode", "--data", file, "--model", world.base, "--out", tmp_path / "out", "--workers", 1)
    assert "Traceback" not in outcome.err
    assert outcome.code == 1, outcome
    assert "data.parquet" in outcome.err
    shard = tmp_path / "tokens"
    shutil.copytree(world.tokens, shard)
    (shard / "part-00000.parquet").write_bytes(file.read_bytes())
    line = cli.fails(1, "score", "--tokens", shard, "--ckpt", world.base, "--out", tmp_path / "scores")
    assert "part-00000.parquet" in line


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_a_parquet_file_that_claims_more_rows_than_it_holds(
    on_bad_row: str, world: World, cli: CommandLine, tmp_path: Path
) -> None:
    """A few more: the rows that are missing are not left out in silence."""
    file = tmp_path / "data.parquet"
    pq.write_table(pa.table({"question": ["w1"], "answer": ["w2"]}), file, store_schema=False)
    content = file.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - length : -8].replace(b"\x16\x02\x19", b"\x16\x64\x19", 1)  # 50 rows in the file
    last = footer.rindex(b"\x16\x02")
    footer = footer[:last] + b"\x16\x64" + footer[last + 2 :]  # and in its row group
    file.write_bytes(content[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    assert pq.read_metadata(file).row_group(0).num_rows == 50
    encode = ("encode", "--data", file, "--model", world.base, "--out", tmp_path / "out", "--workers", 1)
    line = cli.fails(1, *encode, "--on-bad-row", on_bad_row)
    assert "claims 50 rows" in line


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz"])
def test_a_small_file_of_a_huge_text(kind: str, world: World, cli: CommandLine, tmp_path: Path) -> None:
    import gzip

    huge, file = "a" * 60_000_000, tmp_path / f"data.{kind}"
    row = {"question": "w1", "answer": huge}
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), file, compression="zstd", use_dictionary=False)
    else:
        file.write_bytes(gzip.compress(json.dumps(row).encode()))
    assert file.stat().st_size < 200_000
    line = cli.fails(
        1, "encode", "--data", file, "--model", world.base, "--out", tmp_path / "out", "--workers", 1
    )
    assert "row 0" in line or "line 1" in line
    assert "characters" in line


def test_names_that_lead_out_of_the_folder(world: World, cli: CommandLine, tmp_path: Path) -> None:
    for name in ("..", "../x", "a/../../x", "/x"):
        cli.fails(
            2,
            "score",
            "--tokens",
            world.tokens,
            "--ckpt",
            f"{name}={world.base}",
            "--out",
            tmp_path / "in/out",
        )
    data = rows(tmp_path / "data.jsonl", {"question": "w1 w2", "answer": "w3 w4", "example_id": "../../evil"})
    cli.works(
        "encode", "--data", data, "--model", world.base, "--out", tmp_path / "in/tokens", "--workers", 1
    )
    config = tmp_path / "run.yaml"
    config.write_text(
        f"out: in/run\nsteps:\n  ../../evil: {{stage: encode, data: {data}, model: {world.base}}}\n"
    )
    cli.fails(2, "plan", config)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "run.yaml", "in"}


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
def test_a_link_to_other_folders_is_not_followed_to_delete(
    name: str, world: World, cli: CommandLine, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "manifest.json").write_text("{}")
    (precious / "thesis").write_text("years of work")
    (tmp_path / name).symlink_to(precious)
    outcome = cli("select", "--tokens", world.tokens, "--scores", world.scores, "--out", tmp_path / "out")
    assert "Traceback" not in outcome.err
    assert (precious / "thesis").read_text() == "years of work"


def test_a_shard_that_is_a_link_elsewhere_is_read_only_if_it_is_what_was_written(
    world: World, cli: CommandLine, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    shutil.copytree(world.tokens, tokens)
    (tokens / "part-00000.parquet").unlink()
    (tokens / "part-00000.parquet").symlink_to(world.tokens / "part-00001.parquet")
    select = ("select", "--tokens", tokens, "--scores", world.scores, "--out", tmp_path / "out")
    assert "part-00000.parquet" in cli.fails(1, *select)


def test_secrets_of_the_environment_are_nowhere(
    world: World, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in what is printed nor in any file; nor those of an address, also where it fails."""
    for name in SECRETS:
        monkeypatch.setenv(name, SECRET)
    printed = []
    for command in (
        ("encode", "--data", world.data, "--model", world.base, "--workers", 1, "--out", tmp_path / "tokens"),
        (
            "anchor",
            "--tokens",
            tmp_path / "tokens",
            "--model",
            world.base,
            "--max-steps",
            1,
            "--out",
            tmp_path / "h",
        ),
        ("select", "--tokens", world.tokens, "--scores", world.scores, "--out", tmp_path / "masked"),
        ("export", tmp_path / "masked", "--to", "trl", "--out", tmp_path / "export"),
        ("publish", tmp_path / "masked", "--repo", "me/it", "--dry-run", "--out", tmp_path / "published"),
        ("doctor",),
        (
            "encode",
            "--data",
            f"https://me:{SECRET}@localhost:9/d.jsonl",
            "--model",
            world.base,
            "--out",
            tmp_path / "x",
        ),
        (
            "encode",
            "--data",
            f"s3://me:{SECRET}@nowhere/d.jsonl",
            "--model",
            world.base,
            "--out",
            tmp_path / "y",
        ),
    ):
        outcome = cli(*command)
        printed.append(outcome.out + outcome.err)
        assert outcome.code == 0 or "://" in str(command[2]), outcome
    assert SECRET not in "".join(printed)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_no_socket_is_opened_unasked(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was tried")

    for name in ("connect", "connect_ex", "bind", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    api.encode(data=str(world.data), model=str(world.base), out=tmp_path / "tokens", workers=1)
    api.anchor(tokens=tmp_path / "tokens", model=str(world.base), out=tmp_path / "history", max_steps=1)
    api.score(tokens=world.tokens, checkpoints=[str(tmp_path / "history/step-1")], out=tmp_path / "scores")
    api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "masked")
    api.export(masked=tmp_path / "masked", to="trl", out=tmp_path / "export")
    assert api.verify(tmp_path)[1] == []


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="may make no network namespace",
)
def test_the_command_line_needs_no_network(world: World, tmp_path: Path) -> None:
    """In a namespace without a route, nor a loopback that is up."""
    copied = tmp_path / "base"
    shutil.copytree(world.base, copied)
    for command in (
        ("encode", "--data", world.data, "--model", copied, "--out", "tokens", "--workers", "1"),
        ("score", "--tokens", "tokens", "--ckpt", copied, "--out", "scores"),
        ("select", "--tokens", "tokens", "--scores", "scores", "--method", "random", "--out", "masked"),
        ("export", "masked", "--to", "trl", "--out", "export"),
        ("verify", "."),
    ):
        done = subprocess.run(
            ["unshare", "-rn", sys.executable, "-m", "sstoken.pipeline", *map(str, command)],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, (command[0], done.stderr)


def test_files_have_the_users_umask(world: World, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        api.encode(data=str(world.data), model=str(world.base), out=tmp_path / "tokens", workers=1)
        api.anchor(tokens=tmp_path / "tokens", model=str(world.base), out=tmp_path / "history", max_steps=1)
        api.select(tokens=world.tokens, scores=world.scores, out=tmp_path / "masked")
        api.export(masked=tmp_path / "masked", to="trl", out=tmp_path / "export")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        expected = 0o750 if path.is_dir() else 0o640
        if not path.name.endswith(".lock"):
            assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_pickles_are_not_loaded(world: World, cli: CommandLine, tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    model = tmp_path / "model"
    shutil.copytree(world.base, model)
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (model / "training_args.bin").write_bytes(pickle.dumps(Bomb()))
    cli.works(
        "score", "--tokens", world.tokens, "--ckpt", model, "--out", tmp_path / "scores"
    )  # safetensors are there
    (model / "model.safetensors").unlink()
    for verb in (
        ("score", "--tokens", world.tokens, "--ckpt"),
        ("anchor", "--tokens", world.tokens, "--model"),
    ):
        assert "pickled" in cli.fails(1, *verb, model, "--out", tmp_path / verb[0])
    assert not (tmp_path / "exploded").exists()
