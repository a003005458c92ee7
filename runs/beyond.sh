#!/usr/bin/env bash
# What each part of beyond.py gives, on 1,000 prompts: bash runs/beyond.sh DOLLY.jsonl TEXT.txt BOOK.txt
set -euo pipefail
rows=$(realpath "$1") text=$(realpath "$2") book=$(realpath "$3") folders= && cd "$(dirname "$0")/.."
train() { # NAME CHANGE SOURCES: train heads with a change to beyond.py
  out=out/beyond/$1 folders+=out/beyond/$1/heads,
  [ ! -f "$out/eval.json" ] || return 0
  mkdir -p out/beyond/labels "$out" && ln -sfn ../labels "$out/labels"  # the same for all
  ${RUN:-python} -c "import cli, torch, saliency, train, beyond; $2; cli.run(beyond.main)" --data "$rows$3" --out_dir "$out" --max_prompts 1000
}
train all_parts pass ,pydoc,made
train no_attention "beyond.attention_from_end = lambda x, p, block: torch.zeros(len(x), 3)" ,pydoc,made
train no_end_state "beyond.end_state = torch.zeros_like" ,pydoc,made
train no_place "beyond.place = lambda p: torch.zeros(len(p), 4)" ,pydoc,made
train stage_labels "beyond.label = saliency.stored_label" ,pydoc,made
train rank_loss "beyond.list_loss = lambda score, labels, spans: train.rank_loss(score, labels)" ,pydoc,made
train rows_alone pass ""
for what in "--data $rows --limit 128" "--text $text --limit 64" "--text $book --needles 1024 --limit 64"; do
  ${RUN:-python} eval_tasks.py $what --keep 0.9 --methods sdtp --heads "${folders%,}" --rows out/beyond/rows.jsonl
done
