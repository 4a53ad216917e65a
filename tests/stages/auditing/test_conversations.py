"""Raw conversations: sound ones are silent, and each loss or refusal of a chat template is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import PreTrainedTokenizerFast

from sstoken.errors import SstokenError, UsageError
from sstoken.stages.auditing.findings import AuditResult
from sstoken.stages.auditing.run import audit
from tests.factories import byte_tokenizer
from tests.stages.auditing import datasets
from tests.stages.encoding import real_templates

TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
CALL = {"type": "function", "id": "call12345", "function": {"name": "look", "arguments": {"at": "it"}}}
ONLY_TALK = (
    "{% for m in messages if m['role'] in ('user', 'assistant') %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{{ m['content'] }}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ONE_LINE = datasets.CHATML.replace("m['content'] or ''", "(m['content'] or '').split('\\n')[0]")
ALL_AT_ONCE = "{{ messages | map(attribute='content') | sort | join(' ') }}{{ eos_token }}"
MARKED = datasets.CHATML.replace(
    "{{ m['content'] or '' }}",
    "{% if m['role'] == 'assistant' %}{{ m['content'][:3] }}{% generation %}{{ m['content'][3:] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}",
)


def kinds(result: AuditResult) -> dict[str, int]:
    return {finding.kind: finding.rows for finding in result.findings}


def model(folder: Path, template: str | None = datasets.CHATML, **settings: object) -> str:
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer(special, **{"eos_token": "<|im_end|>", "chat_template": template} | settings)
    return datasets.save(tokenizer, folder / "model")


def rows(change: Callable[[dict[str, Any]], Any] = lambda row: None) -> list[dict[str, Any]]:
    """Six rows, the third of which is changed."""
    found: list[dict[str, Any]] = [{"messages": datasets.talk(i, 2)} for i in range(6)]
    change(found[2])
    return found


def write(data: list[dict[str, Any]], folder: Path) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


def test_sound_conversations(tmp_path: Path) -> None:
    result = audit(write(rows(), tmp_path), model=model(tmp_path))
    assert kinds(result) == {}
    assert result.form == "conversations"
    assert result.facts["refused"] == {}
    assert sum(result.facts["proof"].values()) == 6
    assert [turn["rows"] for turn in result.facts["turns"]] == [6, 6]
    assert result.facts["roles"]["user"]["trained"] == 0


QWEN3 = ["qwen3", "qwen3_5_think", "qwen3_5_nothink"]
CLEAN = ["llama3", "llama3_1", *QWEN3, "gemma", "gemma3", "glm4moe", "gptoss", "deepseek_r1_distill", "deepseekv3",
         "phi3", "phi3_5"]  # fmt: skip


@pytest.mark.parametrize("name", CLEAN)
def test_sound_conversations_of_real_templates(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    result = audit(write(rows(), tmp_path), model=real_model(name, tmp_path))
    assert kinds(result) == {}
    assert result.facts["turns_known"]


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("name", ["mistral", "mistral_tools", "llama2", "phi4"])
def test_sound_conversations_of_other_templates(name: str, turns: int, tmp_path: Path) -> None:
    data = [{"messages": datasets.talk(i, turns)} for i in range(6)]
    result = audit(write(data, tmp_path), model=datasets.save(getattr(datasets, name)(), tmp_path / "model"))
    assert kinds(result) == {}
    assert result.facts["turns_known"]


TEMPLATES_WITH_TOOLS = [
    "mistral_tools",
    "llama3_1",
    "qwen3",
    "qwen3_5_think",
    "glm4moe",
    "gptoss",
    "deepseekv3",
    "deepseek_r1_distill",
]
REASONERS = ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "glm4moe", "gptoss"]


def real_model(name: str, folder: Path) -> str:
    """The template's tokenizer, with the stop tokens of the real model."""
    if name == "mistral_tools":
        return datasets.save(datasets.mistral_tools(), folder / "model")
    real_templates.write_model(name, folder / "model")
    stops = {
        "glm4moe": ["<|endoftext|>", "<|user|>", "<|observation|>"],
        "gptoss": ["<|return|>", "<|call|>"],
    }
    if name in stops:
        ids = real_templates.tokenizer(name).convert_tokens_to_ids(stops[name])
        (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return str(folder / "model")


@pytest.mark.parametrize("name", TEMPLATES_WITH_TOOLS)
def test_sound_conversations_with_tools(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    data = rows()
    for row in data:
        with_call(row)
        with_tools(row)
    for number, row in enumerate(data):
        row["messages"][1]["content"] = ""
        row["messages"][3]["content"] = " ".join(datasets.WORDS[number : number + 4])
    result = audit(write(data, tmp_path), model=real_model(name, tmp_path))
    assert {f.kind: f.detail for f in result.findings} == {}
    assert result.facts["parts"]["tool_calls"]["trained"] > 0
    assert result.facts["roles"]["tool"] == result.facts["roles"]["tool"] | {"trained": 0}


@pytest.mark.parametrize("name", REASONERS)
def test_sound_conversations_with_reasoning(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    data = [{"messages": datasets.talk(i)} for i in range(6)]
    for number, row in enumerate(data):
        row["messages"][1]["reasoning_content"] = f"I wonder about {datasets.WORDS[number]}."
    result = audit(write(data, tmp_path), model=real_model(name, tmp_path))
    expected = {"end-in-next-header-alone"} if name == "glm4moe" else set()
    assert {f.kind for f in result.findings} == expected
    assert result.facts["parts"]["reasoning"]["trained"] > 0


def thinks(row: dict[str, Any]) -> None:
    row["messages"][1]["reasoning_content"] = "I wonder about it."


def with_system(row: dict[str, Any]) -> None:
    row["messages"].insert(0, {"role": "system", "content": "Speak briefly."})


def with_tools(row: dict[str, Any]) -> None:
    row["tools"] = [TOOL]


def with_call(row: dict[str, Any]) -> None:
    row["messages"][1]["tool_calls"] = [CALL]
    row["messages"].insert(
        2, {"role": "tool", "content": "seen", "tool_call_id": "call12345", "name": "look"}
    )
    row["messages"].insert(3, {"role": "assistant", "content": "I have looked at it."})


def with_second_line(row: dict[str, Any]) -> None:
    row["messages"][1]["content"] += "\nAnd more."


def with_token(row: dict[str, Any]) -> None:
    row["messages"][1]["content"] += "<|im_end|>"


def with_name(row: dict[str, Any]) -> None:
    row["messages"][0]["name"] = "Ada"


def without_answer(row: dict[str, Any]) -> None:
    del row["messages"][1:]


def with_rejected(row: dict[str, Any]) -> None:
    row["rejected"] = "No."


def twice_the_user(row: dict[str, Any]) -> None:
    row["messages"].insert(1, {"role": "user", "content": "And more?"})


REFUSING = (
    "{% for m in messages %}{% if not loop.first and m['role'] == 'user' and loop.previtem['role'] == 'user' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
) + datasets.CHATML
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "reasoning-dropped": (thinks, ONLY_TALK),
    "system-dropped": (with_system, ONLY_TALK),
    "tools-dropped": (with_tools, ONLY_TALK),
    "tool-calls-dropped": (with_call, ONLY_TALK),
    "content-dropped": (with_second_line, ONE_LINE),
    "special-token-in-text": (with_token, datasets.CHATML),
    "names-dropped": (with_name, datasets.CHATML),
    "bad-row": (without_answer, datasets.CHATML),
    "needs-decision": (with_rejected, datasets.CHATML),
    "template-refuses": (twice_the_user, REFUSING),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_found(kind: str, tmp_path: Path) -> None:
    change, template = FAULTS[kind]
    result = audit(write(rows(change), tmp_path), model=model(tmp_path, template))
    found = kinds(result)
    assert found.pop(kind) == 1
    assert set(found) <= ({"content-dropped"} if kind == "tool-calls-dropped" else set())
    finding = next(f for f in result.findings if f.kind == kind)
    assert finding.example is not None
    assert finding.example.row == 2
    assert finding.example.text() or kind == "names-dropped"
    assert finding.remedy


def test_what_a_template_shuffles_is_uncertain(tmp_path: Path) -> None:
    result = audit(write(rows(), tmp_path), model=model(tmp_path, ALL_AT_ONCE))
    assert {f.kind: f.rows for f in result.findings}["uncertain-mask"] == 6


def test_what_a_tokenizer_cannot_spell(tmp_path: Path) -> None:
    """Its alphabet is that of a few English texts; a letter beyond it becomes the unknown token."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    text = [message["content"] for i in range(10) for message in datasets.talk(i, 2)]
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend.train_from_iterator([*text, "user\nassistant"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>", chat_template=datasets.CHATML
    )

    def with_sharp_s(row: dict[str, Any]) -> None:
        row["messages"][1]["content"] += " Die Straße."

    place = datasets.save(tokenizer, tmp_path / "model")
    assert kinds(audit(write(rows(), tmp_path), model=place)) == {}
    result = audit(write(rows(with_sharp_s), tmp_path), model=place)
    assert kinds(result) == {"changed-by-tokenizer": 1}
    [finding] = result.findings
    assert finding.example is not None
    assert finding.example.row == 2
    assert "spell" in finding.detail


def test_a_half_marked_answer(tmp_path: Path) -> None:
    result = audit(write(rows(), tmp_path), model=model(tmp_path, MARKED))
    assert kinds(result)["turn-not-marked"] == 6


def test_no_chat_template(tmp_path: Path) -> None:
    assert kinds(audit(write(rows(), tmp_path), model=model(tmp_path, None))) == {"no-chat-template": 1}


def test_what_a_maximal_length_cuts(tmp_path: Path) -> None:
    data = rows()
    data[2]["messages"][1]["content"] = "word " * 400
    data[3]["messages"][0]["content"] = "word " * 400
    result = audit(write(data, tmp_path), model=model(tmp_path), max_length=1000)
    assert kinds(result) == {"answers-cut": 1, "answers-lost": 1}
    assert audit(write(data, tmp_path), model=model(tmp_path), max_length=9000).findings == []
    at = {w["length"]: w for w in result.facts["within"]}
    assert at[1000]["rows_cut"] == 2
    assert at[1000]["rows_lost"] == 1
    assert at[8192]["trained_share"] == 1
    assert 0 < at[1000]["trained_share"] < at[2048]["trained_share"] <= 1


def test_a_model_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--model"):
        audit(write(rows(), tmp_path))


def test_columns_that_match_nothing(tmp_path: Path) -> None:
    with pytest.raises(SstokenError, match="match no known layout"):
        audit(write([{"a": 1}], tmp_path), model=model(tmp_path))


def test_a_damaged_line_is_a_finding(tmp_path: Path) -> None:
    path = Path(write(rows(), tmp_path))
    path.write_text(path.read_text() + '{"messages": [')
    result = audit(path, model=model(tmp_path))
    assert kinds(result) == {"bad-row": 1}
    assert result.facts["rows"] == 7


def test_its_spans_are_those_of_encode(tmp_path: Path) -> None:
    """Each turn as an example of its own, and the trained tokens of all."""
    data = write(rows(), tmp_path)
    result = audit(data, model=model(tmp_path), turns="each")
    assert result.facts["examples"] == 12
    assert result.facts["ends"]["end_trained"] == 12
    assert kinds(result) == {}
