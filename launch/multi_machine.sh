#!/usr/bin/env bash
# Train on several machines over ssh, on all GPUs of each, or else in one process on its CPU.
#
#   HOSTS="node1 node2" bash launch/multi_machine.sh --config cifar10 --out SHARED/run
#
# Each machine needs this checkout at the same path, .venv or torchrun on the PATH, and ssh access
# without a password. The others must reach the first machine by the name given here. Ctrl-C or
# SIGTERM saves the run and stops it on all machines. If one machine fails, all stop. The same
# command resumes the run. NPROC_PER_NODE sets the number of processes on each machine, PORT the
# port of the first (default 29500).
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra hosts <<< "${HOSTS:-}"

if [ "${1:-}" = --on-machine ]; then  # runs on each machine, started over ssh below
  rank=$2
  shift 2
  # If ssh is gone, cat reads the rest of the output; on a closed pipe the run could not be saved.
  exec > >(sed -u "s/^/${hosts[rank]}: /"; cat > /dev/null) 2>&1
  PATH=$PWD/.venv/bin:$PATH
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  torchrun --nnodes "${#hosts[@]}" --nproc_per_node "${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}" \
    --node_rank "$rank" --master_addr "${hosts[0]#*@}" --master_port "${PORT:-29500}" \
    --rdzv_conf timeout=120 -m cifar_dist.train --resume auto "$@" &
  torchrun=$!
  # ssh forwards no signals, but it closes stdin.
  { read -r || kill -TERM "$torchrun"; } <&0 > /dev/null 2>&1 &
  wait "$torchrun"
  exit
fi

if [ ${#hosts[@]} -eq 0 ] || [[ " $* " != *" --out"[\ =]* ]]; then
  echo 'error: use HOSTS="node1 node2" bash launch/multi_machine.sh --out SHARED/run ...' >&2
  exit 2
fi
input=$(mktemp -u)
mkfifo -m 600 "$input"
exec 3<> "$input" 4< "$input"  # stdin of every ssh; closed when this script closes 3 or dies
rm "$input"
for rank in "${!hosts[@]}"; do
  command=(env "HOSTS=$HOSTS" "PORT=${PORT:-}" "NPROC_PER_NODE=${NPROC_PER_NODE:-}")
  command+=(bash "$PWD/launch/multi_machine.sh" --on-machine "$rank" "$@")
  ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15 "${hosts[rank]}" \
    "$(printf '%q ' "${command[@]}")" <&4 3>&- &
done

trap : INT TERM HUP  # a signal interrupts the wait below
code=0
for _ in "${hosts[@]}"; do
  wait -n || { code=$?; break; }
done
exec 3>&-
wait
exit "$code"
