"""Tasks for lm-evaluation-harness that need no hub: the demo's questions as multiple choice, and GSM8K from a file.

python configs/paper/local_tasks.py --out runs/lm-eval --gsm8k gsm8k/test.jsonl
TASKS="--include_path runs/lm-eval --tasks sstoken_choices,sstoken_gsm8k" bash configs/paper/evaluate.sh MODEL
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import yaml

from sstoken.pipeline.demo.tasks import FAMILIES

NUM_CHOICES = 4


def choices(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of the demo's families, each with its answer among plausible wrong ones."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < number:
        family = rng.choice(FAMILIES)
        task = family(rng)
        others = {family(rng).answer for _ in range(40)} - {task.answer, *task.wrong_answers}
        wrong = rng.sample(task.wrong_answers, min(NUM_CHOICES - 1, len(task.wrong_answers)))
        if len(wrong) + len(others) < NUM_CHOICES - 1:
            continue
        answers = [task.answer, *wrong, *rng.sample(sorted(others), NUM_CHOICES - 1 - len(wrong))]
        rng.shuffle(answers)
        rows.append({"question": task.question, "choices": answers, "label": answers.index(task.answer)})
    return rows


def write_tasks(out: Path, number: int, gsm8k: Path | None) -> list[str]:
    """Write a YAML file and the rows of each task; return the tasks' names."""
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "choices.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in choices(number)), encoding="utf-8")
    tasks: dict[str, dict[str, Any]] = {
        "sstoken_choices": {
            **_data(rows),
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    }
    if gsm8k is not None:
        ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
        number_of = {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"}
        tasks["sstoken_gsm8k"] = {
            **_data(gsm8k),
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["<|im_end|>"], "do_sample": False, "max_gen_toks": 256},
            "filter_list": [{"name": "strict-match", "filter": [number_of, {"function": "take_first"}]}],
            "metric_list": [
                {
                    "metric": "exact_match",
                    "aggregation": "mean",
                    "higher_is_better": True,
                    "regexes_to_ignore": ignored,
                }
            ],
        }
    for name, task in tasks.items():
        (out / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}), encoding="utf-8")
    return list(tasks)


def _data(rows: Path) -> dict[str, Any]:
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows.resolve())}},
        "test_split": "test",
    }


def main() -> None:
    """Write the tasks; print their names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/lm-eval"))
    parser.add_argument("--number", type=int, default=200, help="of multiple-choice questions")
    parser.add_argument("--gsm8k", type=Path, help="JSON lines with question and answer")
    options = parser.parse_args()
    print(",".join(write_tasks(options.out, options.number, options.gsm8k)))


if __name__ == "__main__":
    main()
