#!/usr/bin/env bash
# Lint, type-check and test. Makes .venv with the test extra on first use; arguments go to pytest:
#
#   bash tests/run.sh              what every change must pass
#   bash tests/run.sh -m slow      the long tests
set -euo pipefail
cd "$(dirname "$0")/.."

if [ ! -e .venv/installed-test ] || [ pyproject.toml -nt .venv/installed-test ]; then
  echo "installing into .venv (once; several gigabytes on Linux)"
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/python -m pip install --quiet --editable '.[test]'
  touch .venv/installed .venv/installed-test
fi

for script in launch/*.sh launch/*.sbatch tests/*.sh .ci/run; do bash -n "$script"; done
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 2 "$@"  # two at a time: most of it is waiting for imports
