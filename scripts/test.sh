#!/usr/bin/env bash
# Run ruff and all tests, offline; install the environment first if it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export HF_HUB_OFFLINE=1 HF_EVALUATE_OFFLINE=1
.venv/bin/ruff check .
.venv/bin/python -m pytest "$@"
