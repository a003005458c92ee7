#!/usr/bin/env bash
# Needles in 2,048 and 4,096 tokens, 32 of each: bash runs/long_needles.sh BOOK.txt; goes on where it was stopped.
# Two processes: RUN="torchrun --standalone --nproc_per_node 2" bash runs/long_needles.sh BOOK.txt
set -euo pipefail
book=$(realpath "$1") heads=heads/smollm2-135m-q4
cd "$(dirname "$0")/.."
find_needles() {
  ${RUN:-python} eval_tasks.py --text "$book" --needles 2048,4096 --limit 32 --keep 0.9 \
    --rows out/table/long.jsonl --json "out/table/long-$1.json" --methods "$2" --heads "$3"
}
find_needles heads sdtp $heads-beyond,$heads,$heads-spans
find_needles scorers random,most_recent,earliest,accumulated_attention,last_attention $heads-beyond
find_needles peers lazyllm,fastkv,gemfilter,self_information $heads
