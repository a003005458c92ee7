"""Beyond the paper: heads that see the question, on top of train.py. Nothing here is the paper's.

    python beyond.py                                  # as train.py, with its flags
    python beyond.py --data FILE.jsonl,pydoc,made     # rows of your own, windows and made questions
    python eval_tasks.py --heads out/heads ...        # every script takes the heads

A causal model's state of a token cannot depend on what is asked after it. So these heads also get
how each token matches the prompt's last ones, which hold the question, and where it stands. They
score once, before layer 0, in spans of 16; from layer 25 on the protected tokens alone are alive.
They learn by imitation: their scores of spans should rank as the labels, the paper's, do (L_list).
No model runs for it but the teacher.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import cli
import train
from sdtp import PruneHead, is_protected

LAST = 32  # tokens of a prompt that may be the question
MATCHES, RANK = 8, 16  # products of a token with each of them, and their width
POWER = 0.5  # of the labels in L_list: at 1 the few largest are all that counts, at 0 nothing does


@dataclass
class BeyondConfig(train.TrainConfig):
    data: str = "dolly,pydoc,made"  # as train.py's
    shares: str = "0:0.785,25:0"  # LAYER:SHARE with commas; 0: the protected tokens alone
    span: int = 16  # neighbouring tokens that are kept or dropped together

    def __post_init__(self):
        if (self.lm_weight, self.mse_weight, self.rank_weight, self.distill) != (1, 1, 1, False):
            raise ValueError(
                "--lm_weight, --mse_weight, --rank_weight, --distill: not in beyond.py"
            )


class QuestionHead(PruneHead):
    """Paper eq. 1 on a token's normed state, its matches with the last tokens, and its place."""

    def __init__(self, hidden_size):
        super().__init__(hidden_size + 2 * MATCHES + 4)
        self.q_proj = nn.Linear(hidden_size, MATCHES * RANK, bias=False)
        self.k_proj = nn.Linear(hidden_size, MATCHES * RANK, bias=False)

    def logits(self, x, positions=None, seqlens=None, block=None):
        """As PruneHead.logits; all prompts' last tokens are among the rows."""
        x, parts = block.input_layernorm(x), []
        for rows, p in zip(x.split(seqlens), positions.split(seqlens)):
            parts.append(torch.cat((rows, self.matches(rows), place(p).to(x.dtype)), -1))
        return super().logits(torch.cat(parts))

    def matches(self, x):
        """x: (T, hidden_size) of one prompt -> (T, 2 * MATCHES): of each token's products with the
        last tokens the largest, and the logarithm of the mean of their exponentials."""
        q = F.linear(x[-LAST:], self.q_proj.weight.to(x.dtype)).unflatten(-1, (MATCHES, RANK))
        k = F.linear(x, self.k_proj.weight.to(x.dtype)).unflatten(-1, (MATCHES, RANK))
        products = torch.einsum("tmr,lmr->tml", k, q) * RANK**-0.5
        largest, summed = products.amax(-1), products.logsumexp(-1)
        return torch.cat((largest, summed - products.new_tensor(products.shape[-1]).log()), -1)


def place(positions):
    """positions: (T,) of one prompt, the last token's among them -> (T, 4) float32: the share of it
    before a token, and logarithms of the distances to both its ends and of its length."""
    p, n = positions.float(), positions[-1] + 1.0
    logs = torch.stack((p + 1, n - p, n.expand(len(p)))).log() / 8
    return torch.cat((p[None] / n, logs)).T


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
    """As train.losses: L_list, summed over the stages; the model runs, dense, up to the last."""
    n, loss, last = len(example.prompt), 0.0, max(heads)
    x = model.embed(torch.tensor(example.prompt, device=model.device))
    positions = model.positions([n])
    free = ~is_protected(positions, n)
    for layer, block in enumerate(model.layers[: last + 1]):
        if layer in heads:
            score = heads[layer](x, positions, [n], block)[free]
            loss = loss + list_loss(score, labels[layer][free], positions[free] // config.span)
        if layer < last:
            x = block(x, positions, [n])
    return loss, {"list": loss}


def main():
    train.main(BeyondConfig, __doc__, QuestionHead, losses)


if __name__ == "__main__":
    cli.run(main)
