"""What is fuzzed: every reader of files from outside. It reads them or refuses them in one line, and nothing else."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from sstoken.errors import SstokenError
from sstoken.stages import tables
from sstoken.stages.encoding import row_files
from sstoken.stages.encoding.conversations import to_conversation
from sstoken.stages.encoding.layouts import detect_layout
from sstoken.stages.encoding.messages import BadRow
from tests.support import ROOT

CORPUS = Path(__file__).parent / "corpus"
LONGEST_LINE = 2000
"""Characters of an error."""


class Misbehaviour(Exception):  # noqa: N818
    """An error that is more than one readable line."""


@contextlib.contextmanager
def _refusing(where: str) -> Iterator[None]:
    try:
        yield
    except BadRow as error:
        _check(str(error))
    except SstokenError as error:
        _check(str(error))
        if where not in str(error):
            raise Misbehaviour(f"does not name {where}: {error}") from error


def _check(message: str) -> None:
    if "\n" in message or len(message) > LONGEST_LINE or not message:
        raise Misbehaviour(repr(message[:300]))


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="sstoken-fuzz-"))


def _written(content: bytes, name: str) -> Path:
    file = _folder() / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def config(content: bytes) -> None:
    """A run's YAML."""
    from sstoken.pipeline.config import load_config

    with _refusing("run.yaml"):
        load_config(_written(content, "run.yaml"))


def manifest(content: bytes) -> None:
    """A folder's manifest, and the look at a file of that folder."""
    from sstoken.stages import folders, listed_files
    from sstoken.stages.manifest import problems, read_manifest

    file = _written(content, "tokens/manifest.json")
    with _refusing("manifest.json"):
        found = read_manifest(file.parent)
        if found is not None:
            list(problems(file.parent, found, checksums=False))
        listed_files.listed(file.parent / "part-00000.parquet")
        folders.listed_in(file.parent)


def shard(content: bytes) -> None:
    """A shard, as stages read it."""
    file = _written(content, "shards/part-00000.parquet")
    for read in (tables.read_metadata, tables.columns, tables.num_rows, tables.is_sound, tables.read_table):
        with _refusing("part-00000.parquet"):
            read(file)


def _rows(content: bytes, name: str) -> None:
    layout = None
    with _refusing("data"), open(_written(content, name), "rb") as stream:
        for number, parsed in enumerate(row_files.read(stream, name)):
            if number > 200:
                break
            if parsed.problem is not None or not isinstance(parsed.value, dict):
                continue
            with contextlib.suppress(SstokenError), _refusing(""):
                layout = layout or detect_layout(parsed.value)
                to_conversation(parsed.value, layout)


def jsonl(content: bytes) -> None:
    """Rows as JSON lines."""
    _rows(content, "data.jsonl")


def json_rows(content: bytes) -> None:
    """Rows as one JSON value."""
    _rows(content, "data.json")


def csv(content: bytes) -> None:
    """Rows as CSV."""
    _rows(content, "data.csv")


def parquet(content: bytes) -> None:
    """Rows as Parquet."""
    _rows(content, "data.parquet")


def safetensors(content: bytes) -> None:
    """Weights: their header."""
    from sstoken.stages.weight_files import weight_files

    file = _written(content, "model/model.safetensors")
    with _refusing("model"):
        weight_files(file.parent)


def index(content: bytes) -> None:
    """A checkpoint's index of weight files, its configuration and an adapter's."""
    from sstoken.stages import checkpoints

    for name in ("model.safetensors.index.json", "config.json", "adapter_config.json"):
        file = _written(content, f"{name}.d/{name}")
        with _refusing(file.parent.name):
            checkpoints.check_loadable(str(file.parent))


def history(content: bytes) -> None:
    """A history's index."""
    from sstoken.stages.training.history_index import read_history

    file = _written(content, "history/history.json")
    with _refusing("history"):
        read_history(file.parent)


def remembered(content: bytes) -> None:
    """Files of a run that only remember: digests, the run's mark, a lease, a rank's job."""
    from sstoken.pipeline import claim, lease, ranks
    from sstoken.stages.manifest import Digests

    Digests(_written(content, "digests.json"))
    lease.holder(_written(content, ".out.lease"))
    for name, read in (("run.json", claim._read), (".job.json", ranks._read_record)):
        with _refusing(name):
            read(_written(content, name))


def provenance(content: bytes) -> None:
    """What a published dataset says of itself."""
    from sstoken.stages.hub.provenance import read_provenance

    with _refusing("provenance.json"):
        read_provenance(_written(content, "provenance.json"))


@cache
def _tokenizer() -> Any:
    from tests.factories import word_tokenizer

    return word_tokenizer()


def template(content: bytes) -> None:
    """A chat template."""
    from sstoken.stages.encoding import chat

    text = content.decode(errors="replace")
    conversation = to_conversation(
        {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]},
        detect_layout({"messages": []}),
    )
    with contextlib.suppress(SstokenError), _refusing(""):
        encoder = chat.ChatEncoder(_tokenizer(), chat.EncoderOptions(64, text))
        encoder.encode(conversation)


def tokenizer(content: bytes) -> None:
    """A tokenizer's file."""
    from sstoken.stages.checkpoints import load_tokenizer

    file = _written(content, "tokenizer/tokenizer.json")
    _written(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}).encode(),
             "tokenizer/tokenizer_config.json")  # fmt: skip
    with _refusing("tokenizer"):
        load_tokenizer(str(file.parent))


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (
        config, manifest, shard, jsonl, json_rows, csv, parquet, safetensors, index, history, remembered, provenance,
        template, tokenizer,
    )
}  # fmt: skip


def seeds(folder: Path) -> None:
    """Write a valid file of each kind, from which mutations begin."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.factories import save_model

    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": i}
        for i in (1, 2)
    ]

    def seed(target: str, content: bytes | str, name: str = "seed") -> None:
        place = folder / target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content.encode() if isinstance(content, str) else content)

    for number, file in enumerate(sorted((ROOT / "examples").glob("*.yaml"))[:3]):
        seed("config", file.read_bytes(), f"seed-{number}")
    seed("config", "out: out\nencode: {data: d.jsonl, model: m}\nselect: {rho: 0.3}\n")
    seed("jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    seed("json_rows", json.dumps(rows))
    seed("csv", 'prompt,completion\n"a, b",c\nd,e\n')
    work = _folder() / "seeds"
    work.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), work / "rows.parquet")
    seed("parquet", (work / "rows.parquet").read_bytes())
    tokens = pa.table(
        {"example_id": ["a"], "input_ids": [[1, 2]], "response_mask": [[False, True]]}, tables.TOKENS
    )
    tables.write_part(work / "part-00000.parquet", tokens, {"kind": "tokens"})
    seed("shard", (work / "part-00000.parquet").read_bytes())
    model = save_model(work / "model")
    weights = (model / "model.safetensors").read_bytes()
    seed("safetensors", weights[: 8 + int.from_bytes(weights[:8], "little") + 64])
    seed("index", (model / "config.json").read_bytes())
    seed("index", '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}', "index")
    seed("index", '{"base_model_name_or_path": "../x", "peft_type": "LORA"}', "adapter")
    seed("tokenizer", (model / "tokenizer.json").read_bytes())
    seed("template", "{% for m in messages %}{{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}")
    seed(
        "history",
        '[{"name": "step-0", "path": "b", "step": 0, "tokens_seen": 0, "loss": null, "kind": "reference"}]',
    )
    seed("remembered", '{"data": {"place": "a", "content": "b"}, "model": {"place": "m", "content": "c"}}')
    seed(
        "remembered",
        '{"digest": "x", "known": {}, "stage": "score", "settings": {}, "inputs": {}, "seed": 0}',
        "job",
    )
    made = {"stage": "encode", "fingerprint": "f", "settings": {}, "seed": 0, "inputs": {}, "sources": {}}
    made |= {
        "version": "1",
        "seconds": 0.1,
        "metrics": {},
        "files": [{"path": "a", "bytes": 1, "sha256": "0" * 64}],
    }
    seed("manifest", json.dumps(made))
    seed("provenance", json.dumps({"version": "1", "masked": {}, "metrics": {}, "files": [], **made}))
