#!/usr/bin/env bash
# Every run of a study, one after the other; the same command goes on with whatever was stopped.
#   bash scripts/sweep.sh --dry-run                  # the commands of the paper's study, their cost
#   bash scripts/sweep.sh --models qwen3-4b --seeds 1 -- --gradient_checkpointing
#   bash scripts/sweep.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
exec python scripts/study.py "$@"
