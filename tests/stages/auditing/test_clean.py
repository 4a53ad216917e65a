"""Sound datasets give no finding."""

import json
from pathlib import Path
from typing import Any

import pytest

from sstoken.stages.auditing.run import audit
from sstoken.stages.encoding.chat import ChatEncoder
from sstoken.stages.encoding.messages import BadRow
from tests.stages.auditing import datasets
from tests.stages.encoding import real_templates
from tests.stages.encoding.conversation_kinds import MORE, SHOWN

KNOWN = {
    "chatml": datasets.chatml,
    "llama3": datasets.llama3,
    "mistral": datasets.mistral,
    "llama2": datasets.llama2,
}


def kinds(result: Any) -> dict[str, int]:
    return {finding.kind: finding.rows for finding in result.findings}


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("name", KNOWN)
def test_sound_rows(name: str, turns: int, tmp_path: Path) -> None:
    tokenizer = KNOWN[name]()
    rows = datasets.sound(tokenizer, 6, turns)
    result = audit(rows, tokenizer=datasets.save(tokenizer, tmp_path))
    assert kinds(result) == {}
    assert result.facts["rows"] == 6
    assert result.facts["trained"] == sum(label != -100 for row in rows for label in row["labels"])
    assert set(result.facts["roles"]) >= {"user", "assistant"}
    assert result.facts["roles"]["user"]["trained"] == 0
    assert result.facts["ends"] == {
        "turns": 6 * turns,
        "end_trained": 6 * turns,
        "end_not_trained": 0,
        "end_missing": 0,
    }
    assert [turn["rows"] for turn in result.facts["turns"]] == [6] * turns


def test_a_blank_across_the_end_of_the_generation_prompt(tmp_path: Path) -> None:
    tokenizer = datasets.thinking()
    rows = datasets.sound(tokenizer, 6, 2)
    across, opens = tokenizer.convert_tokens_to_ids(["\n\n", "<think>"])
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        for start, _ in list(datasets.spans(labels)):
            first = max(i for i in range(start) if ids[i] == opens) + 1
            assert ids[first] == across
            labels[first:start] = ids[first:start]
    assert kinds(audit(rows, tokenizer=datasets.save(tokenizer, tmp_path))) == {}


STOPS = {
    "glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "muse_glimmer": ("<|eot|>", "<|eom|>"),
}
"""What generation_config.json of the real models says besides the tokenizer's EOS."""


def rows_of(encoder: ChatEncoder) -> list[dict[str, Any]]:
    """What the encoder makes of every kind of conversation that its template takes."""
    rows = []
    for kind, talk in (SHOWN | MORE).items():
        try:
            examples = encoder.encode(talk)
        except BadRow:
            continue
        rows += [{"input_ids": e.input_ids, "loss_mask": e.response_mask, "id": kind} for e in examples]
    return rows


FIRST = ("llama3", "qwen3", "gemma", "glm4moe", "glm4moe_training", "gptoss", "deepseek_r1_distill", "phi3")
OTHERS = sorted({*real_templates.names(), *real_templates.names(training=True)} - {*FIRST})


@pytest.mark.parametrize("name", [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_real_templates(name: str, tmp_path: Path) -> None:
    """What the encoder makes of real conversations is found sound, from its tokens alone."""
    pytest.importorskip("trl")
    tokenizer = real_templates.tokenizer(name)
    stops = STOPS.get(name.removesuffix("_training"), ())
    real_templates.write_model(name, tmp_path)
    ids = [i for i in tokenizer.convert_tokens_to_ids(list(stops)) if i is not None]
    if ids:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    rows = rows_of(ChatEncoder(tokenizer, stop_tokens=stops))
    assert rows
    result = audit(rows, model=str(tmp_path))
    for finding in result.findings:
        if finding.severity != "note":
            print(finding.kind, finding.rows, finding.detail, finding.example)
    assert [f.kind for f in result.findings if f.severity != "note"] == []
    assert result.facts["turns_known"]
    assert result.facts["examples_without_turns"] == 0
