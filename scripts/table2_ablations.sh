#!/usr/bin/env bash
# Table 2: BADIT without BAD, without DOG, without both, and with random regrouping, the control that
# shows whether a gain comes from DOG. Arguments as for scripts/sweep.sh.
# Then: python report.py runs/study --out report
set -euo pipefail
exec bash "$(dirname "$0")/sweep.sh" --settings mixed sequential --models qwen3-8b llama3-8b gemma2-9b \
  --methods badit badit-no_bad badit-no_dog badit-no_bad-no_dog badit-random "$@"
