#!/usr/bin/env bash
# SmolLM2-135M on SuperNI: bash scripts/smollm2_superni.sh full|short|cpu [arguments of sweep.sh]
#   full   the paper's protocol, for a GPU: 10 epochs, batches of 8, five seeds
#   short  1 epoch, batches of 32, for a GPU: about a minute a mixed run, three a sequential one
#   cpu    the six tasks with the shortest inputs, 120 rows each, two seeds: 10 minutes a run
# Mixed runs of seed 1 come first, then sequential ones, then more seeds. PIECE=530 stops it after
# as many seconds; the same command goes on. Then: python report.py runs/smollm2-FORM --out report
set -euo pipefail
cd "$(dirname "$0")/.."
form=${1:?full, short or cpu}
shift
schedule="" extra=() only=(--no_single) launcher="accelerate launch --config_file scripts/accelerate/one_gpu.yaml"
settings="mixed sequential" seeds="1 2 3 4 5"
case $form in
  full) only=() ;;
  short) schedule=" --regroup_every 10" extra=(--epochs 1 --batch_size 32 --eval_batch_size 256) ;;
  cpu) schedule=" --regroup_every 30" launcher=python settings=mixed seeds="1 2"
    only+=(--tasks T591 T639 T1687 T875 T363 T1510)
    extra=(--max_eval_per_task 50 --max_length 256 --eval_batch_size 64 --epochs 1 --max_train_per_task 120) ;;
  *) echo "error: form $form is unknown; allowed: full, short, cpu" >&2; exit 2 ;;
esac
methods=(base "badit$schedule" lora-matched pissa-matched "loramoe$schedule")
[ "$form" = cpu ] || methods+=(lora pissa olora gainlora "badit --grouping random$schedule"
  "badit --no_bad$schedule" "badit --no_dog$schedule" "badit --no_bad --no_dog$schedule")
for seed in $seeds; do
  for setting in $settings; do
    left=$((${PIECE:-1000000} - SECONDS))
    timeout --signal TERM "$((left > 1 ? left : 1))" bash scripts/sweep.sh --models smollm2-135m \
      --launcher "$launcher" --runs "runs/smollm2-$form" --methods "${methods[@]}" \
      --seeds "$seed" --settings "$setting" "${only[@]}" "$@" -- "${extra[@]}"
  done
done
