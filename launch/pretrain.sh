#!/usr/bin/env bash
""":"
# Pretrains a protein language model. One file, two ways:
#   launch/pretrain.sh FLAGS                               a shell runs it: it starts the processes itself
#   torchrun --nproc-per-node 2 launch/pretrain.sh FLAGS   torchrun runs it: below, it is the Python program
# The shell reads NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, or what Slurm, LSF or MPI say, started
# once a node or once a process (megatron_plm/rendezvous.py), and PYTHON. PROGRAM=tools/preflight.py starts that instead.
# Exit codes: 0 finished, 2 wrong input, 75 stopped by a signal and saved (run me again with --load), 1 failed.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then PYTHON="$root/.venv/bin/python"; fi
fi
program=${PROGRAM:-$0}
settings=$("$PYTHON" -P -m megatron_plm.rendezvous) || exit
eval "$settings"
# As one process: of several that something else starts, or alone.
if [ -n "${RANK:-}" ] || [ "$NNODES $NPROC_PER_NODE" = "1 1" ]; then
  exec "$PYTHON" "$program" "$@"
fi

# A worker that is told to stop finishes its step and saves: torchrun would kill it after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# Under nohup a hang-up stays without effect: then the shell cannot trap it, and torchrun must not.
signals=SIGTERM,SIGINT,SIGUSR1
[ -z "$(trap -p SIGHUP)" ] && signals="$signals,SIGHUP"
exit_code_file=$(mktemp)
export MEGATRON_PLM_EXIT_CODE_FILE="$exit_code_file"
rendezvous=(--standalone)
if [ "$NNODES" != 1 ]; then
  rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi
# It leaves this process group, so that Ctrl-C and `timeout`, which signal all of it, reach it once: by the trap below.
"$PYTHON" -P -m megatron_plm.torchrun_agent "${rendezvous[@]}" --nproc-per-node "$NPROC_PER_NODE" \
  --signals-to-handle "$signals" "$program" "$@" &
agent=$!
for name in ${signals//,/ }; do trap "kill -$name $agent 2>/dev/null" "$name"; done
wait "$agent"; code=$?
# A trapped signal ends `wait` early: wait until the agent itself has ended.
while kill -0 "$agent" 2>/dev/null; do wait "$agent"; code=$?; done
# The agent's own code says less than the workers': they wrote theirs, unless they crashed.
if [ -s "$exit_code_file" ]; then code=$(cat "$exit_code_file"); fi
rm -f "$exit_code_file"
exit "$code"
":"""

import sys

from megatron_plm.training.pretrain import launch

if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
