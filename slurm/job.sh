# What all job scripts of this folder do alike; they read this file, which is not run by itself.
# shellcheck shell=bash

WARNED=       # USR1 came: the time limit is near, or the job has to make way
TERMINATED=   # TERM came: the job is cancelled
# Until there is something to tell: env.sh may take its time.
trap WARNED=yes USR1
trap TERMINATED=yes TERM INT

# shellcheck source=env.sh
. "${RISKPO_ENV:-$RISKPO_SLURM/env.sh}"

# The number of an array's last task stands for all of its tasks where a command reads it.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
JOB_DIR=${RISKPO_LOGS:-$SLURM_SUBMIT_DIR/slurm_logs}/$JOB
ATTEMPT=$((${SLURM_RESTART_COUNT:-0} + 1))
ATTEMPT_DIR=$JOB_DIR/attempt_$ATTEMPT
# Made by riskpo when its work is done: a run that a signal stopped has the same exit code.
export RISKPO_DONE_FILE=$ATTEMPT_DIR/done
# Made by riskpo when it has saved something to go on from.
export RISKPO_PROGRESS_FILE=$ATTEMPT_DIR/progress
export RISKPO_FAILED_FILE=$ATTEMPT_DIR/failed
# Made by the watchdog when it ends a run that stands still, with the line that names the ranks.
export RISKPO_STALLED_FILE=$ATTEMPT_DIR/stalled
# Slurm hands --cpus-per-task on to the batch script, not from there to srun.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
STEP=         # the srun of the ranks
SERVERS=()    # the sruns of rollout servers

mkdir -p "$ATTEMPT_DIR" || exit 1
echo "attempt $ATTEMPT on $SLURM_JOB_NODELIST: see $ATTEMPT_DIR"
exec >>"$ATTEMPT_DIR/batch.log" 2>&1

# phase NAME: into the job's state file, at once and whole, and into the log.
phase() {
    local now
    now=$(date +%Y-%m-%dT%H:%M:%S%z)
    printf '{"job": "%s", "attempt": %d, "phase": "%s", "since": "%s"}\n' "$JOB" "$ATTEMPT" "$1" "$now" \
        >"$JOB_DIR/state.json.part" && mv "$JOB_DIR/state.json.part" "$JOB_DIR/state.json"
    echo "$now $1"
}

# usage TEXT: the job was submitted in a wrong way.
usage() {
    phase failed
    echo "usage: sbatch [OPTION ...] slurm/$1" >&2
    exit 2
}

on_warning() {
    WARNED=yes
    if [ -n "$STEP" ]; then
        kill -USR1 "$STEP" 2>/dev/null
        phase saving
    fi
}

on_end() {
    TERMINATED=yes
    if [ -n "$STEP" ]; then
        phase stopping
        end_steps
    fi
}

trap on_warning USR1
trap on_end TERM INT

# TERM to all tasks of the job, which Slurm has sent to them already where it ends the job. Not by srun: it would kill them.
end_steps() {
    timeout 20 scancel --quiet --signal=TERM "$JOB"
}

# await PID: its exit code, however often a trapped signal interrupts the wait.
await() {
    while :; do
        wait "$1"
        kill -0 "$1" 2>/dev/null || break
    done
    wait "$1"
}

# What each task runs: the command, and a line on it if it fails. Where Slurm tracks processes by cgroups, it sends signals
# to the task alone, this shell, which passes them on; elsewhere the command gets them twice, which does no harm.
RANK='pid= early=
pass_on() {
    if [ -n "$pid" ]; then kill -"$1" "$pid" 2>/dev/null; else early=$1; fi
}
trap "pass_on USR1" USR1
trap "pass_on TERM" TERM
"$@" &
pid=$!
[ -z "$early" ] || kill -"$early" "$pid"
while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
wait "$pid"
code=$?
[ "$code" = 0 ] || echo "rank $SLURM_PROCID on $SLURMD_NODENAME: exit code $code" >>"$RISKPO_FAILED_FILE"; exit "$code"'

# run_ranks PHASE [SRUN_OPTION ...] -- COMMAND ...: a rank a task, a log a rank; the first that fails ends the others.
run_ranks() {
    local name=$1 options=() watcher code
    if [ -n "$WARNED$TERMINATED" ]; then
        return 1
    fi
    shift
    phase "$name"
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    srun "${CONTAINER_ARGS[@]}" "${options[@]}" --kill-on-bad-exit=0 --output="$ATTEMPT_DIR/${name}_%t.log" \
        bash -c "$RANK" rank "$@" &
    STEP=$!
    # A signal that came in between has reached no rank.
    if [ -n "$WARNED$TERMINATED" ]; then
        kill -USR1 "$STEP"
    fi
    end_after_failure &
    watcher=$!
    await "$STEP"
    code=$?
    STEP=
    kill "$watcher" 2>/dev/null
    if [ "$code" != 0 ]; then
        tail_of_failed "$name"
    fi
    return "$code"
}

# preflight CONFIG [--section.key value ...]: where env.sh has one; ends the job if it fails.
preflight() {
    if ((${#PREFLIGHT[@]} > 0)); then
        run_ranks preflight -- "${RISKPO[@]}" "${PREFLIGHT[@]}" "$@" || finish $?
    fi
}

# tail_of_failed PHASE: which rank failed first, and its last words.
tail_of_failed() {
    local first
    read -r _ first _ 2>/dev/null <"$RISKPO_FAILED_FILE" || return 0
    head -n 1 "$RISKPO_FAILED_FILE"
    tail -n 5 "$ATTEMPT_DIR/${1}_$first.log"
}

# Peers of a failed rank end by themselves, or hang. srun --kill-on-bad-exit would leave those KillWait: often 30 s, or more.
end_after_failure() {
    until [ -e "$RISKPO_FAILED_FILE" ]; do
        sleep 1
    done
    # Of a run that stood still the watchdogs have ended all ranks that they can.
    sleep 3
    [ -e "$RISKPO_STALLED_FILE" ] || sleep 7
    echo "ending what is left of the ranks"
    # srun kills them.
    kill -TERM "$STEP"
}

# finish CODE: end the job, or put it into the queue once more.
finish() {
    local code=$1 first
    trap '' USR1
    stop_servers
    if [ -e "$RISKPO_DONE_FILE" ]; then
        phase done
        exit 0
    fi
    # TERM goes to the ranks first: they may have ended before it comes here.
    if [ -z "$TERMINATED" ] && shown_job | grep -Eq ' JobState=(CANCELLED|TIMEOUT|COMPLETING) '; then
        TERMINATED=yes
    fi
    if [ -n "$WARNED" ] && [ -z "$TERMINATED" ]; then
        requeue_warned
    fi
    stay_if_preempted
    if [ -n "$TERMINATED" ]; then
        phase cancelled
        exit 143
    fi
    touch "$RISKPO_FAILED_FILE"
    # Of the rank that failed first: its peers may have been killed.
    first=$(sed -n '1s/.*exit code //p' "$RISKPO_FAILED_FILE")
    code=${first:-$code}
    echo "exit code $code"
    if [ -e "$RISKPO_STALLED_FILE" ]; then
        cat "$RISKPO_STALLED_FILE"
        retry stalled "${STALL_RETRIES:-3}"
    # 2: wrong input, which does not get better.
    elif ((code != 0 && code != 2)); then
        retry failed "${RETRIES:-0}"
    fi
    phase failed
    exit "$((code ? code : 1))"
}

# After USR1. What does not get as far as to save before its time is up would else come back for ever.
requeue_warned() {
    if [ -e "$RISKPO_PROGRESS_FILE" ] || is_preempted; then
        requeue
    else
        retry idle "${IDLE_RETRIES:-3}"
        echo "nothing was saved before the time was up, after ${IDLE_RETRIES:-3} requeues for that (IDLE_RETRIES):" \
            "ask for more time (--time), or an earlier warning (--signal)"
        phase failed
        exit 1
    fi
}

# retry REASON LIMIT: requeue the job, unless it was LIMIT times for the same reason since riskpo has saved something.
retry() {
    local attempt folder times=0
    for ((attempt = ATTEMPT; attempt > 0; attempt--)); do
        folder=$JOB_DIR/attempt_$attempt
        if [ "$(cat "$folder/requeued" 2>/dev/null)" = "$1" ]; then
            times=$((times + 1))
        fi
        if [ -e "$folder/progress" ]; then
            break
        fi
    done
    if ((times < $2)); then
        echo "$1" >"$ATTEMPT_DIR/requeued"
        requeue
    fi
}

stop_servers() {
    local server killer
    if ((${#SERVERS[@]} == 0)); then
        return
    fi
    end_steps || kill -TERM "${SERVERS[@]}" 2>/dev/null
    # One that hangs must not keep the job from its requeue.
    (sleep 30 && kill -KILL "${SERVERS[@]}" 2>/dev/null) &
    killer=$!
    for server in "${SERVERS[@]}"; do
        await "$server"
    done
    kill "$killer" 2>/dev/null
}

# Where no warning was asked for, a job that has to make way gets TERM; it is requeued by Slurm itself, if it is still there
# when its grace period ends.
stay_if_preempted() {
    if is_preempted; then
        phase preempted
        trap - TERM
        sleep infinity
    fi
}

is_preempted() {
    shown_job | grep -q ' PreemptTime=[0-9]'
}

shown_job() {
    timeout 20 scontrol --oneliner show job "$JOB"
}

# Never after TERM: it would bring a cancelled job back to life.
requeue() {
    local try
    # Slurm sends TERM as it puts the job back.
    trap '' TERM
    phase requeued
    for try in 1 2 3 4 5; do
        if timeout 60 scontrol requeue "$JOB"; then
            # At once: it would be killed only KillWait later.
            exit 0
        fi
        echo "attempt $try at a requeue failed"
        sleep 5
    done
}
