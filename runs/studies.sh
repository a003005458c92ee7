#!/usr/bin/env bash
# Heads trained with one thing changed each (the paper's figures 4 and 5, and ours; table 4: ablation.sh).
# bash runs/studies.sh [DATA, files by absolute path]: a table per variant in out/studies/NAME/eval.json; goes on where it was stopped.
set -euo pipefail
data=${1:-pydoc,made}
cd "$(dirname "$0")/.."
run() {
  out=out/studies/$1
  [ ! -f "$out/eval.json" ] || return 0
  [ ! -f "$out/config.json" ] || set -- "$1" --resume
  python train.py --out_dir "$out" --max_prompts 150 --data "$data" "${@:2}"
}
run distill --distill
run grad_norm --teacher grad_norm
run over_all --over all
for stages in 1 2 5; do run "stages_$stages" --stages "$stages"; done
for layer in 1 2 8; do run "first_layer_$layer" --first_layer "$layer" --stages 1 --ratio 0.7; done
run span_16 --span 16
run floor --span 16 --shares 4:0.75,25:0
