#!/usr/bin/env bash
# Random weights of a model's exact size: load, labels, a training step, prefill and text, each with its time and peak memory.
# bash runs/real_size.sh FOLDER SHAPE, as in: out/7b llama2-7b; FOLDER holds a tokenizer, weights are written to it (three shards).
set -euo pipefail
folder=$(realpath "$1") shape=$2
cd "$(dirname "$0")/.."
[ -f "$folder/model.safetensors.index.json" ] || python - "$folder" "$shape" <<'PYTHON'
import sys
from bench import write_random
write_random(*sys.argv[1:], shards=3)
PYTHON
peak() {
  python -c 'import resource as r, subprocess, sys, time; t = time.time(); code = subprocess.call(sys.argv[1:])
print(f"{time.time() - t:.0f} s, {r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss / 1e6:.1f} GB at most:", *sys.argv[1:]); sys.exit(code)' "$@"
}
peak python sample.py --ckpt "$folder" --dense --prompt "Once upon a time" --max_new_tokens 8
peak python bench.py --ckpt "$folder" --marking --lengths 640 --repeats 1
[ -f "$folder/run/eval.json" ] || peak python train.py --ckpt "$folder" --data pydoc --max_prompts 1 --eval_prompts 1 --epochs 1 --out_dir "$folder/run"
peak python bench.py --ckpt "$folder" --heads "$folder/run/heads" --lengths 2048 --new_tokens 8 --repeats 1
