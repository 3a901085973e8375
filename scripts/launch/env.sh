# Settings that the launchers share; sourced in the root of the repository. Environment variables override them.
fail() { echo "error: $*" >&2; exit 2; }

if ! command -v torchrun > /dev/null; then
    [ -f .venv/bin/activate ] || fail "torchrun not found; activate your environment, or create one: scripts/quickstart.sh"
    source .venv/bin/activate
fi

# Workers on this machine: one per visible GPU; one if there is no GPU.
visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr , '\n' <<< "$CUDA_VISIBLE_DEVICES"
    else
        nvidia-smi --list-gpus 2> /dev/null
    fi
}
[ -n "${NPROC:-}" ] || NPROC=$(visible_gpus | wc -l | tr -d ' ') || true
[ "$NPROC" != 0 ] || NPROC=1
[[ $NPROC =~ ^[1-9][0-9]*$ ]] || fail "NPROC=$NPROC must be a number of workers"

# How often torchrun restarts all workers after one has died. They resume from the last checkpoint.
MAX_RESTARTS=${MAX_RESTARTS:-3}

# Signals that torchrun forwards to its workers. All except SIGQUIT make them save a checkpoint and stop. SIGUSR1 must
# be listed, because it would kill torchrun. SIGHUP (a closed terminal) is left out under nohup, which torchrun would
# override.
SIGNALS=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
[ -n "$(trap -p HUP)" ] || SIGNALS+=,SIGHUP

# Seconds until SIGKILL: more than a step and the slowest save. torch 2.11 ignores it and uses 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

# Divide the cores among workers. The default of torchrun, one thread each, is slow on CPUs and with --cpu_offload.
cores=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}
