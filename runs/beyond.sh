#!/usr/bin/env bash
# What each part of beyond.py gives, on 1,000 prompts: bash runs/beyond.sh DOLLY.jsonl TEXT.txt BOOK.txt
set -euo pipefail
rows=$(realpath "$1") text=$(realpath "$2") book=$(realpath "$3")
cd "$(dirname "$0")/.."
without() { # NAME CHANGE SOURCES: train heads with a change to beyond.py, and measure them with it
  out=out/beyond/$1 code="import cli, saliency, torch, train, beyond as b, eval_tasks; $2; cli.run"
  mkdir -p out/beyond/labels "$out" && ln -sfn ../labels "$out/labels"  # the same for all
  [ -f "$out/eval.json" ] || ${RUN:-python} -c "$code(b.main)" --data "$rows$3" --out_dir "$out" --max_prompts 1000 --eval_prompts 1
  for what in "--data $rows --limit 128" "--text $text --limit 64" "--text $book --needles 1024 --limit 64"; do
    ${RUN:-python} -c "$code(eval_tasks.main)" $what --keep 0.9 --methods sdtp --heads "$out/heads" --rows out/beyond/rows.jsonl
  done
}
without nothing pass ,pydoc,made
without attention "b.attention_from_end = lambda x, p, block: x.new_zeros(len(x), 3)" ,pydoc,made
without place "b.place = lambda p: torch.zeros(len(p), 4, device=p.device)" ,pydoc,made
without middle_layer "b.label = saliency.stored_label" ,pydoc,made
without list_loss "b.list_loss = lambda score, labels, spans: train.rank_loss(score, labels)" ,pydoc,made
without windows_and_questions pass ""
