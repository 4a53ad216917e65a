"""Each fault is found where it is, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import pytest

from sstoken.stages.auditing.findings import KINDS, AuditResult
from sstoken.stages.auditing.run import audit
from tests.stages.auditing import datasets
from tests.stages.auditing.datasets import Row
from tests.stages.auditing.faults import FAULTS, THIRD, Make
from tests.support import ROOT

ALSO = {"end-missing": {"end-inside"}, "turns-not-found": {"end-missing"}}
"""What some faults are besides."""
CASES = [
    pytest.param(kind, tokenizer, make, id=f"{kind}-{n}")
    for kind, cases in FAULTS.items()
    for n, (tokenizer, make) in enumerate(cases)
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    names = sorted({tokenizer for cases in FAULTS.values() for tokenizer, _ in cases})
    return {name: datasets.save(getattr(datasets, name)(), tmp_path_factory.mktemp(name)) for name in names}


def write(rows: list[Row], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kinds(result: AuditResult) -> dict[str, int]:
    return {finding.kind: finding.rows for finding in result.findings}


@pytest.mark.parametrize(("kind", "tokenizer", "make"), CASES)
def test_a_fault_is_found_alone(
    kind: str, tokenizer: str, make: Make, tokenizers: dict[str, str], tmp_path: Path
) -> None:
    result = audit(write(make(), tmp_path / "data.jsonl"), tokenizer=tokenizers[tokenizer])
    found = kinds(result)
    assert found.pop(kind) == 1
    assert set(found) <= ALSO.get(kind, set())
    finding = next(f for f in result.findings if f.kind == kind)
    assert finding.example is not None
    assert finding.example.row == THIRD or kind == "near-duplicate-answers" or result.facts["rows"] == 1
    start, stop = finding.example.focus
    if stop > start:
        assert finding.example.first <= start
        assert finding.example.tokens
    assert json.loads(json.dumps(result.to_dict()))["findings"]


def masked(rows: list[Row], keep: Any) -> list[Row]:
    """Rows as `select` writes them: what is kept of each response."""
    found = []
    for row in rows:
        response = [label != -100 for label in row["labels"]]
        kept = keep(response)
        labels = [i if k else -100 for i, k in zip(row["input_ids"], kept, strict=True)]
        found.append(
            {"input_ids": row["input_ids"], "labels": labels, "keep_mask": kept, "response_mask": response}
        )
    return found


def without_ends(response: list[bool]) -> list[bool]:
    return [r and (i + 1 < len(response) and response[i + 1]) for i, r in enumerate(response)]


def test_selections(tokenizers: dict[str, str]) -> None:
    rows = datasets.sound(datasets.chatml(), 6, 2)
    place = tokenizers["chatml"]
    half = masked(rows, lambda response: [r and i % 2 == 0 for i, r in enumerate(response)])
    assert set(kinds(audit(half, tokenizer=place))) <= {"turn-ends-dropped"}
    assert kinds(audit(masked(rows, without_ends), tokenizer=place)) == {"turn-ends-dropped": 6}
    half[THIRD] = masked(rows[:1], lambda response: [False] * len(response))[0]
    assert kinds(audit(half, tokenizer=place))["nothing-kept"] == 1


def test_a_tokenizer_that_changes_text(tmp_path: Path) -> None:
    """Its normalizer makes small letters of great ones."""
    from tokenizers import normalizers

    from tests.factories import byte_tokenizer

    tokenizer = byte_tokenizer(
        ["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", chat_template=datasets.CHATML
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    data = write([{"messages": datasets.talk(i)} for i in range(3)], tmp_path / "data.jsonl")
    found = kinds(audit(data, model=datasets.save(tokenizer, tmp_path / "model")))
    assert found == {"text-normalized": 3}


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_a_fault_of_every_row(name: str, tokenizers: dict[str, str]) -> None:
    tokenizer = getattr(datasets, name)()
    sound = datasets.sound(tokenizer, 6, 2)

    def found(change: Any) -> dict[str, int]:
        return kinds(audit([change(row) for row in sound], tokenizer=tokenizers[name]))

    def labelled(row: Row, labels: list[int]) -> Row:
        return row | {"labels": labels}

    def without_end(row: Row) -> Row:
        return {key: values[:-1] for key, values in row.items()} if row["labels"][-1] != -100 else {
            key: values[:-2] for key, values in row.items()
        }  # fmt: skip

    assert found(lambda row: labelled(row, [-100] * len(row["labels"]))) == {"nothing-trained": 6}
    assert found(lambda row: labelled(row, row["input_ids"])) == {"everything-trained": 6}
    assert found(lambda row: labelled(row, [*row["labels"][1:], -100])) == {"labels-shifted": 6}
    mask = lambda row: [int(label != -100) for label in row["labels"]]
    early = found(lambda row: {"input_ids": row["input_ids"], "loss_mask": [*mask(row)[1:], 0]})
    # Behind Mistral's `[/INST]` the mask then begins at a blank, which may as well be a part of the answer.
    assert early == {"end-not-trained" if name == "mistral" else "mask-shifted": 6}
    assert found(without_end) == {"end-missing": 6}
    end = tokenizer.eos_token_id
    ends = [[-100 if label == end else label for label in row["labels"]] for row in sound]
    rows = [labelled(row, labels) for row, labels in zip(sound, ends, strict=True)]
    assert kinds(audit(rows, tokenizer=tokenizers[name])) == {"end-not-trained": 6}


def test_bos_behind_a_header_that_stops_generation(tmp_path: Path) -> None:
    """Phi-3's generation_config.json lists `<|assistant|>`."""
    tokenizer = datasets.phi3()
    place = datasets.save(tokenizer, tmp_path)
    stops = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    rows = datasets.sound(tokenizer, 6, 2)
    assert kinds(audit(rows, model=place)) == {}
    start, _ = next(datasets.spans(rows[THIRD]["labels"]))
    rows[THIRD]["input_ids"].insert(start, tokenizer.bos_token_id)
    rows[THIRD]["labels"].insert(start, -100)
    assert kinds(audit(rows, model=place)) == {"bos-inside": 1}


def test_only_the_last_turn_is_trained(tokenizers: dict[str, str]) -> None:
    rows = datasets.sound(datasets.chatml(), 6, 3)
    for row in rows:
        first = [stop for _, stop in datasets.spans(row["labels"])][-2]
        row["labels"][:first] = [-100] * first
    found = audit(rows, tokenizer=tokenizers["chatml"])
    assert kinds(found) == {}
    assert [turn["trained"] > 0 for turn in found.facts["turns"]] == [False, False, True]


ELSEWHERE = {
    "tests/pipeline/test_audit.py": {"no-labels", "labels-not-shifted", "signal-missing", "signal-constant"},
    "tests/stages/auditing/test_conversations.py": {
        "reasoning-dropped", "system-dropped", "tools-dropped", "tool-calls-dropped", "content-dropped",
        "uncertain-mask", "template-refuses", "special-token-in-text", "needs-decision", "bad-row", "no-chat-template",
        "names-dropped", "turn-not-marked", "answers-cut", "answers-lost", "changed-by-tokenizer",
    },
    "tests/stages/auditing/test_faults.py": {"nothing-kept", "turn-ends-dropped", "text-normalized"},
}  # fmt: skip


def test_each_kind_has_a_test() -> None:
    tested = set(FAULTS)
    for path, names in ELSEWHERE.items():
        tested |= names
        source = (ROOT / path).read_text()
        assert all(name in source for name in names)
    assert set(KINDS) == tested
