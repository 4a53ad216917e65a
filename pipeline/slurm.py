"""`run --dry-run`: writes the resolved configuration, and scripts that run it on SLURM, step by step.

Steps that work by shards become job arrays of ranks, each followed by a short job that commits. The scripts only call
`sstoken-curate`, so they can be read, changed and run by hand.
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sstoken.pipeline.config import RunConfig
from sstoken.pipeline.job import Job
from sstoken.pipeline.plan import promised_steps
from sstoken.stages import storage
from sstoken.stages.anchor import Anchor
from sstoken.stages.score import Score
from sstoken.stages.shard_border import STATUS
from sstoken.stages.sharded import ShardedStage
from sstoken.stages.storage import write_atomic

RESOLVED = "config.yaml"
SUBMIT = "submit.sh"
_REQUEUE = ("--requeue", "--signal=B:TERM@60")
"""SLURM sends a signal that many seconds before a job's time limit."""


@dataclass
class _Script:
    """One sbatch file."""

    name: str
    lines: list[str]
    gpu: bool = False


def write_scripts(config: RunConfig, folder: Path, ranks: int) -> list[Path]:
    """Write the resolved configuration and the scripts into `folder`; return all files.

    The scripts name `folder`, so submit jobs from where that path is valid. Each job array has `ranks` tasks;
    with one rank, there are no arrays.
    """
    steps: dict[str, list[Job]] = {}
    for step in promised_steps(config):
        assert step.job is not None, "every checkpoint is promised"
        steps.setdefault(step.step, []).append(step.job)
    scripts: list[_Script] = []
    for number, (step_name, jobs) in enumerate(steps.items(), 1):
        name = re.sub(r"[^\w.-]", "-", step_name)
        call = f"sstoken-curate run {shlex.quote(str(folder / RESOLVED))} --only {shlex.quote(step_name)}"
        shared = ranks > 1 and all(isinstance(job.stage, ShardedStage) for job in jobs)
        lines = _array(name, call, ranks) if shared else _single(name, call)
        gpu = any(hasattr(job.stage, "device") or isinstance(job.stage, Anchor) for job in jobs)
        scripts.append(_Script(f"{number}-{name}.sbatch", lines, gpu))
        if shared:
            places = [job.out for job in jobs]
            if isinstance(jobs[0].stage, Score):  # some checkpoints are not known yet: all below its folder
                places = [config.place(step_name)]
            commits = [f"sstoken-curate commit {shlex.quote(str(place))}" for place in places]
            scripts.append(_Script(f"{number}-{name}-commit.sbatch", _commit(name, commits)))
    written = {RESOLVED: resolved(config)}
    written |= {script.name: "\n".join(script.lines) + "\n" for script in scripts}
    written[SUBMIT] = _submit(folder, scripts)
    storage.of(folder).make_folder(folder)
    for name, text in written.items():
        write_atomic(folder / name, text)
    (folder / SUBMIT).chmod(0o755)
    return [folder / name for name in written]


def resolved(config: RunConfig) -> str:
    """Return the configuration as YAML, with overrides, copied settings and repeated steps written out.

    Settings that were not given stay out: for some, giving the default has another meaning.
    """
    values: dict[str, Any] = json.loads(config.model_dump_json(exclude_unset=True, by_alias=True))
    if config.steps:
        for name, stage in config.steps.items():
            values["steps"][name] = {"stage": stage.name, **values["steps"][name]}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _head(name: str, *more: str) -> list[str]:
    options = (f"--job-name=sstoken-{name}", "--open-mode=append", *more)
    return ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in options)]


def _array(name: str, call: str, ranks: int) -> list[str]:
    return [
        *_head(name, f"--array=0-{ranks - 1}", *_REQUEUE, "--output=slurm-%x-%A_%a.log"),
        f"# One rank of the step {name}: one shard of every {ranks}. A shard that is there is never made again.",
        *_until_stopped(
            f'{call} --rank "$SLURM_ARRAY_TASK_ID" --world-size {ranks}',
            "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}",
        ),
    ]


def _single(name: str, call: str) -> list[str]:
    return [
        *_head(name, *_REQUEUE, "--output=slurm-%x-%j.log"),
        f"# The step {name}, in one job; it goes on where an earlier one stopped.",
        *_until_stopped(call, "$SLURM_JOB_ID"),
    ]


def _commit(name: str, commits: list[str]) -> list[str]:
    return [
        *_head(f"{name}-commit", "--output=slurm-%x-%j.log"),
        f"# Checks that every shard of the step {name} is there, and writes its manifest.",
        "set -euo pipefail",
        *commits,
    ]


def _until_stopped(call: str, job: str) -> list[str]:
    """Run a command, forward SIGTERM to it, and requeue the job if that stopped it."""
    return [
        f"{call} &",
        "child=$!",
        "trap 'kill -TERM \"$child\"' TERM  # time is nearly over, or the node is needed",
        'while kill -0 "$child" 2>/dev/null; do wait "$child"; done  # a signal ends one wait',
        'wait "$child"; status=$?',
        f'if [ "$status" -eq {int(STATUS)} ]; then scontrol requeue "{job}"; fi',
        'exit "$status"',
    ]


def _submit(folder: Path, scripts: list[_Script]) -> str:
    lines = [
        "#!/usr/bin/env bash",
        "# Submits every step; each waits for the one before. Run it from the folder that paths are relative to:",
        f"# bash {shlex.quote(str(folder / SUBMIT))} [SBATCH OPTIONS]",
        "# Its options go to every sbatch (--partition=..., --account=...); SSTOKEN_GPU to those that run a model.",
        "set -euo pipefail",
        "gpu=${SSTOKEN_GPU---gres=gpu:1}",
        "after=()",
        "submit() {",
        '  job=$(sbatch --parsable "${after[@]}" "$@")',
        '  after=(--dependency="afterok:${job%%;*}")',
        '  echo "$job: ${!#}"',
        "}",
    ]
    for script in scripts:
        gpu = "$gpu " if script.gpu else ""
        lines.append(f'submit {gpu}"$@" {shlex.quote(str(folder / script.name))}')
    return "\n".join(lines) + "\n"
