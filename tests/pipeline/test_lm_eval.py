"""The paper's evaluation script with the real lm-evaluation-harness, on a task without a hub: `make test-lm-eval`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import ROOT, SHARED

LM_EVAL = shutil.which("lm_eval", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
NUMBER = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LM_EVAL is None, reason="needs lm-eval: make test-lm-eval"),
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared"),
]


def own_accuracy(model: Path, rows: list[dict[str, object]]) -> float:
    """The share of questions whose own answer is the likeliest continuation, by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    right = 0
    for row in rows:
        likelihoods = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            start = len(tokenizer(row["question"])["input_ids"])
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                log_p = network(ids).logits[0, start - 1 : -1].log_softmax(-1)
            likelihoods.append(float(log_p.gather(1, ids[0, start:, None]).sum()))
        right += likelihoods.index(max(likelihoods)) == row["label"]
    return right / len(rows)


SMOLLM2 = ROOT / ".models" / "smollm2"
MODELS = {
    "small": SHARED / "models" / "base",
    "smollm2": pytest.param(
        SMOLLM2, marks=pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs make smollm2")
    ),
}


@pytest.mark.parametrize("trained", MODELS.values(), ids=MODELS)
def test_evaluate_sh_measures_what_transformers_measures(trained: Path, tmp_path: Path) -> None:
    assert LM_EVAL is not None
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    tasks = tmp_path / "tasks"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"),
        "PATH": f"{Path(LM_EVAL).parent}:{os.environ['PATH']}",
        "TASKS": f"--include_path {tasks} --tasks sstoken_choices",
    }  # fmt: skip
    write = [sys.executable, ROOT / "configs/paper/local_tasks.py", "--out", tasks, "--number", str(NUMBER)]
    subprocess.run(write, check=True, env=environment, timeout=600)
    evaluate = ["bash", ROOT / "configs/paper/evaluate.sh", model, "--batch_size", "8", "--device", "cpu"]
    subprocess.run(evaluate, check=True, env=environment, timeout=3600, capture_output=True)
    [found] = (model / "evaluation").rglob("results_*.json")
    measured = json.loads(found.read_text())["results"]["sstoken_choices"]["acc,none"]
    rows = [json.loads(line) for line in (tasks / "choices.jsonl").read_text().splitlines()]
    assert len(rows) == NUMBER
    assert measured == pytest.approx(own_accuracy(model, rows))
    assert 0 < measured < 1
