#!/usr/bin/env bash
# Submits every step; each waits for the one before. Run it from the folder that paths are relative to:
# bash configs/slurm/submit.sh [SBATCH OPTIONS]
# Its options go to every sbatch (--partition=..., --account=...); SSTOKEN_GPU to those that run a model.
set -euo pipefail
gpu=${SSTOKEN_GPU---gres=gpu:1}
after=()
submit() {
  job=$(sbatch --parsable "${after[@]}" "$@")
  after=(--dependency="afterok:${job%%;*}")
  echo "$job: ${!#}"
}
submit "$@" configs/slurm/1-encode.sbatch
submit "$@" configs/slurm/1-encode-commit.sbatch
submit $gpu "$@" configs/slurm/2-anchor.sbatch
submit $gpu "$@" configs/slurm/3-score.sbatch
submit "$@" configs/slurm/3-score-commit.sbatch
submit "$@" configs/slurm/4-select.sbatch
submit "$@" configs/slurm/4-select-commit.sbatch
