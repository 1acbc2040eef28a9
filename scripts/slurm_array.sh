#!/usr/bin/env bash
#SBATCH --job-name=badit
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --output=slurm-%A_%a.out
# One line of the study's list per job of a SLURM array, with the arguments of scripts/sweep.sh:
#   bash scripts/sweep.sh --dry-run --seeds 1 2 | wc -l                # 1224 lines, so
#   sbatch --array=0-1223 scripts/slurm_array.sh --seeds 1 2
# A run that reaches its time limit saves; the same sbatch command goes on with it, and a finished
# one takes a second. Run scripts/setup.sh once before, on a node that sees the package index.
set -euo pipefail
if [ -z "${SLURM_SUBMIT_DIR:-}" ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  echo "error: start this from the folder of train.py with sbatch --array=0-N" >&2; exit 2
fi
cd "$SLURM_SUBMIT_DIR"
exec bash scripts/sweep.sh --nth "$SLURM_ARRAY_TASK_ID" "$@"
