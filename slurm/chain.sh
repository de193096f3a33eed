#!/bin/bash
# Submits a training, the conversion of its last checkpoint into RUN/converted, and an evaluation of that, each to begin when
# the one before has succeeded; if it does not, the later ones are taken out of the queue. Prints their job ids.
#   slurm/chain.sh runs/my math500.jsonl --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=12:00:00 -- my.toml \
#       -- --rollout.max_response_tokens 8192
# RUN is run.dir/run.name of the configuration. What stands behind the second -- goes to riskpo evaluate.
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

train=$("$here/submit.sh" --parsable "${options[@]}" "$here/train.sbatch" "${training[@]}")
convert=$("$here/submit.sh" --parsable "${CONVERT_OPTIONS[@]}" --dependency="afterok:${train%%;*}" \
    --kill-on-invalid-dep=yes "$here/convert.sbatch" megatron-to-hf "$run" "$run/converted")
evaluate=$("$here/submit.sh" --parsable "${EVALUATE_OPTIONS[@]}" --dependency="afterok:${convert%%;*}" \
    --kill-on-invalid-dep=yes "$here/evaluate.sbatch" --model "$run/converted" --data "$questions" "${evaluation[@]}")
echo "train ${train%%;*} convert ${convert%%;*} evaluate ${evaluate%%;*}"
