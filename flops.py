"""What a prefill costs: the FLOPs that run, the paper's count, and the schedule that meets a budget.

executed_flops(config, n, alive, heads)  # alive: tokens at each layer, or their positions
at_keep(config, schedule, 0.9, n)        # --keep 0.9: the compute of the paper's stages at 0.9
"""

import torch

from sdtp import PruneHead, alive_count, paper_schedule


def alive_per_layer(schedule, n, num_hidden_layers):
    """Tokens of a prompt of n alive at each layer, a list of num_hidden_layers counts."""
    counts, count = [], n
    for layer in range(num_hidden_layers):
        if layer in schedule:
            count = alive_count(n, schedule[layer])
        counts.append(count)
    return counts


def pairs(alive, window=None):
    """(query, key) pairs of causal attention; alive: ascending positions, or how many neighbours."""
    n = alive if isinstance(alive, int) else len(alive)
    if window is None:
        return n * (n + 1) // 2
    positions = torch.arange(n) if isinstance(alive, int) else alive
    first = torch.searchsorted(positions, positions - window + 1)
    return int((torch.arange(n, device=positions.device) - first + 1).sum())


def block_flops(config, rows):
    """FLOPs of the matrix products of one block's projections and MLP, for that many rows."""
    d, f = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads + config.num_key_value_heads
    return 2 * rows * d * (2 * heads * config.head_dim + 3 * f)


def head_flops(heads, rows):
    """FLOPs of scoring; heads: {layer: scorer}, rows: {layer: rows that it scores}.

    A module costs two FLOPs per weight and row, unless it has its own flops(rows); other scorers,
    the training-free ones, are not counted, which is generous to them.
    """
    total = 0
    for layer, head in heads.items():
        if hasattr(head, "flops"):
            total += head.flops(rows[layer])
        elif isinstance(head, torch.nn.Module):
            total += 2 * rows[layer] * sum(p.numel() for p in head.parameters() if p.dim() > 1)
    return total


def executed_flops(config, n, alive, heads=None, logit_rows=1):
    """(linear, attention, heads): the FLOPs that a prefill of one prompt of n tokens runs.

    alive: at each layer the number of tokens or, for a window to be exact, their positions. Widths as
    they are with grouped heads, causal (or windowed) pairs at 4 D Hq each, the LM head on logit_rows,
    the pruning heads on the rows that they score.
    """
    counts = [a if isinstance(a, int) else len(a) for a in alive]
    before = [n, *counts]  # before[layer] rows reach a stage at that layer
    linear = sum(block_flops(config, count) for count in counts)
    linear += 2 * logit_rows * config.vocab_size * config.hidden_size
    attention = sum(pairs(a, config.window(layer)) for layer, a in enumerate(alive))
    attention *= 4 * config.head_dim * config.num_attention_heads
    return linear, attention, head_flops(heads or {}, before)


def paper_flops(config, alive):
    """The count that reproduces the paper's table 2; alive: tokens at each layer.

    [2 L (4 d^2 + 3 d f) + 4 V d] n + 3 L d n^2: no grouped heads, 3 d per pair of the full square, the
    embedding counted as a product beside an LM head on every row. Found by matching the table.
    """
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    layers = sum(2 * (4 * d * d + 3 * d * f) * n + 3 * d * n * n for n in alive)
    return layers + 4 * v * d * alive[0]


def schedule_flops(config, schedule, n):
    """Executed FLOPs of a prefill of n tokens by a schedule, with the paper's heads at its stages."""
    with torch.device("meta"):
        head = PruneHead(config.hidden_size)
    heads = {layer: head for layer, share in schedule.items() if share}
    alive = alive_per_layer(schedule, n, config.num_hidden_layers)
    return sum(executed_flops(config, n, alive, heads))


def at_keep(config, schedule, keep, n):
    """--keep: the schedule with the compute of the paper's stages at that ratio.

    n: tokens of the prompt (of several: their median). The paper's own stages get shares of keep**s,
    others meet the budget of the paper's.
    """
    paper = paper_schedule(config.num_hidden_layers, keep)
    if list(schedule) == list(paper) and all(schedule.values()):
        return paper
    return meet_budget(config, schedule, schedule_flops(config, paper, n), n)


def meet_budget(config, schedule, budget, n):
    """The schedule of these stages that costs `budget` FLOPs at n tokens, as nearly as counts allow.

    All shares above 0 are raised to one power. Shares of 0 stay; where such a floor would be too cheap
    even with all others at 1, it moves to the first later layer where it is not, or goes. ValueError
    for a budget out of reach.
    """

    def powered(power):
        return {layer: share and share**power for layer, share in schedule.items()}

    def cost(schedule):
        return schedule_flops(config, schedule, n)

    if cost(schedule) == budget:
        return schedule
    while 0 in schedule.values() and cost(powered(0)) < budget:
        *scored, floor = schedule.items()
        schedule = dict(scored)
        if floor[0] + 1 < config.num_hidden_layers:
            schedule[floor[0] + 1] = 0.0
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(powered(middle)) > budget else (low, middle)
    if cost(powered(high)) > budget * (1 + 1e-6):
        share = budget / cost({})
        raise ValueError(
            f"stages at layers {list(schedule)} cannot cost as little as {share:.3f} of a dense "
            "prefill: start lower, or keep more"
        )
    return min(powered(high), powered(low), key=lambda schedule: abs(cost(schedule) - budget))
