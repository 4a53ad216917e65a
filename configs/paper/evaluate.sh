#!/bin/bash
# evaluate.sh MODEL [OPTIONS OF lm_eval]: nine of ssToken's ten benchmarks with the authors' numbers of examples in the
# prompt (TyDiQA has no task in lm-evaluation-harness). Needs `pip install lm-eval`, and the Hub.
# TASKS="--tasks A,B": those instead; local_tasks.py writes some that need no Hub.
set -euo pipefail
model=$1
shift
evaluate() {
    lm_eval --model hf --model_args "pretrained=$model" --output_path "$model/evaluation" "$@"
}
if [ -n "${TASKS:-}" ]; then
    # shellcheck disable=SC2086  # several options
    evaluate $TASKS "$@"
    exit
fi
evaluate --batch_size auto \
    --tasks winogrande,arc_challenge,arc_easy,hellaswag,logiqa,truthfulqa,triviaqa,agieval --num_fewshot 0 "$@"
evaluate --batch_size auto --tasks mmlu --num_fewshot 5 "$@"
