# Sourced by the launchers, in the repository's root: what they share. All of it can be set from outside.
fail() { echo "error: $*" >&2; exit 2; }

if ! command -v torchrun > /dev/null; then
    [ -f .venv/bin/activate ] || fail "no torchrun here; activate your environment, or make one: scripts/quickstart.sh"
    source .venv/bin/activate
fi

# Workers on this machine: one per visible GPU, without any one.
visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr , '\n' <<< "$CUDA_VISIBLE_DEVICES"
    else
        nvidia-smi --list-gpus 2> /dev/null
    fi
}
[ -n "${NPROC:-}" ] || NPROC=$(visible_gpus | wc -l | tr -d ' ') || true
[ "$NPROC" != 0 ] || NPROC=1
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$NPROC is no number of workers"

# How often torchrun starts all workers again after one has died; they go on from the last checkpoint.
MAX_RESTARTS=${MAX_RESTARTS:-3}

# What torchrun passes on to its workers; all but SIGQUIT make them stop with a checkpoint. It dies of a SIGUSR1 that is
# not listed. SIGHUP, the closed terminal, is left out where nohup has it ignored, which torchrun would undo.
SIGNALS=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
[ -n "$(trap -p HUP)" ] || SIGNALS+=,SIGHUP

# Seconds from then to SIGKILL: more than a step and the slowest save. torch 2.11 knows only 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

# The cores, shared out: torchrun would give each worker one thread. It matters on CPUs, and for --cpu_offload.
cores=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
