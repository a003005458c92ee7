#!/usr/bin/env bash
# The paper's table 4: heads without L_rank, and without L_rank and L_mse, three seeds each.
# bash runs/ablation.sh ROWS.jsonl: 300 prompts, then one table on 64 held-out rows; goes on where it was stopped.
set -euo pipefail
rows=$(realpath "$1")
cd "$(dirname "$0")/.."
folders=()
for seed in 0 1 2; do
  for name in all no_rank no_rank_no_mse; do
    out=out/ablation/$name-$seed flags=()
    case $name in no_rank*) flags+=(--rank_weight 0) ;; esac
    case $name in *no_mse) flags+=(--mse_weight 0) ;; esac
    folders+=("$out/heads")
    [ ! -f "$out/eval.json" ] || continue
    [ ! -f "$out/config.json" ] || flags=(--resume)
    [ "${flags[*]-}" = --resume ] || flags+=(--data "$rows" --max_prompts 300 --seed $seed)
    python train.py --out_dir "$out" "${flags[@]}"
  done
done
python eval_tasks.py --data "$rows" --limit 64 --methods sdtp --heads "$(IFS=,; echo "${folders[*]}")" \
  --rows out/ablation/rows.jsonl --json out/ablation/table.json
