#!/usr/bin/env bash
# Train on this machine: on all its GPUs, else on the CPU. Makes .venv and installs on first use.
#
#   bash launch/local.sh                          a first run, the recipe `smoke`
#   bash launch/local.sh --config tutorial ...    anything that cifar_dist.train takes
#   NUM_PROCESSES=2 bash launch/local.sh          that many processes, also on the CPU
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

# --quiet: a refusal is then one line, without the launcher's own traceback after it.
exec .venv/bin/accelerate launch --quiet "${flags[@]}" -m cifar_dist.train "$@"
