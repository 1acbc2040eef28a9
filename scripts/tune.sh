#!/usr/bin/env bash
# Find each method's learning rate by the loss of training rows that are held out for it:
# bash scripts/tune.sh [mini|sequence|instrument] [arguments of sweep.sh]
#   mini        mixed training on the mini suite (the default)
#   sequence    the same rows in sequence
#   instrument  sequential training on the six SuperNI tasks of compare.sh instrument
# The last training rows of every task are left out of training and answered in place of test rows,
# with a seed that no comparison uses. RATES="2e-4 5e-4" tries others. ROWS=24 trains the instrument on
# fewer rows, so with fewer steps; `report.py --tuning` joins such runs. After a stop the same command
# continues. It ends with the table and the figure, runs/tune/report/tuning.md.
set -euo pipefail
cd "$(dirname "$0")/.."
form=mini methods=() failed=0 runs=runs/tune
case ${1:-} in mini|sequence|instrument) form=$1; shift ;; esac
if [ "$form" != instrument ]; then
  data=(--suite mini --settings mixed) rates="1e-4 2e-4 5e-4 1e-3 2e-3" often=15
  names=(lora-matched pissa-matched olora olora_qr-matched gainlora loramoe badit badit-no_bad
    badit-energy)
  flags=(--validation 6 --max_train_per_task 24 --epochs 2)
  if [ "$form" = sequence ]; then
    data=(--suite mini --settings sequential) often=3 names+=(half) flags+=(--eval_tasks new)
  fi
else
  data=(--suite superni --tasks T591 T639 T1687 T875 T363 T1510 --settings sequential)
  rows=${ROWS:-200} rates="5e-5 1e-4 2e-4 5e-4" runs=runs/tune-instrument${ROWS:+-$ROWS}
  often=$((rows > 60 ? rows / 20 : 3))  # five times a task, or every third step
  names=(lora-matched pissa-matched half olora olora_qr-matched gainlora loramoe badit badit-no_bad
    badit-static badit-energy)
  flags=(--validation 40 --max_train_per_task "$rows" --epochs 2 --max_length 256 --eval_tasks new)
fi
for word in "$@"; do case $word in --settings*|--methods*)
  echo "error: $0 sets $word itself; to choose it, call scripts/sweep.sh" >&2
  exit 2 ;;
esac; done
for rate in ${RATES:-$rates}; do
  for name in "${names[@]}"; do
    flag="$name --learning_rate $rate"
    case $name in badit*|loramoe) flag+=" --regroup_every $often" ;; esac
    methods+=("$flag")
  done
done
bash scripts/sweep.sh --models smollm2-135m --launcher "${LAUNCHER:-python}" "${data[@]}" --runs "$runs" \
  --seeds 101 --methods "${methods[@]}" "$@" -- --eval_loss --max_new_tokens 1 \
  --eval_batch_size 64 "${flags[@]}" || { failed=$?; [ $failed = 1 ] || exit $failed; }  # 1: some failed
case " $* " in *" --dry-run "* | *" --help "*) exit 0 ;; esac
.venv/bin/python report.py "$runs" --tuning --out "$runs/report"
exit $failed
