"""The programs of docs/in-loop.md, to be run on what is at hand."""

import re

from tests.support import ROOT

DOCUMENT = (ROOT / "docs" / "in-loop.md").read_text()


def programs(text=DOCUMENT):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def trainer_of_the_first(model, data, out, watcher, steps, warmup, learning_rate, settings=""):
    """The document's first program up to `trainer.train()`, with its model, data and lengths replaced."""
    text = programs()[0]
    for old, new in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", str(model)),
        ("my-data.jsonl", str(data)),
        ("runs/smollm2", str(out)),
        (
            "learning_rate=2e-4",
            f"learning_rate={learning_rate}, report_to='none', save_strategy='no'{settings}",
        ),
        ("max_steps=200", f"max_steps={steps}, logging_steps=1, use_cpu=True"),
        ("warmup_steps=20", f"warmup_steps={warmup}"),
        ("    peft_config", "    observers=[watcher],\n    peft_config"),
        ("trainer.train()\n", ""),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    given = {"watcher": watcher}
    exec(text, given)
    return given["trainer"]
