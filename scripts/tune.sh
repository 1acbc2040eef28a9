#!/usr/bin/env bash
# Each method's learning rate, by the loss of rows that nothing else uses: bash scripts/tune.sh
# [arguments of sweep.sh]. Mixed training on the mini suite with a seed that no comparison takes; the
# last training rows of every task are left out of training and answered in place of test rows.
# RATES="2e-4 5e-4" tries others. The same command goes on after a stop. It ends with the table and
# the figure, runs/tune/report/tuning.md.
set -euo pipefail
cd "$(dirname "$0")/.."
RATES=${RATES:-1e-4 2e-4 5e-4 1e-3 2e-3} methods=() failed=0
for rate in $RATES; do
  for method in lora-matched pissa-matched olora gainlora "loramoe --regroup_every 15" \
    "badit --regroup_every 15" "badit-no_bad --regroup_every 15" "badit-energy --regroup_every 15"; do
    methods+=("$method --learning_rate $rate")
  done
done
bash scripts/sweep.sh --models smollm2-135m --launcher "${LAUNCHER:-python}" --suite mini \
  --runs runs/tune --no_single --seeds 101 --settings mixed --methods "${methods[@]}" "$@" -- \
  --validation 6 --max_train_per_task 24 --epochs 2 --eval_loss --max_new_tokens 1 \
  --eval_batch_size 64 || { failed=$?; [ $failed = 1 ] || exit $failed; }  # 1: some runs failed
case " $* " in *" --dry-run "* | *" --help "*) exit 0 ;; esac
.venv/bin/python report.py runs/tune --tuning --out runs/tune/report
exit $failed
