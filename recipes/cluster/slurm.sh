#!/usr/bin/env bash
#SBATCH --job-name=samebit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
# Runs samebit on all nodes of a Slurm job. From the checkout, which all nodes see, with its .venv:
#   sbatch recipes/cluster/slurm.sh +recipe=grpo_qwen3_8b model.path=/shared/Qwen3-8B out_dir=/shared/runs/a
# INTERFACE=ib0 sbatch ... names the network. Submitted again, or requeued, with the same arguments it goes on.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
export PATH="$PWD/.venv/bin:$PATH" RAY_AUTH_MODE=token
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on_head=(srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}")
interface=${INTERFACE:-$("${on_head[@]}" ip -4 route show default | sed -n 's/.* dev \([^ ]*\).*/\1/p;q')}
head=$("${on_head[@]}" ip -4 -o addr show dev "$interface" | sed -n 's/.* inet \([0-9.]*\).*/\1/p;q')
test -n "$head" || { echo "${nodes[0]} has no IPv4 address on '$interface': set INTERFACE" >&2; exit 2; }

umask 077
export RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"
srun --overlap --ntasks-per-node=1 recipes/cluster/node.sh "$head" --block &
cluster=$!
driver=
stop() { if [ -n "$driver" ]; then kill -TERM "$driver" 2>/dev/null || true; fi; }
trap stop TERM INT
trap 'kill "$cluster" 2>/dev/null || true; rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

python -m recipes.cluster.wait "$head:6379" "${#nodes[@]}"
python -m rl.train "cluster.address=$head:6379" "cluster.nodes=${#nodes[@]}" "cluster.interface=$interface" "$@" &
driver=$!
code=0
wait "$driver" || code=$?
if kill -0 "$driver" 2>/dev/null; then # the wait was ended by the signal: the driver ends its ranks, and says so
    code=0
    wait "$driver" || code=$?
fi
exit "$code"
