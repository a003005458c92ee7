"""Beyond the paper: heads that see the question, on top of train.py. Nothing here is the paper's.

    python beyond.py                                  # as train.py, with its flags
    python beyond.py --data FILE.jsonl,pydoc,made     # rows of your own, windows and made questions
    python eval_tasks.py --heads out/heads ...        # every script takes the heads
    load_heads("out/heads", model, QuestionHead)      # in Python: as sdtp.load_heads()

A causal model's state of a token cannot depend on what is asked after it. So these heads also get
how much the prompt's end attends to the token, and where it stands. They score once, before layer
0, in spans of 16; from layer 25 of 30 on the protected tokens alone are alive. They learn to
imitate labels (L_list): not those of layer 0, where an early token counts for all that is read of
it later, but those of the middle layer, whose states the later layers read when they answer. (The
`teacher` of the final table has labels of layer 0.) What was measured owes most to these labels and
to L_list, and little to the attention (results/README.md).
"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass

import torch

import cli
import data
import saliency
import train
from model import attention_weights
from parallel import over_heads
from sdtp import PruneHead, is_protected

LAST = 32  # tokens of a prompt's end, which may be the question
LABEL_SPAN = 8  # neighbouring tokens that are one in L_list
POWER = 0.5  # of the labels in L_list: at 1 the few largest are all that counts, at 0 nothing does
LENGTHS = 256, 512, 1024  # tokens of windows and of made prompts


@dataclass
class BeyondConfig(train.TrainConfig):
    data: str = "dolly,pydoc,made"  # of pydoc,made,dolly,FILE.jsonl,FILE.txt
    shares: str = "0:0.785,25:0"  # LAYER:SHARE with commas, one share above 0; 25: of 30 layers
    span: int = 16
    epochs: int = 4

    def __post_init__(self):
        if (self.lm_weight, self.mse_weight, self.rank_weight, self.distill) != (1, 1, 1, False):
            flags = "--lm_weight, --mse_weight, --rank_weight, --distill"
            raise ValueError(f"{flags} have no effect: beyond.py has a loss of its own")


class QuestionHead(PruneHead):
    """Paper eq. 1 on a token's normed state, the attention from the prompt's end, and the place."""

    def __init__(self, hidden_size):
        super().__init__(hidden_size + 3 + 4)

    def logits(self, x, positions=None, seqlens=None, block=None):
        """As PruneHead.logits; no token of a prompt has been dropped yet."""
        parts = []
        for rows, p in zip(x.split(seqlens), positions.split(seqlens)):
            rows = block.input_layernorm(rows)
            more = torch.cat((attention_from_end(rows, p, block), place(p)), -1)
            parts.append(torch.cat((rows, more.to(x.dtype)), -1))
        return super().logits(torch.cat(parts))


def attention_from_end(x, positions, block):
    """x: (T, hidden_size) of one prompt, normed -> (T, 3): log(T a) / 4, where a is the attention
    of `block` to a token, mean over the heads and over the last 1, 8 and LAST queries.

    The divisors here and in place() bring them near 1, as the numbers of a normed state are.
    """
    attention = block.self_attn
    q, (k, _) = attention.q(x[-LAST:], positions[-LAST:]), attention.kv(x, positions)
    weights = attention_weights(q, k, positions[-LAST:], positions, attention.extras)
    rows = over_heads(weights.mean(0))  # (LAST, T)
    parts = [rows[-last:].mean(0) for last in (1, 8, LAST)]
    return (torch.stack(parts, -1) * len(x)).clamp(min=1e-6).log() / 4


def place(positions):
    """positions: (T,) of one prompt, the last token's among them -> (T, 4) float32: the share of it
    before a token, and logarithms of the distances to both its ends and of its length."""
    p, n = positions.float(), positions[-1] + 1.0
    logs = torch.stack((p + 1, n - p, n.expand(len(p)))).log() / 8
    return torch.cat((p[None] / n, logs)).T


def label(model, example, layers, config, folder):
    """saliency.stored_label() of the middle layer's input, as the labels of the stage."""
    middle = len(model.layers) // 2
    labels = saliency.stored_label(model, example, [middle], config, folder)
    return dict.fromkeys(layers, labels[middle])


def list_loss(score, labels, spans):
    """-sum_i t_i log softmax(scores)_i over the spans i of a prompt, t_i: labels_i^POWER over their
    sum (ListNet, Cao et al. 2007); a span's score and label are means over its tokens.

    score, labels: (T,) of the tokens that may be dropped; spans: (T,) the number of each one's.
    """
    _, spans, counts = spans.unique(return_inverse=True, return_counts=True)
    both = score.new_zeros(2, len(counts)).index_add(1, spans, torch.stack((score, labels)))
    score, labels = both / counts
    target = labels.clamp(min=1e-30) ** POWER
    return -(target / target.sum() * score.log_softmax(-1)).sum()


def losses(model, heads, schedule, example, labels, config, generator):
    """As train.losses: L_list, at the one stage that scores. The model runs only up to it."""
    [(layer, head)] = heads.items()
    x = model.embed(torch.tensor(example.prompt, device=model.device))
    positions = model.positions([len(x)])
    for block in model.layers[:layer]:
        x = block(x, positions, [len(x)])
    free = ~is_protected(positions, len(x))
    score = head(x, positions, [len(x)], model.layers[layer])[free]
    loss = list_loss(score, labels[layer][free], positions[free] // LABEL_SPAN)
    return loss, {"list": loss}


def load(source, tokenizer, max_prompt):
    """As data.load(), windows and made prompts of LENGTHS up to max_prompt; none comes twice."""
    loaded, parts = [], []
    for n in [n for n in LENGTHS if n <= max_prompt] or LENGTHS[:1]:
        with redirect_stdout(None if loaded else sys.stdout):  # the rows are the same: said once
            loaded.append(data.load(source, tokenizer, prompt_len=n, max_prompt=max_prompt))
    for lists in zip(*loaded):  # training, then held out
        each_once = {tuple(example.prompt): example for example in data.in_turn(*lists)}
        parts.append([*each_once.values()])
    return parts


def main():
    config = cli.parse(BeyondConfig, __doc__)
    if sum(share > 0 for share in train.make_schedule(config, 99).values()) != 1:
        raise ValueError(f"--shares {config.shares}: one share above 0, as these heads score once")
    train.main(config, QuestionHead, losses, label, load)


if __name__ == "__main__":
    cli.run(main)
