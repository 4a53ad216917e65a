"""Each fault is found where it is, and nothing else is."""

import json
from pathlib import Path

import pytest

from sstoken.stages.auditing import audit
from sstoken.stages.auditing.findings import AuditResult
from tests.stages.auditing import datasets
from tests.stages.auditing.datasets import Row
from tests.stages.auditing.faults import FAULTS, THIRD, Make

ALSO = {"end-missing": {"end-inside"}, "turns-not-found": {"end-missing"}}
"""What some faults are besides."""
CASES = [
    pytest.param(kind, tokenizer, make, id=f"{kind}-{n}")
    for kind, cases in FAULTS.items()
    for n, (tokenizer, make) in enumerate(cases)
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    names = ("chatml", "llama3", "mistral", "glm4")
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
    assert finding.example.row == THIRD or kind == "near-duplicate-answers"
    start, stop = finding.example.focus
    if stop > start:
        assert finding.example.first <= start
        assert finding.example.tokens
    assert json.loads(json.dumps(result.to_dict()))["findings"]
