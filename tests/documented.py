"""The fenced blocks of the README and of docs/: which run after the README's, and why others do not."""

import re
from dataclasses import dataclass

from tests.support import ROOT

README = "README.md"
RUN = (
    README,
    "choosing.md",
    "critical-tokens.md",
    "faq.md",
    "report.md",
    "runs.md",
    "audit.md",
    "api.md",
)
"""Pages whose commands and programs tests/test_documentation.py runs as they are printed, the README's first."""
ELSEWHERE: dict[str, dict[str, str]] = {
    # page: {what a command or a block begins with: the test that runs it, or why none here can}
    README: {
        "make ": "sets up or runs what these tests run in; CI calls the targets",
        ". .venv/bin/activate": "these tests run in an environment of their own",
        "pip install ray": "tests/ray/test_ray.py",
        "ray ": "tests/ray/test_ray.py",
        "sstoken-curate run configs/demo.yaml --set engine=ray": "tests/ray/test_ray.py",
    },
    "audit.md": {"from sstoken import curate": "tests/stages/auditing/test_any_rows.py"},
    "critical-tokens.md": {"out: runs/critical-tokens": "tests/pipeline/test_critical.py"},
    "data.md": {"{": "tests/pipeline/test_data_docs.py"},
    "hub.md": {
        "sstoken-curate publish": "the README has the same line; tests/pipeline/hub publishes",
        "sstoken-curate pull": "tests/pipeline/hub/test_pull.py",
    },
    "in-loop.md": {
        "from datasets import load_dataset": "tests/sstoken/in_loop/recipe.py",
        "from accelerate import Accelerator": "tests/sstoken/in_loop/test_recipe.py",
        "capture = AttentionCapture": "tests/sstoken/in_loop/test_recipe.py",
    },
    "methods.md": {
        "sstoken-curate select --tokens T": "T, S and M stand for your folders",
        "[project]": "tests/sstoken/test_third_party.py",
        "from typing import Annotated": "tests/sstoken/test_third_party.py",
    },
    "runs.md": {
        "sstoken-curate run configs/self-evolving.yaml": "tests/pipeline/test_steps.py",
        "sstoken-curate anchor --tokens runs/good-tokens": "good tokens are the user's own",
        "sstoken-curate score --tokens runs/tokens --ckpt ref=runs/reference": "needs the reference of the line above",
        "sstoken-curate select --tokens runs/tokens --scores runs/scores --method rho-1": "needs the reference, too",
        "out: runs/": "tests/pipeline/test_steps.py",
    },
    "scale.md": {
        "pip install ray": "tests/ray/test_ray.py",
        "ray ": "tests/ray/test_ray.py",
        "sstoken-curate run configs/demo.yaml --set engine=ray": "tests/ray/test_ray.py",
        "sstoken-curate run configs/demo.yaml --dry-run": "tests/pipeline/test_slurm.py",
        "bash runs/demo-run.slurm/submit.sh": "tests/pipeline/test_slurm.py",
        "accelerate launch": "needs several machines; tests/pipeline/test_fsdp2.py does it with two processes",
        "accelerate merge-weights": "tests/pipeline/test_fsdp2.py",
        "sstoken-curate score --tokens runs/tokens --ckpt history=BASE": "tests/pipeline/test_fsdp2.py",
    },
    "storage.md": {
        "pip install s3fs": "in the environment of the tests already",
        "export AWS_PROFILE": "the user's own account",
        "sstoken-curate ": "tests/pipeline/test_object_stores.py",
    },
    "vllm.md": {
        "sstoken-curate score ": "needs vLLM; tests/vllm, in an environment of its own, runs it on one device",
        "vllm serve ": "tests/vllm/test_server.py",
    },
}
PROGRAMS = ("bash", "python", "yaml", "toml", "json")
"""Languages that something has to run or read; `text` is to be looked at."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """A command of a page, or a whole block of another language."""

    page: str
    language: str
    text: str

    @property
    def excepted(self) -> str | None:
        """What `ELSEWHERE` says of it."""
        named = ELSEWHERE.get(self.page, {})
        return next((why for start, why in named.items() if self.text.startswith(start)), None)

    @property
    def runs(self) -> bool:
        """Whether tests/test_documentation.py runs it."""
        return self.page in RUN and self.excepted is None and self.language in ("bash", "python")


def pages() -> list[str]:
    """The README and every page of docs/."""
    return [README, *sorted(path.name for path in (ROOT / "docs").glob("*.md"))]


def text_of(page: str) -> str:
    """What stands in a page."""
    return (ROOT / page if page == README else ROOT / "docs" / page).read_text(encoding="utf-8")


def pieces(page: str) -> list[Piece]:
    """Commands and blocks of a page, in order; a command may take several lines."""
    found = []
    for language, body in _FENCE.findall(text_of(page)):
        if language == "bash":
            commands = body.replace("\\\n", " ").strip().splitlines()
            found += [Piece(page, language, " ".join(line.split())) for line in commands if line]
        else:
            found.append(Piece(page, language, body))
    return found
