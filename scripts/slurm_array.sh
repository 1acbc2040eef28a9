#!/usr/bin/env bash
#SBATCH --job-name=badit
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --output=slurm-%A_%a.out
# Run line I of a study's list in job I of a SLURM array, with the arguments of scripts/sweep.sh:
#   bash scripts/sweep.sh --dry-run --seeds 1 2 | wc -l                # 1224 lines, so
#   sbatch --array=0-1223 scripts/slurm_array.sh --seeds 1 2
# A model that is too large for one node, sharded over several, one task a node:
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=1 --array=0-59 scripts/slurm_array.sh \
#     --models /models/Llama-3-70B --settings mixed sequential -- --gradient_checkpointing \
#     --batch_size 1                                  # on 16 GPUs 16 rows a step, not the paper's 8
# A run that reaches its time limit saves; the same sbatch command resumes it and skips finished ones.
# Run scripts/setup.sh once before, on a node that sees the package index.
set -euo pipefail
if [ -z "${SLURM_SUBMIT_DIR:-}" ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  echo "error: start this from the folder of train.py with sbatch --array=0-N" >&2; exit 2
fi
cd "$SLURM_SUBMIT_DIR"
several=() launcher=()
if [ "${SLURM_NNODES:-1}" -gt 1 ]; then  # the processes find each other by torchrun's rendezvous
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  several=(srun --ntasks-per-node=1 --kill-on-bad-exit=1)
  launcher=(--launcher "accelerate launch --config_file scripts/accelerate/sharded.yaml \
    --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) \
    --rdzv_backend c10d --main_process_ip $first --main_process_port 29500")
fi
exec "${several[@]}" bash scripts/sweep.sh --nth "$SLURM_ARRAY_TASK_ID" "${launcher[@]}" "$@"
