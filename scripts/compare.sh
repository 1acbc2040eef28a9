#!/usr/bin/env bash
# The comparison of the README, for a CPU: bash scripts/compare.sh mini|superni [arguments of sweep.sh]
#   mini     15 short tasks, 24 rows of each, two epochs: some 3 minutes a run with one thread, in bf16
#   superni  the six SuperNI tasks with the shortest inputs, 64 rows of each, one epoch
# Seed after seed, so that what has finished has all methods alike; each method at the learning rate
# that scripts/tune.sh finds for it, or all at RATE. After a stop the same command continues. Then: python report.py runs/compare-mini --out report
set -euo pipefail
cd "$(dirname "$0")/.."
trap : TERM INT  # of `timeout 530 bash scripts/compare.sh mini`: wait for the run to save
form=${1:-} failed=0
declare -A often  # optimizer steps between regroupings: one epoch has none by itself
case $form in
  mini) data=(--suite mini); often=([mixed]=15 [sequential]=3)
    flags=(--max_train_per_task 24 --epochs 2 --max_new_tokens 16) ;;
  superni) data=(--suite superni --tasks T591 T639 T1687 T875 T363 T1510); often=([mixed]=12 [sequential]=4)
    flags=(--max_train_per_task 64 --max_eval_per_task 25 --epochs 1 --max_length 256) ;;
  *) echo "error: form '$form' is unknown; allowed: mini, superni" >&2; exit 2 ;;
esac
shift
at() { echo "$1 --learning_rate ${RATE:-$2}${3:+ --regroup_every $3}"; }
for seed in 1 2 3 4 5; do
  for setting in mixed sequential; do
    more=() && [ "$setting" = mixed ] || more=(--eval_tasks new)
    methods=(zero_shot "$(at lora-matched 1e-3)" "$(at pissa-matched 5e-4)"
      "$(at loramoe 2e-3 "${often[$setting]}")")
    for variant in badit badit-random badit-no_dog badit-energy badit-energy-random; do
      methods+=("$(at "$variant" 5e-4 "${often[$setting]}")")
    done
    [ "$form" = superni ] || methods+=("$(at olora 2e-3)" "$(at gainlora 5e-3)"
      "$(at badit-no_bad 5e-3 "${often[$setting]}")" "$(at badit-energy-no_dog 5e-4 "${often[$setting]}")")
    bash scripts/sweep.sh --models smollm2-135m --launcher "${LAUNCHER:-python}" "${data[@]}" \
      --runs "runs/compare-$form${RATE:+-$RATE}" --no_single --methods "${methods[@]}" \
      --seeds "$seed" --settings "$setting" "$@" -- --eval_loss --eval_batch_size 64 "${flags[@]}" "${more[@]}" ||
      { status=$?; [ "$status" = 1 ] || exit "$status"; failed=1; }  # 1: some runs failed
  done
done
exit "$failed"
