#!/usr/bin/env bash
# Train on this machine, on all GPUs or else on the CPU. The first use creates .venv and installs.
#
#   bash launch/local.sh                          train the recipe `smoke`
#   bash launch/local.sh --config tutorial ...    any options of cifar_dist.train
#   NUM_PROCESSES=2 bash launch/local.sh          two processes, also on the CPU
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -e .venv/installed ] || [ pyproject.toml -nt .venv/installed ]; then
  echo "installing into .venv (once; several gigabytes on Linux)"
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/python -m pip install --quiet --editable .
  touch .venv/installed
fi

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
processes=${NUM_PROCESSES:-$((gpus > 0 ? gpus : 1))}
flags=(--num_machines 1 --num_processes "$processes" --mixed_precision no --dynamo_backend no)
[ "$processes" -gt 1 ] && flags+=(--multi_gpu --main_process_port 0)
[ $# -gt 0 ] || set -- --config smoke

# --quiet suppresses the launcher's traceback after the one-line error of a refused run.
exec .venv/bin/accelerate launch --quiet "${flags[@]}" -m cifar_dist.train "$@"
