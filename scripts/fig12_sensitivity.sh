#!/usr/bin/env bash
# Fig. 12: BADIT with other numbers of experts K and other ranks r. The paper gives its values
# in the figure only; these double from 2 to 16 and from 1 to 16. Arguments as for scripts/sweep.sh.
# Then: python report.py runs/study --out report
set -euo pipefail
exec bash "$(dirname "$0")/sweep.sh" --settings mixed sequential --models qwen3-8b llama3-8b gemma2-9b --methods \
  badit badit-K2 badit-K4 badit-K16 badit-r1 badit-r2 badit-r8 badit-r16 "$@"
