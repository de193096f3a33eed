# Rollout servers on some of a job's nodes; train.sbatch reads this file, which is not run by itself.
# shellcheck shell=bash

ENDPOINTS=()   # of SERVERS: a file each, there once it is healthy; its log is beside it

# start_servers NODES SERVERS_PER_NODE CONFIG [--section.key value ...]: on the last nodes of the job, until all are
# healthy. Sets SERVERS, TRAINING_STEP (srun options that give the other nodes to the ranks) and SERVER_OPTIONS (how the
# run reaches the servers).
start_servers() {
    local num=$1 per_node=$2 gpus=${SLURM_GPUS_ON_NODE:-0} hosts node index
    shift 2
    mapfile -t hosts < <(timeout 60 scontrol show hostnames "$SLURM_JOB_NODELIST")
    if ! [[ $num =~ ^[0-9]+$ && $per_node =~ ^[1-9][0-9]*$ ]] || ((num >= ${#hosts[@]})); then
        phase failed
        echo "--server-nodes=$num --servers-per-node=$per_node: of ${#hosts[@]} nodes at least one has to train" >&2
        exit 2
    fi
    if ((gpus > 0 && per_node > gpus)); then
        phase failed
        echo "--servers-per-node=$per_node: a node has $gpus GPUs, and a server takes one at least" >&2
        exit 2
    fi
    phase servers
    for node in "${hosts[@]:${#hosts[@]}-num}"; do
        for ((index = 0; index < per_node; index++)); do
            start_server "$node" "$index" "$per_node" "$@"
        done
    done
    local training=$((${#hosts[@]} - num))
    TRAINING_STEP=(
        --nodes="$training" --ntasks="$((training * ${SLURM_NTASKS_PER_NODE:-1}))"
        --nodelist="$(IFS=,; echo "${hosts[*]:0:training}")"
    )
    await_servers
}

# start_server NODE INDEX SERVERS_PER_NODE CONFIG ...: with its share of the node's GPUs.
start_server() {
    local node=$1 index=$2 share=$((${SLURM_GPUS_ON_NODE:-0} / $3)) name=server_${1}_$2 environment=()
    shift 3
    if ((share > 0)); then
        environment=(env "CUDA_VISIBLE_DEVICES=$(seq -s , $((index * share)) $(((index + 1) * share - 1)))")
    fi
    # --overlap: the servers of a node share what the job has of it.
    srun "${CONTAINER_ARGS[@]}" --nodes=1 --ntasks=1 --nodelist="$node" --overlap --output="$ATTEMPT_DIR/$name.log" \
        "${environment[@]}" "${RISKPO[@]}" serve --host "$(server_host "$node")" --tokens-only --without-weights \
        --endpoint "$ATTEMPT_DIR/$name.json" "$@" &
    SERVERS+=($!)
    ENDPOINTS+=("$ATTEMPT_DIR/$name.json")
}

# Until all servers are healthy; ends the job where one of them, or the job's own time, ends before.
await_servers() {
    local waiting index urls
    while waiting=$(unhealthy) && [ -n "$waiting" ]; do
        if [ -n "$WARNED$TERMINATED" ]; then
            echo "a signal came before all rollout servers were healthy (server.start_timeout_s bounds their start)," \
                "not yet:$waiting; see $ATTEMPT_DIR/server_*.log" >&2
            finish 1
        fi
        for index in "${!SERVERS[@]}"; do
            kill -0 "${SERVERS[index]}" 2>/dev/null || end_with_server "$index"
        done
        sleep 0.5
    done
    mapfile -t urls < <(sed -n 's/.*"url": "\([^"]*\)".*/\1/p' "${ENDPOINTS[@]}")
    SERVER_OPTIONS=(--rollout.server_urls "${urls[@]}")
    if [ -n "$TRANSFER_DIR" ]; then
        mkdir -p "$TRANSFER_DIR"
        SERVER_OPTIONS=(--server.transfer_dir "$TRANSFER_DIR" "${SERVER_OPTIONS[@]}")
    fi
}

# Names of servers, each after a space.
unhealthy() {
    local endpoint
    for endpoint in "${ENDPOINTS[@]}"; do
        [ -e "$endpoint" ] || printf ' %s' "$(basename "$endpoint" .json)"
    done
}

# end_with_server INDEX: with its exit code, which says whether it is worth another try.
end_with_server() {
    local endpoint=${ENDPOINTS[$1]} code
    await "${SERVERS[$1]}"
    code=$?
    echo "rollout server $(basename "$endpoint" .json) ended with exit code $code before all were healthy:" >&2
    tail -n 5 "${endpoint%.json}.log" >&2
    # 0: by a signal of somebody's.
    finish "$((code ? code : 1))"
}
