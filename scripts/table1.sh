#!/usr/bin/env bash
# Table 1: six models, six methods and the untrained model, five seeds, both settings.
# Arguments as for scripts/sweep.sh. Then: python report.py runs/study --out report
set -euo pipefail
exec bash "$(dirname "$0")/sweep.sh" \
  --methods zero_shot lora pissa olora_qr loramoe gainlora badit "$@"
