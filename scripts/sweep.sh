#!/usr/bin/env bash
# Run a study, one run after the other. After a stop the same command continues; to stop it after a
# while: timeout 530 bash scripts/sweep.sh ...
#   bash scripts/sweep.sh --dry-run                  # the commands of the paper's study, their cost
#   bash scripts/sweep.sh --models qwen3-4b --seeds 1 -- --gradient_checkpointing
#   bash scripts/sweep.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
exec python scripts/study.py "$@"
