#!/usr/bin/env bash
# Compare methods: bash scripts/compare.sh FORM [arguments of sweep.sh]. A FORM is:
#   mini        15 short tasks, 24 rows of each, two epochs: 3 minutes a run on one CPU thread in bf16
#   sequence    the same tasks in sequence, at rates tuned in sequence, with the Forget Rate
#   new-seeds   the same tasks in sequence, seeds 6 to 15, at rates that three seeds prefer; PiSSA
#               takes BADIT's
#   superni     the six SuperNI tasks with the shortest inputs, 64 rows of each, one epoch
#   instrument  the same six tasks, 200 rows of each, two epochs: 36 to 50 steps a task, 10 to 17 minutes
#               a run; in sequence, mixed, and on each task alone, for Forward; the methods that decide
#               the claims run first
# In each setting every method runs with the first seed, then every method with the next, and so on.
# Each has the learning rate that was tuned for it (docs/results.md); a method that was not tuned takes
# badit's.
# RATE=2e-4 sets one rate for all. After a stop the same command continues.
#   python report.py runs/compare-mini --out report
set -euo pipefail
cd "$(dirname "$0")/.."
trap : TERM INT  # of `timeout 530 bash scripts/compare.sh mini`: wait for the run to save
form=${1:-} failed=0 settings=(mixed sequential) seeds=(1 2 3 4 5)
six=(--suite superni --tasks T591 T639 T1687 T875 T363 T1510)
first=(lora-matched pissa-matched loramoe badit badit-random badit-no_dog badit-energy badit-energy-random)
declare -A often  # optimizer steps between regroupings: an epoch of a short task has too few
declare -A rates=([lora-matched]=1e-3 [pissa-matched]=5e-4 [loramoe]=2e-3 [badit]=5e-4)
case $form in
  mini) data=(--suite mini) often=([mixed]=15 [sequential]=3)
    rates+=([olora]=2e-3 [gainlora]=5e-3 [badit-no_bad]=5e-3)
    groups=("${first[*]} olora olora_qr-matched gainlora half badit-no_bad badit-static
      badit-energy-no_dog")
    flags=(--max_train_per_task 24 --epochs 2 --max_new_tokens 16) ;;
  sequence) data=(--suite mini) often=([sequential]=3) settings=(sequential)
    groups=("lora-matched badit badit-energy half pissa-matched")
    rates=([lora-matched]=1e-3 [badit]=2e-4)
    flags=(--max_train_per_task 24 --epochs 2 --max_new_tokens 16 --eval_tasks all) ;;
  new-seeds) data=(--suite mini) often=([sequential]=3) settings=(sequential) seeds=({6..15})
    groups=("lora-matched badit-energy half" "badit-energy-random pissa-matched badit")
    rates=([lora-matched]=1e-3 [badit-energy]=5e-4 [half]=5e-4 [badit-energy-random]=5e-4 [badit]=2e-4)
    flags=(--max_train_per_task 24 --epochs 2 --max_new_tokens 16) ;;
  superni) data=("${six[@]}") often=([mixed]=12 [sequential]=4) groups=("${first[*]}")
    flags=(--max_train_per_task 64 --max_eval_per_task 25 --epochs 1 --max_length 256) ;;
  instrument) data=("${six[@]}") often=([mixed]=10 [sequential]=10 [single]=10)
    settings=(sequential mixed single)
    groups=("lora-matched badit-energy badit half" "pissa-matched badit-energy-random loramoe
      badit-random badit-no_dog olora olora_qr-matched gainlora badit-no_bad badit-static")
    rates=([lora-matched]=1e-4 [half]=5e-5 [badit-energy]=5e-5 [badit-energy-random]=5e-5 [badit]=2e-4)
    flags=(--max_train_per_task 200 --max_eval_per_task 50 --epochs 2 --max_length 256) ;;
  *) echo "error: form '$form' is unknown; allowed: mini, sequence, new-seeds, superni, instrument" >&2; exit 2 ;;
esac
shift
for word in "$@"; do case $word in --settings*|--methods*)
  echo "error: $0 sets $word itself; to choose it, call scripts/sweep.sh" >&2
  exit 2 ;;
esac; done
for group in "${groups[@]}"; do for setting in "${settings[@]}"; do for seed in "${seeds[@]}"; do
  methods=(zero_shot) more=()
  for method in $group; do
    flag="$method --learning_rate ${RATE:-${rates[$method]:-${rates[badit]}}}"
    case $method in badit*|loramoe) flag+=" --regroup_every ${often[$setting]}" ;; esac
    methods+=("$flag")
  done
  [ "$setting" != sequential ] || [ "$form" = sequence ] || more=(--eval_tasks new)
  bash scripts/sweep.sh --models smollm2-135m --launcher "${LAUNCHER:-python}" "${data[@]}" \
    --runs "runs/compare-$form${RATE:+-$RATE}" --methods "${methods[@]}" \
    --seeds "$seed" --settings "$setting" "$@" -- --eval_loss --eval_batch_size 64 "${flags[@]}" "${more[@]}" ||
    { status=$?; [ "$status" = 1 ] || exit "$status"; failed=1; }  # 1: some runs failed
done; done; done
exit "$failed"
