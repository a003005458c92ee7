#!/usr/bin/env bash
# The paper's figures 1 and 2 (results/saliency), on a prompt with a question.
set -euo pipefail
cd "$(dirname "$0")/.."
python saliency.py --out_dir results/saliency --prompt "The Amazon rainforest covers most of the Amazon \
basin of South America. The basin covers 7,000,000 square kilometres, of which 5,500,000 are covered by \
the rainforest. Brazil holds 60% of the forest, followed by Peru with 13% and Colombia with 10%. Question: \
which country holds most of the rainforest? Answer: Brazil."
