#!/bin/bash
# evaluate.sh MODEL [OPTIONS OF lm_eval]: nine of ssToken's ten benchmarks with the authors' numbers of examples in the
# prompt (TyDiQA has no task in lm-evaluation-harness). Needs `pip install lm-eval`, and the Hub.
set -euo pipefail
model=$1
shift
lm_eval --model hf --model_args "pretrained=$model" --batch_size auto --output_path "$model/evaluation" \
    --tasks winogrande,arc_challenge,arc_easy,hellaswag,logiqa,truthfulqa,triviaqa,agieval --num_fewshot 0 "$@"
lm_eval --model hf --model_args "pretrained=$model" --batch_size auto --output_path "$model/evaluation" \
    --tasks mmlu --num_fewshot 5 "$@"
