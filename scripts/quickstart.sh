#!/usr/bin/env bash
# Train BADIT on SmolLM2-135M and the shipped mini suite: a few minutes on two CPU cores. Only Python
# packages are downloaded. Results are in runs/quickstart (then -2, -3, ...).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
precision=no  # bf16 where the CPU has its products: a step then takes two thirds of the time
if grep -qm1 avx512_bf16 /proc/cpuinfo 2>/dev/null; then precision=bf16; fi
output=runs/quickstart n=1
while [ -e "$output" ]; do n=$((n + 1)) output=runs/quickstart-$n; done
launch=(accelerate launch --num_processes 1 --num_machines 1 --mixed_precision "$precision"
  --dynamo_backend no --num_cpu_threads_per_process "$(nproc)" train.py)
flags=(--model smollm2-135m --suite mini --setting mixed --epochs 2 --max_train_per_task 24
  --learning_rate 5e-4 --max_new_tokens 20 --eval_before)
"${launch[@]}" --method badit "${flags[@]}" --output_dir "$output"
python report.py "$output" | tail -n 2  # the table is printed above
ask=
if [ -e generate.py ]; then  # generate.py and export.py may be deleted, see README.md
  question="Which word means the opposite of cheap?"
  asked="Answer with one word that means the opposite."
  echo "asked the base model and the trained one: $asked $question"
  python generate.py --adapter "$output/adapter" --definition "$asked" "$question" --compare_base \
    --max_new_tokens 20
  ask="
  python generate.py --adapter $output/adapter --chat                  # ask it something else
  python export.py $output/adapter --approximate --out exported        # for PEFT, transformers, vLLM"
fi
echo "adapter: $output/adapter
next, after \`source .venv/bin/activate\`:$ask
  python train.py --eval_only --adapter $output/adapter                # score the adapter again
  python train.py --method badit --setting sequential --eval_before    # the tasks one after the other

and to compare it with LoRA of as many parameters and the same scaling, trained alike:
  ${launch[*]} --method lora --match_parameters badit ${flags[*]}"
