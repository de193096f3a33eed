#!/bin/bash
# sbatch, with what env.sh says of the cluster; the job finds this folder wherever it is submitted from.
#   slurm/submit.sh [SBATCH_OPTION ...] slurm/train.sbatch my.toml
RISKPO_SLURM=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
export RISKPO_SLURM
# shellcheck source=env.sh
. "${RISKPO_ENV:-$RISKPO_SLURM/env.sh}" || exit 1
exec sbatch "$@"
