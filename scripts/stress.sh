#!/usr/bin/env bash
# Kill runs of SmolLM2 at random moments, resume them, and compare each with an undisturbed one.
# Goes on for MINUTES (default 10) and until the round under way is finished. Flags are passed on:
#   MINUTES=60 bash scripts/stress.sh --method gainlora --setting sequential
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
work=$(mktemp -d) kills=0 rounds=0 end=$((SECONDS + 60 * ${MINUTES:-10}))
trap 'rm -rf "$work"' EXIT
train() {
  .venv/bin/python train.py --model smollm2-135m --suite mini --max_train_per_task 4 \
    --max_eval_per_task 1 --max_new_tokens 8 --epochs 2 --checkpoint_every 1 "$@"
}
same() {  # every file, and results.json but for its key `run`
  diff -r --exclude results.json "$work/whole" "$work/killed"
  .venv/bin/python -c 'import json, sys
one, two = (json.load(open(f"{sys.argv[1]}/{name}/results.json")) for name in ("whole", "killed"))
del one["run"], two["run"]
sys.exit(one != two)' "$work"
}
start=$SECONDS
train "$@" --output_dir "$work/whole" > "$work/log" 2>&1 || { tail -n 3 "$work/log"; exit 1; }
whole=$((SECONDS - start))
echo "undisturbed run: $whole s"
while [ $SECONDS -lt $end ]; do
  rm -rf "$work/killed"
  until [ -e "$work/killed/results.json" ]; do
    train "$@" --output_dir "$work/killed" --resume > "$work/log" 2>&1 &
    for ((wait = 2 + RANDOM % whole; wait > 0; wait--)); do
      kill -0 $! 2>/dev/null && sleep 1
    done
    pkill -9 -P $! 2>/dev/null && kills=$((kills + 1))
    wait $! || [ $? = 137 ] || { tail -n 3 "$work/log"; exit 1; }
  done
  same || { echo "round $((rounds + 1)) differs"; exit 1; }
  rounds=$((rounds + 1))
  echo "$rounds rounds, $kills kills, all as if undisturbed"
done
