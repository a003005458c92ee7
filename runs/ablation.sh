#!/usr/bin/env bash
# The paper's table 4: heads without L_rank, and without L_rank and L_mse, three seeds each.
# bash runs/ablation.sh ROWS.jsonl: 300 prompts, then one table on 64 held-out rows; goes on where it was stopped.
# Two processes: RUN="torchrun --standalone --nproc_per_node 2" bash runs/ablation.sh ROWS.jsonl
set -euo pipefail
rows=$(realpath "$1") folders=
cd "$(dirname "$0")/.."
for seed in 0 1 2; do
  for variant in all "no_rank --rank_weight 0" "no_rank_no_mse --rank_weight 0 --mse_weight 0"; do
    read -r name weights <<< "$variant"
    out=out/ablation/$name-$seed flags=(--data "$rows" --max_prompts 300 --seed "$seed" $weights)
    folders+=$out/heads,
    [ ! -f "$out/eval.json" ] || continue
    [ ! -f "$out/config.json" ] || flags=(--resume)
    mkdir -p out/ablation/labels "$out" && ln -sfn ../labels "$out/labels"  # the same for all
    ${RUN:-python} train.py --out_dir "$out" "${flags[@]}"
  done
done
${RUN:-python} eval_tasks.py --data "$rows" --limit 64 --methods sdtp --heads "${folders%,}" \
  --rows out/ablation/rows.jsonl --json out/ablation/table.json
