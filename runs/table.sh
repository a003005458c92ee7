#!/usr/bin/env bash
# The table of README.md: bash runs/table.sh DOLLY.jsonl WIKITEXT-2.txt BOOK.txt; goes on where it was stopped.
# 128 held-out rows, 128 windows of a text, 64 needles in a book; every method in one run, at equal compute.
# Two processes: RUN="torchrun --standalone --nproc_per_node 2" bash runs/table.sh ...
set -euo pipefail
rows=$(realpath "$1") text=$(realpath "$2") book=$(realpath "$3")
cd "$(dirname "$0")/.."
heads=heads/smollm2-135m-q4
scorers=sdtp,teacher,random,most_recent,earliest,accumulated_attention,last_attention
peers=lazyllm,fastkv,gemfilter,self_information
table() {
  evaluate() { ${RUN:-python} eval_tasks.py "${@:2}" --rows "out/table/$kind.jsonl" --json "out/table/$kind-$1.json"; }
  kind=$1
  evaluate paper "${@:2}" --keep 0.9 --methods $scorers,$peers --heads $heads
  for ours in spans beyond; do evaluate $ours "${@:2}" --keep 0.9 --methods $scorers --heads $heads-$ours; done
  evaluate 0.8 "${@:2}" --keep 0.8 --methods sdtp,earliest,most_recent --heads $heads,$heads-spans
}
table dolly --data "$rows" --limit 128
table wikitext2 --text "$text" --limit 128
table needles --text "$book" --needles 1024 --limit 64
