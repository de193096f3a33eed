#!/bin/bash
# Submits a training, the conversion of its last checkpoint into RUN/converted, and an evaluation of that, each to begin when
# the one before has succeeded; if it does not, the later ones are taken out of the queue. Prints their job ids.
#   slurm/chain.sh runs/my math500.jsonl --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=12:00:00 -- my.toml \
#       -- --rollout.max_response_tokens 8192
# RUN is run.dir/run.name of the configuration. What stands behind the second -- goes to riskpo evaluate. If a later job is
# refused, the earlier ones stay in the queue; it says which.
set -euo pipefail

if [ $# -lt 4 ]; then
    echo "usage: slurm/chain.sh RUN QUESTIONS [SBATCH_OPTION ...] -- CONFIG [--section.key value ...] [-- EVALUATE_OPTION ...]" >&2
    exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=env.sh
. "${RISKPO_ENV:-$here/env.sh}"
run=$1 questions=$2
shift 2

# Up to the next --, or the end, into WORDS; the rest stays in REST.
split() {
    WORDS=()
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        WORDS+=("$1")
        shift
    done
    REST=("${@:2}")
}

split "$@"
options=("${WORDS[@]}")
split "${REST[@]}"
training=("${WORDS[@]}") evaluation=("${REST[@]}")

# submit NAME [DEPENDENCY] -- ARGUMENT ...: into the queue, and its id into JOB. Where Slurm does not take it: what is in the queue
# already, and how to go on.
SUBMITTED=()
submit() {
    local name=$1 dependency=() command
    shift
    if [ "$1" != -- ]; then
        dependency=(--dependency="afterok:$1" --kill-on-invalid-dep=yes)
        shift
    fi
    shift
    command=("$here/submit.sh" --parsable "${dependency[@]}" "$@")
    if ! JOB=$("${command[@]}"); then
        echo "error: the job to $name was refused, see above" >&2
        if ((${#SUBMITTED[@]})); then
            echo "in the queue is: ${SUBMITTED[*]}" >&2
            echo "take it out (scancel ${SUBMITTED[*]##* }), or mend the options and submit what is left, beginning with:" >&2
            printf '%q ' "${command[@]}" >&2
            echo >&2
        fi
        exit 1
    fi
    JOB=${JOB%%;*}
    SUBMITTED+=("$name $JOB")
}

submit train -- "${options[@]}" "$here/train.sbatch" "${training[@]}"
submit convert "$JOB" -- "${CONVERT_OPTIONS[@]}" "$here/convert.sbatch" megatron-to-hf "$run" "$run/converted"
submit evaluate "$JOB" -- "${EVALUATE_OPTIONS[@]}" "$here/evaluate.sbatch" --model "$run/converted" --data "$questions" \
    "${evaluation[@]}"
echo "${SUBMITTED[*]}"
