"""Saliency-driven Dynamic Token Pruning (Tao et al. 2025, arXiv 2504.04514): the method.

While a frozen LLM reads a prompt, tiny heads score the tokens at a few layers, the lowest are
dropped, and every later layer runs on fewer tokens. `prefill` below is the whole of it. LateKV is
ours: in the last layers what goes no further leaves keys and values.

    heads, schedule, _ = load_heads("heads/smollm2-135m-q4", model)
    logits, cache = prefill(model, torch.tensor(ids), heads, schedule)
    cache.alive, cache.seqlens()  # tokens alive and tokens held, per layer
"""

import hashlib
import json
import math
import os
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from model import KVCache, attend, attention_weights, read_json, visible

FIRST_TOKENS, LAST_SHARE = 4, 0.1  # always kept: the first 4 tokens and the last 10 % of the prompt


# ---------------------------------------------------------------------------- how many, and which


def keep_count(n, share, protected=0):
    """Tokens kept of a prompt of n: n * share rounded half up, at least `protected`, at least 1."""
    return min(n, max(protected, math.floor(n * share + 0.5), 1))


def protected_count(n):
    """How many tokens of a prompt of n are always kept."""
    return min(n, FIRST_TOKENS + keep_count(n, LAST_SHARE))


def is_protected(positions, n):
    """(T,) bool: which positions of a prompt of n tokens are always kept."""
    return (positions < FIRST_TOKENS) | (positions >= n - keep_count(n, LAST_SHARE))


def alive_count(n, share):
    """Tokens of a prompt of n alive after a stage with that share: keep_count with the protected ones as its floor."""
    return keep_count(n, share, protected_count(n))


class Schedule(dict):
    """{layer: share of the prompt alive from that layer on}; a stage at layer l scores the input of block l.

    Schedule(30) has the paper's stages, as many as fit: layers 4, 7, 10, ... (at most 10), where after
    stage s a share ratio**s is alive. Schedule(30, {4: 0.7, 10: 0.5}) is any other. span: neighbouring tokens
    that are scored, kept or dropped together (1: the paper's). A stage with a share of 0 leaves the protected tokens
    alone, and needs no scorer; late: a LateKV stands there, and the others stay in the caches. ValueError names a layer
    outside the model, a share outside [0, 1] or above the one before, a span below 1, or what late lacks.

    adaptive, not the paper's: a prompt keeps the spans that score threshold[layer] or more, so that one with little to lose
    drops more than another, and a long one more than a short one. The scores of different prompts must be comparable,
    as L_level of train.py makes them. calibrate() finds the thresholds by which prompts keep the shares together:
    mean_share() and alive() are expectations then. A threshold without adaptive changes nothing.
    """

    def __init__(
        self, num_hidden_layers, shares=None, *, first_layer=4, step=3, stages=10, ratio=0.9, span=1,
        threshold=None, adaptive=False, late=False,
    ):  # fmt: skip
        if shares is None:
            layers = range(first_layer, num_hidden_layers, step)[:stages]
            shares = {layer: ratio ** (s + 1) for s, layer in enumerate(layers)}
        super().__init__(sorted((int(layer), float(share)) for layer, share in shares.items()))
        self.num_hidden_layers, self.span, self.adaptive, self.late = num_hidden_layers, span, adaptive, late
        self.threshold = {int(layer): float(score) for layer, score in (threshold or {}).items()}
        if span < 1:
            raise ValueError(f"the schedule has spans of {span} tokens; at least 1 is needed")
        if not self:
            raise ValueError(
                f"the schedule has no stage: first layer {first_layer} in a model of {num_hidden_layers} layers"
            )
        previous = 1.0
        for layer, share in self.items():
            if not 0 <= layer < num_hidden_layers:
                raise ValueError(
                    f"the schedule has a stage at layer {layer}, the model has layers 0 to {num_hidden_layers - 1}"
                )
            if not 0 <= share <= previous:
                raise ValueError(
                    f"the schedule's share at layer {layer} is {share}; it must lie between 0 and {previous}, the share before"
                )
            previous = share
        if late and len(self) - len(self.scored()) != 1:
            raise ValueError("a schedule with late=True needs one stage with a share of 0")
        scores = self.threshold
        if (scores or adaptive) and not (sorted(scores) == self.scored() and all(map(math.isfinite, scores.values()))):
            raise ValueError(
                f"an adaptive schedule needs a threshold, a number, at each of layers {self.scored()}, not {scores}; calibrate() finds it"
            )

    def with_shares(self, shares, **thresholds):
        """Other shares with the same span and, at a share of 0, the same LateKV; thresholds: threshold and adaptive."""
        return Schedule(self.num_hidden_layers, shares, span=self.span, late=self.late, **thresholds)

    def as_adaptive(self):
        """The same, adaptive; ValueError without thresholds."""
        return self.with_shares(self, threshold=self.threshold, adaptive=True)

    def scored(self):
        """The layers whose stage needs a scorer."""
        return [layer for layer, share in self.items() if share]

    def mean_share(self):
        """Share of a long prompt alive, mean over the layers: what linear FLOPs go by, a LateKV's aside. The last tenth
        always is."""
        ends = [*list(self)[1:], self.num_hidden_layers]
        alive = min(self) + sum(
            max(share, LAST_SHARE) * (end - layer) for (layer, share), end in zip(self.items(), ends)
        )
        return alive / self.num_hidden_layers

    def fitted(self, cost, budget):
        """A Schedule of these stages and span that costs `budget`, as nearly as counts of tokens allow: all shares raised to one power.

        cost: function of a Schedule, in units of a dense prefill, that falls as shares fall. A stage with share 0 keeps it;
        if it alone makes the schedule cheaper than the budget, it moves to the first later layer where it does not, or is
        left out, unless a LateKV holds it. A budget that cannot be spent gives shares of 1. ValueError for one out of
        reach: all tokens are alive below the first stage.
        """

        def powered(power):
            shares = {layer: share and share**power for layer, share in self.items()}
            return self.with_shares(shares)

        if cost(self) == budget:
            return self
        scored = {layer: self[layer] for layer in self.scored()}
        if not self.late and 0 < len(scored) < len(self) and cost(powered(0)) < budget:
            floor = min(self.keys() - scored) + 1
            shares = scored | ({floor: 0.0} if floor < self.num_hidden_layers else {})
            return self.with_shares(shares).fitted(cost, budget)
        low, high = 0.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(powered(middle)) > budget else (low, middle)
        if cost(powered(high)) > budget + 1e-6:
            raise ValueError(
                f"stages at layers {list(self)} cannot cost as little as {budget:.3f} of a dense prefill: start lower, or keep more"
            )
        return min(powered(high), powered(low), key=lambda schedule: abs(cost(schedule) - budget))

    def with_ratio(self, ratio):
        """fitted() to the mean_share() of the paper's stages at that ratio: on the paper's own, shares of ratio**s."""
        return self.fitted(Schedule.mean_share, paper_stages(self.num_hidden_layers, ratio).mean_share())

    def shares(self, layer, scores, positions, seqlens, prompt_lens):
        """The share that each of the packed prompts keeps at a stage: the schedule's, or what its scores ask for."""
        if not (self.adaptive and self[layer]):
            return [self[layer]] * len(seqlens)
        parts = zip(scores.split(seqlens), positions.split(seqlens), prompt_lens)
        return [adaptive_share(*part, self.threshold[layer], self.span) for part in parts]

    def alive(self, n, shares=None):
        """Tokens of a prompt of n that are alive at each layer, a list of num_hidden_layers counts; shares: {layer: its own}."""
        counts, count = [], n
        for layer in range(self.num_hidden_layers):
            if layer in self:
                count = alive_count(n, (shares or self)[layer])
            counts.append(count)
        return counts


def paper_stages(num_hidden_layers, ratio=0.9):
    """The paper's Schedule; in a model of fewer than five layers, a stage at the last."""
    return Schedule(num_hidden_layers, first_layer=min(4, num_hidden_layers - 1), ratio=ratio)


def bin_means(values, bins, count):
    """(count,) the mean of the values in each bin, bins: (T,) long: no copy to the CPU, which a GPU would wait for."""
    sums = values.new_zeros(2, count).index_add(1, bins, torch.stack((values, torch.ones_like(values))))
    return sums[0] / sums[1]


def span_means(scores, positions, span):
    """((S,) mean score of each span with a row here, (T,) which of them each row is in).

    positions: (T,) of one sequence; span i holds the positions span * i to span * (i + 1) - 1.
    """
    spans, index = torch.unique_consecutive(positions // span, return_inverse=True)
    return bin_means(scores, index, len(spans)), index


def free_spans(scores, positions, n, span):
    """((S,) mean scores, (S,) rows) of the spans of a prompt of n tokens that may be dropped, as in select(): no score is the lowest one."""
    free = ~is_protected(positions, n)
    means, index = span_means(scores[free].nan_to_num(nan=-math.inf), positions[free], span)
    return means, index.bincount(minlength=len(means))


def adaptive_share(scores, positions, n, threshold, span):
    """What an adaptive stage keeps, as a share of the prompt of n tokens: all but the spans that score less than the threshold.

    scores, positions: (T,) of its rows alive.
    """
    means, rows = free_spans(scores, positions, n, span)
    return (len(positions) - rows[means < threshold].sum().item()) / n


def select(scores, positions, share, seqlens, prompt_lens, span=1):
    """The rows to keep at a stage: protected tokens, then the highest scores; ties go to the later token.

    scores: (T,) float32; positions: (T,); share: of each prompt, or a list with one for each; seqlens: rows alive
    per sequence; prompt_lens: prompt tokens per sequence, dropped ones included; span: tokens are ranked by
    groups of so many neighbours, by the mean score of a group's unprotected tokens. Whole groups are kept, best first; of
    the last one only as many tokens as the count allows, the later ones.

    Returns ((K,) ascending row indices, rows kept per sequence).
    """
    keep, kept, start = [], [], 0
    shares = share if isinstance(share, list) else [share] * len(seqlens)
    for rows, length, n, part in zip(scores.split(seqlens), seqlens, prompt_lens, shares):
        here = positions[start : start + length]
        free, count = ~is_protected(here, n), min(length, alive_count(n, part))
        if span > 1:  # the means over what is free of each span; what is protected has one more bin
            bins = (here // span).where(free, n // span + 1)
            rows = bin_means(rows, bins, n // span + 2)[bins]
        # the protected: nothing else is infinite, and NaN is last
        ranked = rows.nan_to_num(nan=-math.inf).masked_fill(~free, math.inf)
        order = ranked.flip(0).argsort(descending=True, stable=True)  # reversed: of equal scores the later comes first
        keep.append((start + length - 1 - order[:count]).sort().values)
        kept.append(count)
        start += length
    return torch.cat(keep), kept


# ---------------------------------------------------------------------------- the heads


QUERIES, RANK = 32, 16  # of PruneHead's matches
NEIGHBOURS = 33  # over which PruneHead's likeness is averaged, the token itself in their middle
SAMPLE = 64  # rows, spread over the prompt, whose attention PruneHead looks at beside that of the last QUERIES


class PruneHead(nn.Module):
    """Scores tokens by their hidden state: Linear(d/4 -> 2)(GELU(Linear(d -> d/4)(x))), paper eq. 1.

    Options, none of them the paper's, whose features join the hidden layer before its GELU:
    divisor: the hidden layer has d / divisor units;
    norm: x is layer-normed first;
    position: logarithms of the distances to the end and to the beginning, their share and the prompt's length;
    matches: products of rank 16 between each token and the last 32, that many of them, pooled over these by
    maximum and log-mean-exp: a token's causal state cannot know a question that comes after it, but its end can;
    ending: a projection of the mean of the last 32, for all tokens alike: what else counts may depend on how a prompt ends
    (a question asks for some of what is before it, plain text goes on with what is recent);
    attention: number of the model's attention heads, whose weights in the block to come each token's features are: how
    much the last 32 tokens attend to it, and how much they and 64 tokens spread over the prompt do (H2O's score, sampled).
    alike: the cosine of its state (as normed) and the most alike of the last 32 that come after it, whether this is above 0.9, as
    where it is the same word, and the means of both over neighbouring rows alive: a question names what it asks for;
    conv: a depthwise convolution over so many neighbouring rows alive (an odd number), added to the hidden layer;
    dropout: on the hidden layer, in training.
    """

    def __init__(
        self, hidden_size, divisor=4, norm=False, position=False, matches=0, ending=False, attention=0, alike=False, conv=0,
        dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        self.options = {
            "divisor": divisor, "norm": norm, "position": position, "matches": matches, "ending": ending,
            "attention": attention, "alike": alike, "conv": conv,
        }  # fmt: skip
        self.norm, self.position, self.matches, self.ending = norm, position, matches, ending
        self.attention, self.alike, self.dropout = attention, alike, dropout
        width, features = hidden_size // divisor, 4 * position + 2 * matches + 2 * attention + 4 * alike
        self.fc1 = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, 2)
        if features:
            self.features = nn.Linear(features, width, bias=False)
        if matches:
            self.q_proj, self.k_proj = (nn.Linear(hidden_size, matches * RANK, bias=False) for _ in range(2))
        if ending:
            self.end_proj = nn.Linear(hidden_size, width, bias=False)
        self.conv = nn.Conv1d(width, width, conv, padding=conv // 2, groups=width, bias=False) if conv else None

    def logits(self, x, positions=None, seqlens=None, block=None):
        """x: (T, hidden_size) -> (T, 2) float32, logits of keep and of drop; positions, seqlens, block: see forward()."""
        features = self.position_features(positions, seqlens) if self.position else []
        features += self.attention_features(x, positions, seqlens, block) if self.attention else []
        x = F.layer_norm(x, x.shape[-1:]) if self.norm else x
        hidden = linear(self.fc1, x).float()  # the large products, in the model's dtype
        features += self.match_features(x, seqlens) if self.matches else []
        features += self.alike_features(x, seqlens) if self.alike else []
        if features:
            hidden = hidden + self.features(torch.cat(features, -1))
        if self.ending:
            ends = linear(self.end_proj, torch.stack([rows[-QUERIES:].mean(0) for rows in x.split(seqlens)])).float()
            hidden = hidden + torch.cat([end.expand(n, -1) for end, n in zip(ends, seqlens)])
        if self.conv:
            hidden = hidden + torch.cat([self.conv(rows.T[None])[0].T for rows in hidden.split(seqlens)])
        return self.fc2(F.dropout(F.gelu(hidden), self.dropout, self.training))

    def position_features(self, positions, seqlens):
        """[(T, 4)]: of each token of prompts whose last token is there, as it is at every stage."""
        out = []
        for p in positions.split(seqlens):
            n = p[-1] + 1.0
            out.append(torch.stack((((n - p).log()) / 8, (p + 1.0).log() / 8, p / n, n.log().expand(len(p)) / 8), -1))
        return [torch.cat(out)]

    def match_features(self, x, seqlens):
        """[(T, 2 * matches)]: each token's products with the last tokens of its prompt, pooled over them."""
        out = []
        for keys, rows in zip(linear(self.k_proj, x).split(seqlens), x.split(seqlens)):
            queries = linear(self.q_proj, rows[-QUERIES:]).unflatten(-1, (self.matches, RANK))
            dots = torch.einsum("tmr,wmr->tmw", keys.unflatten(-1, (self.matches, RANK)), queries).float() * RANK**-0.5
            out.append(torch.cat((dots.amax(-1), dots.logsumexp(-1) - math.log(len(queries))), -1))
        return [torch.cat(out)]

    def alike_features(self, x, seqlens):
        """[(T, 4)]: likeness of each token and the last ones of its prompt, and that of its neighbours.

        A token among the last ones is compared with those after it, and has at least 0.
        """
        out = []
        for rows in x.split(seqlens):
            unit, index = F.normalize(rows.float(), dim=-1), torch.arange(len(rows), device=x.device)
            cosines = unit @ unit[-QUERIES:].T
            most = cosines.where(index[:, None] < index[-QUERIES:], 0).amax(-1)
            both = 2 * torch.stack((most, (most > 0.9).float()))
            near = F.avg_pool1d(both, NEIGHBOURS, 1, NEIGHBOURS // 2, count_include_pad=False)
            out.append(torch.cat((both, near)).T)
        return [torch.cat(out)]

    @torch.no_grad()
    def attention_features(self, x, positions, seqlens, block):
        """[(T, 2 * attention)]: logarithms of the attention weights of `block` on each token, head by head, mean over the rows
        that can see it: of the last ones, and of all that are sampled."""
        attention, x, out = block.self_attn, block.input_layernorm(x), []

        def rotated(proj, x, positions):
            return attention.rope(proj(x).unflatten(-1, (-1, attention.head_dim)), positions)

        keys = rotated(attention.k_proj, x, positions)
        for x, k, p in zip(x.split(seqlens), keys.split(seqlens), positions.split(seqlens)):
            rows = sampled_rows(len(p)).to(x.device)
            weights = attention_weights(rotated(attention.q_proj, x[rows], p[rows]), k, p[rows], p, attention.window)
            seen = visible(p[rows], p, attention.window)
            means = [
                weights[:, part].sum(1) / seen[part].sum(0).clamp(min=1)
                for part in (slice(-QUERIES, None), slice(None))
            ]
            out.append(torch.cat(means).float().T)  # (n, 2 * heads)
        return [((torch.cat(out) + 1e-5).log() + 5) / 2]

    def flops(self, rows, config=None):
        """FLOPs of scoring that many tokens of one prompt; config: the model's, for attention."""
        linears = [m for name, m in self.named_children() if name not in ("q_proj", "end_proj")]  # and conv
        queries = min(QUERIES, rows)
        few = queries * self.q_proj.weight.numel() if self.matches else 0
        few += self.end_proj.weight.numel() if self.ending else 0
        products = rows * queries * (self.matches * RANK + self.alike * self.fc1.in_features)
        if self.attention:
            sampled, width = len(sampled_rows(rows)), config.head_dim * config.num_attention_heads
            kv_width = config.head_dim * config.num_key_value_heads
            products += config.hidden_size * (rows * kv_width + sampled * width) + rows * sampled * width
        return 2 * (rows * sum(m.weight.numel() for m in linears) + few + products)

    def forward(self, x, positions=None, seqlens=None, block=None):
        """The call of every scorer: x: (T, hidden_size), the input of `block` -> scores (T,) float32.

        positions: (T,), seqlens: rows of each of the packed prompts, for all options but divisor, norm and dropout.
        """
        keep, drop = self.logits(x, positions, seqlens, block).unbind(-1)
        return keep - drop


def sampled_rows(n):
    """The rows of a prompt's n that PruneHead's attention features go by, ascending: SAMPLE spread ones, the last QUERIES."""
    spread = torch.linspace(0, n - 1, min(SAMPLE, n)).round().long()
    return torch.cat((spread[spread < n - QUERIES], torch.arange(max(0, n - QUERIES), n)))


def linear(module, x):
    """A Linear in x's dtype."""
    return F.linear(x, module.weight.to(x.dtype), None if module.bias is None else module.bias.to(x.dtype))


class LateKV(nn.Module):
    """Keys and values of all layers after one, foretold from a token's state there: what it leaves behind if it goes no further.

    Not the paper's. Of most of a prompt a response needs the keys and values alone, and those of late layers are nearly
    linear in an earlier state. One linear map for each such layer, which train.py fits (fit_late), costs as much as the
    model's own two projections: 6 % of a block of SmolLM2-135M. SwiftKV (Qiao et al. 2024, arXiv 2410.03960) has the
    model's own projections read the early state, and trains them; here the model is frozen.
    """

    def __init__(self, config, layer):
        super().__init__()
        later = config.num_hidden_layers - layer - 1
        self.layer, self.shape = layer, (later, 2, config.num_key_value_heads, config.head_dim)
        self.proj = nn.Linear(config.hidden_size, math.prod(self.shape), dtype=torch.bfloat16)  # half the file

    def forward(self, x):
        """x: (T, hidden_size), the input of block `layer` -> (T, later layers, 2, Hkv, D): keys, not rotated yet, and values."""
        return linear(self.proj, unit_rms(x)).unflatten(-1, self.shape)

    def flops(self, rows):
        """FLOPs for that many tokens, those of the layer's own projections included."""
        own = 2 * math.prod(self.shape[1:]) * self.proj.in_features
        return rows * (own + 2 * self.proj.weight.numel())


def unit_rms(x):
    """x / sqrt(mean(x^2)) over the last dimension, in x's dtype: RMSNorm without its weight."""
    return F.rms_norm(x if x.dtype == torch.float64 else x.float(), x.shape[-1:]).to(x.dtype)


class Left:
    """The tokens of packed prompts that go no further than a LateKV's layer: their keys and values there, and later ones.

    block: that layer's; x: (T, hidden_size), its input; positions: (T,); seqlens: rows of each prompt; keep, kept: the rows
    that do go on, as select() gives them.
    """

    def __init__(self, late, block, x, positions, seqlens, keep, kept):
        gone = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, keep, False)
        x, self.positions, self.layer = x[gone], positions[gone], late.layer
        self.seqlens = [n - k for n, k in zip(seqlens, kept)]
        attention, later = block.self_attn, (kv.unbind(1) for kv in late(x).unbind(1))
        self.kv = [attention.kv(block.input_layernorm(x), self.positions)]
        self.kv += [(attention.rope(k, self.positions), v) for k, v in later]

    def attend(self, layer, cache, kv, prompt_lens):
        """model.attend of a layer's prefill: its rows see these tokens too, and its empty LayerCache holds both, or what kv keeps."""
        k_left, v_left = self.kv[layer - self.layer]

        def attend_to_both(q, k, v, positions, k_positions, seqlens, k_seqlens, window=None):
            columns = [t.split(seqlens) for t in (q, k, v, positions)]
            left = [t.split(self.seqlens) for t in (k_left, v_left, self.positions)]
            rows, parts = [], []
            for q, k, v, p, k_more, v_more, p_more in zip(*columns, *left):
                both, order = torch.cat((p, p_more)).sort()
                k_both, v_both = torch.cat((k, k_more))[order], torch.cat((v, v_more))[order]
                rows.append((q, k_both, v_both, p, both))
                # attend() wants a sequence's last tokens: the first, which see nothing that is left behind, are one by themselves
                parts += [
                    [t[:FIRST_TOKENS] for t in (q, k, v, p, p)],
                    (q[FIRST_TOKENS:], k_both, v_both, p[FIRST_TOKENS:], both),
                ]
            if kv:
                cache.append(*kv.kept(rows, prompt_lens, window))
            else:
                cache.append(*(torch.cat([row[i] for row in rows]) for i in (1, 2, 4)), [len(row[4]) for row in rows])
            q, k, v, p, both = zip(*(part for part in parts if len(part[0])))
            return attend(*map(torch.cat, (q, k, v, p, both)), list(map(len, p)), list(map(len, both)), window)

        return attend_to_both


def fingerprint(model):
    """A checkpoint's identity, the same loaded in float32 or bfloat16: SHA-256 over a sample of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 1024) | 1].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{list(parameter.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_atomic(path, data):
    """Write bytes so that a reader, or a crash, sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def heads_bytes(heads):
    """What heads.safetensors holds, of {layer: PruneHead or LateKV}."""
    tensors = {
        f"{layer}.{name}": p.detach().cpu() for layer, head in heads.items() for name, p in head.state_dict().items()
    }
    return safetensors.torch.save(tensors)


def heads_sha256(heads):
    """The sha256 in their heads.json, or None without heads."""
    return hashlib.sha256(heads_bytes(heads)).hexdigest() if heads else None


def save_heads(folder, heads, model, schedule, **info):
    """Write heads.safetensors and heads.json: fingerprint of the checkpoint, schedule, and info (teacher, data, ...).

    heads: {layer: PruneHead}, then a LateKV at the layer with a share of 0, if there is one.
    """
    data = heads_bytes(heads)
    write_atomic(Path(folder) / "heads.safetensors", data)
    meta = {
        "fingerprint": fingerprint(model),
        "sha256": hashlib.sha256(data).hexdigest(),
        "schedule": {str(layer): share for layer, share in schedule.items()},
        "span": schedule.span,
        "threshold": {str(layer): score for layer, score in schedule.threshold.items()},
        "head": next(iter(heads.values())).options,
        "late_kv": schedule.late,
        **info,
    }
    write_atomic(Path(folder) / "heads.json", (json.dumps(meta, indent=2) + "\n").encode())


def load_heads(folder, model):
    """Returns ({layer: PruneHead, or LateKV at a share of 0}, Schedule, dict of heads.json), on the model's device.

    FileNotFoundError for a missing file; ValueError for a damaged one or heads of another checkpoint.
    """
    folder = Path(folder)
    meta = read_json(folder / "heads.json")
    if meta.get("fingerprint") != fingerprint(model):
        raise ValueError(
            f"{folder}: these heads were trained on another checkpoint ({meta.get('ckpt', 'unnamed')}); train your own with train.py"
        )
    try:
        more = {"span": meta.get("span", 1), "threshold": meta.get("threshold"), "late": meta.get("late_kv", False)}
        schedule = Schedule(len(model.layers), meta["schedule"], **more)
        options = meta.get("head", {})
        heads = {
            layer: PruneHead(model.config.hidden_size, **options).requires_grad_(False) for layer in schedule.scored()
        }
        for layer in schedule.keys() - heads.keys() if schedule.late else ():
            heads[layer] = LateKV(model.config, layer).requires_grad_(False)
        data = (folder / "heads.safetensors").read_bytes()  # a missing file is named by its own error
        if hashlib.sha256(data).hexdigest() != meta["sha256"]:
            raise ValueError("heads.safetensors is not the file that heads.json was written with")
        tensors = safetensors.torch.load(data)
        for layer, head in heads.items():
            head.load_state_dict({name: tensors.pop(f"{layer}.{name}") for name in head.state_dict()})
            head.to(model.device)
        if tensors:
            raise ValueError(f"unexpected tensor {min(tensors)}")
    except (SafetensorError, ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: heads.safetensors or heads.json is damaged, or they do not fit: {' '.join(str(error).split())}"
        ) from None
    return heads, schedule, meta


# ---------------------------------------------------------------------------- what it costs


def pairs(alive, window=None):
    """(query, key) pairs that causal attention computes; alive: ascending positions, or a number of neighbouring ones."""
    n = alive if isinstance(alive, int) else len(alive)
    if window is None:
        return n * (n + 1) // 2
    positions = torch.arange(n) if isinstance(alive, int) else alive
    first = torch.searchsorted(positions, positions - window + 1)
    return int((torch.arange(n, device=positions.device) - first + 1).sum())


def late_kv(heads):
    """The LateKV among heads or scorers, or None."""
    return next((head for head in (heads or {}).values() if isinstance(head, LateKV)), None)


def held_counts(alive, n, heads=None):
    """Tokens of a prompt of n that the cache holds at each layer, from the number alive at each: with a LateKV those left behind too."""
    late = late_kv(heads)
    return alive if late is None else [*alive[: late.layer], *[[n, *alive][late.layer]] * len(alive[late.layer :])]


def looked_at(alive, left):
    """(query, key) pairs of the `alive` tokens and of the `left` ones, all of which lie before the last and after the first of them."""
    return max(0, alive - FIRST_TOKENS) * left


def executed_flops(config, n, alive, heads=None, logit_rows=1):
    """(linear, attention, heads) FLOPs that a prefill of one prompt of n tokens runs.

    alive: at each layer that runs, the number of tokens or, for a window to be exact, their positions. GQA widths,
    causal (or windowed) pairs at 4 D Hq each, LM head on logit_rows, pruning heads on the rows that they score. With a LateKV
    (linear) the keys and values of what it leaves behind, and (attention) the pairs with these, which no window makes fewer.
    """
    rows = [n, *(p if isinstance(p, int) else len(p) for p in alive)]  # rows[layer] reach a stage at that layer
    linear = sum(map(config.linear_flops, rows[1:])) + 2 * logit_rows * config.vocab_size * config.hidden_size
    attention = sum(pairs(p, config.window(layer)) for layer, p in enumerate(alive))
    late = late_kv(heads)
    if late:
        left = [held - count for held, count in zip(held_counts(rows[1:], n, heads), rows[1:])]
        linear += late.flops(left[late.layer])
        attention += sum(map(looked_at, rows[1:], left))
    scoring = sum(head.flops(rows[layer], config) for layer, head in (heads or {}).items() if head is not late)
    return linear, 4 * config.head_dim * config.num_attention_heads * attention, scoring


# ---------------------------------------------------------------------------- prefill and generate


@torch.no_grad()
def prefill(model, ids, scorers=None, schedule=None, seqlens=None, cache=None, kv=None):
    """Read prompts, dropping tokens on the way.

    ids: (T,) token ids of one or more packed prompts, seqlens: tokens of each (default one prompt);
    scorers: {layer: head or any callable of a head's call, or a LateKV at a share of 0}; schedule: a Schedule, None or {} for
    dense; cache: an empty KVCache to fill; kv: a kv.Compression of what each layer leaves in it. Returns (logits of
    each prompt's last token (B, vocab_size), cache); cache.alive is the tokens alive, [layer][prompt]. ValueError for a
    used cache, a stage without a scorer, scorers without a schedule, or a LateKV that the schedule does not name.
    RuntimeError when the tokens alive at a layer, or those that its cache holds, are not as many as schedule, LateKV and
    kv ask for.
    """
    seqlens = prompt_lens = [len(ids)] if seqlens is None else list(seqlens)
    scorers, schedule = scorers or {}, schedule or {}
    if scorers and not schedule or schedule and not set(schedule.scored()) <= scorers.keys():
        raise ValueError("pruning needs both: a schedule, and a scorer for each of its stages with a share above 0")
    late = late_kv(scorers)
    if bool(schedule and schedule.late) != (late is not None) or late and schedule.get(late.layer) != 0:
        raise ValueError(
            "a schedule with late=True needs a LateKV of the layer of its share of 0, and no other schedule has use for one"
        )
    cache = KVCache(len(model.layers)) if cache is None else cache
    if cache[0].seqlens:
        raise ValueError("prefill needs an empty cache")
    x, positions, shares, left, cache.alive = model.embed(ids), model.positions(seqlens), {}, None, []
    for layer, block in enumerate(model.layers):
        if layer in schedule:
            scores = scorers[layer](x, positions, seqlens, block) if schedule[layer] else positions.float()
            shares[layer] = schedule.shares(layer, scores, positions, seqlens, prompt_lens)
            keep, kept = select(scores, positions, shares[layer], seqlens, prompt_lens, schedule.span)
            if late and not schedule[layer]:
                left = Left(late, block, x, positions, seqlens, keep, kept)
            x, positions, seqlens = x[keep], positions[keep], kept
        cache.alive.append(seqlens)
        if left:
            x = block(x, positions, seqlens, attend=left.attend(layer, cache[layer], kv, prompt_lens))
        elif kv:
            x = block(x, positions, seqlens, attend=kv.attend(cache[layer], prompt_lens))
        else:
            x = block(x, positions, seqlens, cache[layer])
    check_alive(cache, schedule, prompt_lens, shares, kv, scorers)
    return model.logits(x[torch.tensor(seqlens).cumsum(0) - 1]), cache


def check_alive(cache, schedule, prompt_lens, shares, kv=None, scorers=None):
    """The guard against a silent no-op: RuntimeError unless as many tokens were alive at each layer as the schedule
    asks for, and its cache holds those, and what a LateKV left behind, or what kv leaves of them.

    shares: {layer: share per prompt}, from Schedule.shares and not from what was selected.
    """
    asked = [{layer: each[i] for layer, each in shares.items()} for i in range(len(prompt_lens))]
    alive = [schedule.alive(n, s) if schedule else [n] * len(cache.layers) for n, s in zip(prompt_lens, asked)]
    kept = [held_counts(counts, n, scorers) for counts, n in zip(alive, prompt_lens)]
    kept = [kv.held(counts, n) for counts, n in zip(kept, prompt_lens)] if kv else kept
    held = "compression" if kv else "LateKV" if late_kv(scorers) else "pruning"
    for what, found, wanted in (("pruning", cache.alive, alive), (held, cache.seqlens(), kept)):
        for layer, (held, counts) in enumerate(zip(found, zip(*wanted))):
            if held != list(counts):
                raise RuntimeError(
                    f"layer {layer} holds {held} tokens where {list(counts)} are asked for: {what} was not applied"
                )


CALIBRATION_TOKENS = 2**18  # of the prompts that calibrate() looks at, about
# that it runs a block on at once, about: a 7B model's MLP then takes 1 GB (scorers see all prompts at once)
PACK_TOKENS = 2**14


def packs(x, positions, seqlens):
    """Packed prompts as (x, positions, seqlens) of packs of at most PACK_TOKENS, or of one longer prompt."""
    groups = [[]]
    for n in seqlens:
        if groups[-1] and sum(groups[-1]) + n > PACK_TOKENS:
            groups.append([])
        groups[-1].append(n)
    sizes = list(map(sum, groups))
    return zip(x.split(sizes), positions.split(sizes), groups)


@torch.no_grad()
def calibrate(model, prompts, scorers, schedule):
    """The Schedule with one threshold per scored stage: keeping all spans that score at least that leaves these prompts,
    taken together, as many tokens as the shares would, within a span at the cut and those that score the same.

    prompts: lists of token ids, at least one; of more than CALIBRATION_TOKENS every second, third, ... by length.
    scorers: as in prefill. Stage by stage: each span of any prompt that is not among the highest goes.
    """
    prompts = sorted(prompts, key=len)
    every = -(-sum(map(len, prompts)) // CALIBRATION_TOKENS)
    prompts = prompts[min(every // 2, len(prompts) - 1) :: every]
    seqlens = prompt_lens = [len(ids) for ids in prompts]
    ids = torch.tensor([t for prompt in prompts for t in prompt], device=model.device)
    x, positions, threshold = model.embed(ids), model.positions(seqlens), {}
    last = max(schedule.scored(), default=-1)
    for layer, block in enumerate(model.layers[: last + 1]):
        if layer in schedule:
            scores = scorers[layer](x, positions, seqlens, block)
            rows = list(zip(scores.split(seqlens), positions.split(seqlens), prompt_lens))
            means, sizes = map(torch.cat, zip(*(free_spans(*row, schedule.span) for row in rows)))
            finite = means.isfinite()
            means, order = means[finite].sort(descending=True)
            wanted = sum(alive_count(n, schedule[layer]) - protected_count(n) for n in prompt_lens)
            kept = (sizes[finite][order].cumsum(0) <= wanted).sum().item()
            threshold[layer] = means[max(kept, 1) - 1].item() if len(means) else 0.0  # where there is nothing to drop
            if layer == last:
                break
            shares = [adaptive_share(*row, threshold[layer], schedule.span) for row in rows]
            keep, seqlens = select(scores, positions, shares, seqlens, prompt_lens, schedule.span)
            x, positions = x[keep], positions[keep]
        x = torch.cat([block(*pack) for pack in packs(x, positions, seqlens)])
    return schedule.with_shares(schedule, threshold=threshold)


def sample_token(logits, temperature=0.0, top_p=1.0, generator=None):
    """logits: (B, vocab_size) -> (B,) token ids: greedy at temperature 0, else from the top_p nucleus."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits.float() / temperature).softmax(-1).sort(descending=True)
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)  # the first token always stays
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator)).squeeze(-1)


@torch.no_grad()
def generate(
    model, ids, max_new_tokens, scorers=None, schedule=None, *, seqlens=None, cache=None, kv=None,
    temperature=0.0, top_p=1.0, eos_token_ids=(), min_new_tokens=0, generator=None, on_token=None,
):  # fmt: skip
    """Pruned prefill, then decoding from the true position (not from the number of tokens kept).

    ids, scorers, schedule, seqlens, kv: as in prefill; cache: an empty KVCache, to look at afterwards;
    min_new_tokens: of which none is an end-of-sequence token; on_token: called with the list of the B new ids
    after every step. Returns one list of new ids per prompt, ended by (and with) an end-of-sequence token.
    ValueError where prompt + new tokens exceed the model's positions, and for a temperature or top_p out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must not be negative, top_p {top_p} must lie in (0, 1]")
    prompt_lens = [len(ids)] if seqlens is None else list(seqlens)
    limit = model.config.max_position_embeddings
    if max(prompt_lens) + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {max(prompt_lens)} tokens and {max_new_tokens} new ones are beyond the model's {limit} positions"
        )
    cache = KVCache(len(model.layers), extra=max_new_tokens) if cache is None else cache
    logits, cache = prefill(model, ids, scorers, schedule, prompt_lens, cache, kv)
    positions = torch.tensor(prompt_lens, device=ids.device)
    outputs, done = [[] for _ in prompt_lens], [False] * len(prompt_lens)
    for step in range(max_new_tokens):
        if step < min_new_tokens:
            logits[:, list(eos_token_ids)] = -torch.inf
        token = sample_token(logits, temperature, top_p, generator)
        for i, t in enumerate(token.tolist()):
            if not done[i]:
                outputs[i].append(t)
                done[i] = t in eos_token_ids
        if on_token:
            on_token(token.tolist())
        if all(done) or step + 1 == max_new_tokens:
            break
        logits = model(token, positions + step, [1] * len(prompt_lens), cache)
    return outputs
