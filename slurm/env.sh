# What differs between clusters. submit.sh and chain.sh read it before they submit, every job when it starts; RISKPO_ENV
# names another file in its place. Lines that begin with # are examples: take out the # and put in what is yours.
# shellcheck shell=bash disable=SC2034

# Options of every job: sbatch's own variables (man sbatch, INPUT ENVIRONMENT VARIABLES); the command line wins.
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_MEM_PER_NODE=0                     # all of a node's memory

# The jobs that chain.sh submits after the training.
CONVERT_OPTIONS=(--nodes=1 --ntasks=1 --cpus-per-task=8 --time=1:00:00)
EVALUATE_OPTIONS=(--nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=12 --time=4:00:00)

# Software, and the command that each task runs.
# module load cuda/13.0 nccl
# . "$HOME/megatron-riskpo/.venv/bin/activate"
RISKPO=(riskpo)

# Container: options of each srun, for example those of pyxis. RISKPO is then the command inside.
CONTAINER_ARGS=()
# CONTAINER_ARGS=(--container-image="$HOME/riskpo.sqsh" --container-mounts="$PWD:$PWD,/scratch:/scratch" --container-workdir="$PWD")

# Network: the interface for the ranks' meeting, and for NCCL.
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN

# The name or address under which other nodes reach the rollout servers of node $1.
server_host() {
    echo "$1"
}

# What all ranks of a training job run first, before anything is loaded: arguments of riskpo, to which configuration and
# options are added. Where it fails the job ends. PREFLIGHT=() leaves it out.
PREFLIGHT=(doctor --job)

# Times in a row, without a new checkpoint in between, that a job whose run stood still is requeued.
STALL_RETRIES=3
# The same of a job whose time was up before anything was saved; one that was preempted does not count.
IDLE_RETRIES=3
# The same of a job whose ranks failed.
RETRIES=0

# A folder that all nodes see, through which weights go to rollout servers on other nodes; empty: over the network.
TRANSFER_DIR=
