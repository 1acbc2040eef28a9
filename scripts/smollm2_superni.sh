#!/usr/bin/env bash
# SmolLM2-135M on SuperNI: bash scripts/smollm2_superni.sh full|short|cpu [arguments of sweep.sh]
#   full   the paper's protocol, for a GPU: 10 epochs, batches of 8, five seeds
#   short  1 epoch, batches of 32, for a GPU (--dry-run estimates the cost of both)
#   cpu    the six tasks with the shortest inputs, 120 rows each, two seeds: some 10 minutes a run
# Mixed runs of seed 1 come first, then sequential ones, then more seeds. PIECE=530 stops it after
# so many seconds; the same command goes on. Then: python report.py runs/smollm2-FORM --out report
set -euo pipefail
cd "$(dirname "$0")/.."
form=${1:-} failed=0 PIECE=${PIECE:-31536000}
seeds="1 2 3 4 5" sweep=() launcher="accelerate launch --config_file scripts/accelerate/one_gpu.yaml"
case $form in
  full) flags=() ;;
  short) flags=(--epochs 1 --batch_size 32 --eval_batch_size 256) ;;
  cpu) seeds="1 2" launcher=python sweep=(--tasks T591 T639 T1687 T875 T363 T1510)
    flags=(--max_eval_per_task 50 --max_length 256 --eval_batch_size 64 --epochs 1 --max_train_per_task 120) ;;
  *) echo "error: form '$form' is unknown; allowed: full, short, cpu" >&2; exit 2 ;;
esac
shift
[ "$form" = full ] || sweep+=(--no_single)
for seed in $seeds; do
  for setting in mixed sequential; do
    more=()
    case $form-$setting in  # one epoch has no regrouping by itself
      full-*) often="" ;;
      short-*) often=" --regroup_every 10" ;;
      cpu-mixed) often=" --regroup_every 30" ;;
      cpu-sequential) often=" --regroup_every 5" more=(--eval_tasks seen) ;;
    esac
    methods=(zero_shot "badit$often" lora-matched pissa-matched "loramoe$often" "badit --grouping random$often")
    [ "$form" = cpu ] || methods+=(lora pissa olora gainlora "badit --no_bad$often"
      "badit --no_dog$often" "badit --no_bad --no_dog$often")
    bash scripts/sweep.sh --models smollm2-135m --launcher "$launcher" --runs "runs/smollm2-$form" \
      "${sweep[@]}" --methods "${methods[@]}" --seeds "$seed" --settings "$setting" \
      --stop_after "$((SECONDS < PIECE ? PIECE - SECONDS : 1))" "$@" -- "${flags[@]}" "${more[@]}" ||
      { status=$?; [ $status = 1 ] || exit $status; failed=1; }  # 1: some runs failed
  done
done
exit $failed
