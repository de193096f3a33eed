#!/bin/bash
# sbatch, with what env.sh says of the cluster; the job finds this folder wherever it is submitted from.
#   slurm/submit.sh [SBATCH_OPTION ...] slurm/train.sbatch my.toml
RISKPO_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
export RISKPO_SLURM
# shellcheck source=env.sh
. "${RISKPO_ENV:-$RISKPO_SLURM/env.sh}" || exit 1
# Of an array's task that submits this job, which job.sh would take for the job's own.
unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
exec sbatch "$@"
