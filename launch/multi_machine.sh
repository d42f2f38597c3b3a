#!/usr/bin/env bash
# Train on several machines over ssh: on all GPUs of each, else in one process on its CPU.
#
#   HOSTS="node1 node2" bash launch/multi_machine.sh --config cifar10 --out SHARED/run
#
# Each has this checkout at the same path, with its .venv or with torchrun on its PATH, and lets ssh
# in without a password; the others reach the first by the name given here. Ctrl-C or TERM saves the
# run and ends it on all of them, the failure of one ends all; the same command continues the run.
# NPROC_PER_NODE sets the processes on each machine, PORT the port of the first (29500).
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra hosts <<< "${HOSTS:-}"

if [ "${1:-}" = --on-machine ]; then  # one of the machines, started by the lines below
  rank=$2
  shift 2
  # Were nobody left to read what it says, the run would fail instead of being saved: hence cat.
  exec > >(sed -u "s/^/${hosts[rank]}: /"; cat > /dev/null) 2>&1
  PATH=$PWD/.venv/bin:$PATH
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  torchrun --nnodes "${#hosts[@]}" --nproc_per_node "${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}" \
    --node_rank "$rank" --master_addr "${hosts[0]#*@}" --master_port "${PORT:-29500}" \
    --rdzv_conf timeout=120 -m cifar_dist.train --resume auto "$@" &
  torchrun=$!
  # ssh passes no signal on, but the end of its input.
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
exec 3<> "$input" 4< "$input"  # the input of every ssh; it ends when this script closes 3, or dies
rm "$input"
for rank in "${!hosts[@]}"; do
  command=(env "HOSTS=$HOSTS" "PORT=${PORT:-}" "NPROC_PER_NODE=${NPROC_PER_NODE:-}")
  command+=(bash "$PWD/launch/multi_machine.sh" --on-machine "$rank" "$@")
  ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15 "${hosts[rank]}" \
    "$(printf '%q ' "${command[@]}")" <&4 3>&- &
done

trap : INT TERM HUP  # a signal ends the waiting below
code=0
for _ in "${hosts[@]}"; do
  wait -n || { code=$?; break; }
done
exec 3>&-
wait
exit "$code"
