#!/usr/bin/env bash
# SmolLM2-135M on SuperNI, for a GPU: bash scripts/smollm2_superni.sh full|short [arguments of sweep.sh]
#   full   the paper's protocol: 10 epochs, batches of 8, five seeds
#   short  1 epoch, batches of 32 (--dry-run estimates the cost of both)
# Mixed runs of seed 1 come first, then sequential ones, then more seeds. PIECE=530 stops it after
# so many seconds; the same command goes on. Then: python report.py runs/smollm2-FORM --out report
set -euo pipefail
cd "$(dirname "$0")/.."
form=${1:-} failed=0 PIECE=${PIECE:-31536000}
case $form in
  full) sweep=() flags=() often="" ;;
  short) sweep=(--no_single) flags=(--epochs 1 --batch_size 32 --eval_batch_size 256)
    often=" --regroup_every 10" ;;  # one epoch has no regrouping by itself
  *) echo "error: form '$form' is unknown; allowed: full, short" >&2; exit 2 ;;
esac
shift
methods=(zero_shot "badit$often" lora-matched pissa-matched "loramoe$often" "badit --grouping random$often"
  lora pissa olora gainlora "badit --no_bad$often" "badit --no_dog$often" "badit --no_bad --no_dog$often")
for seed in 1 2 3 4 5; do
  for setting in mixed sequential; do
    bash scripts/sweep.sh --models smollm2-135m --runs "runs/smollm2-$form" \
      "${sweep[@]}" --methods "${methods[@]}" --seeds "$seed" --settings "$setting" \
      --stop_after "$((SECONDS < PIECE ? PIECE - SECONDS : 1))" "$@" -- "${flags[@]}" ||
      { status=$?; [ $status = 1 ] || exit $status; failed=1; }  # 1: some runs failed
  done
done
exit $failed
