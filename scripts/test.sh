#!/usr/bin/env bash
# All tests, offline, on any machine; makes the environment first if need be.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export HF_HUB_OFFLINE=1 HF_EVALUATE_OFFLINE=1
.venv/bin/ruff check .
.venv/bin/python -m pytest "$@"
