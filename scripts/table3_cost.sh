#!/usr/bin/env bash
# Table 3: seconds of each part of a run, relative to LoRAMoE's; one seed, mixed training, all on
# the same idle machine. Arguments as for scripts/sweep.sh. Then: python report.py runs/study --out report
set -euo pipefail
exec bash "$(dirname "$0")/sweep.sh" --seeds 1 --settings mixed \
  --methods lora loramoe pissa badit badit-no_dog badit-no_bad "$@"
