"""What a prefill costs: the FLOPs that run, the paper's count, the schedule that meets a budget.

executed_flops(config, n, alive, heads)  # alive: tokens at each layer, or their positions
at_keep(config, schedule, 0.9, n)        # --keep 0.9: the compute of the paper's stages at 0.9
"""

import torch

from sdtp import PruneHead, alive_count, paper_schedule


def alive_per_layer(schedule, n, num_hidden_layers):
    """Tokens of a prompt of n alive at each layer, a list of num_hidden_layers counts."""
    counts = [n]
    for layer in range(num_hidden_layers):
        counts.append(alive_count(n, schedule[layer]) if layer in schedule else counts[-1])
    return counts[1:]


def pairs(alive, window=None):
    """(query, key) pairs of causal attention; alive: ascending positions, or how many from 0 on."""
    positions = torch.arange(alive) if isinstance(alive, int) else alive
    n = len(positions)
    if window is None:
        return n * (n + 1) // 2
    first = torch.searchsorted(positions, positions - window + 1)
    return int((torch.arange(n, device=positions.device) - first + 1).sum())


def executed_flops(config, n, alive, heads=None, logit_rows=1):
    """(linear, attention, heads): the FLOPs that a prefill of one prompt of n tokens runs.

    alive: at each layer the number of tokens or, for a window, their positions; logit_rows: that
    the LM head runs on. Scorers without weights are not counted.
    """
    d, D, Hq = config.hidden_size, config.head_dim, config.num_attention_heads
    rows = [n, *(a if isinstance(a, int) else len(a) for a in alive)]  # rows[i] reach a stage at i
    linear = 2 * d * D * (Hq + config.num_key_value_heads) + config.mlp_weights()
    linear = 2 * linear * sum(rows[1:]) + 2 * logit_rows * config.vocab_size * d
    seen = sum(pairs(a, config.window(i)) for i, a in enumerate(alive))
    attention = 2 * Hq * (2 * D + config.key_columns) * seen
    scoring = 0
    for layer, head in (heads or {}).items():
        weights = head.parameters() if isinstance(head, torch.nn.Module) else ()
        scoring += 2 * rows[layer] * sum(w.numel() for w in weights if w.dim() == 2)
    return linear, attention, scoring


def paper_flops(config, alive):
    """The count that reproduces the paper's table 2, found by matching it; alive: counts per layer.

    [2 L (4 d^2 + 3 d f) + 4 V d] n + 3 L d n^2: keys as wide as queries, 3 d per pair of the full
    square, the embedding counted as a product beside an LM head on every row.
    """
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    return 4 * v * d * alive[0] + sum(2 * (4 * d * d + 3 * d * f) * n + 3 * d * n**2 for n in alive)


def schedule_flops(config, schedule, n):
    """Executed FLOPs of a prefill of n tokens by a schedule, the paper's heads at its stages."""
    with torch.device("meta"):
        heads = {layer: PruneHead(config.hidden_size) for layer, share in schedule.items() if share}
    alive = alive_per_layer(schedule, n, config.num_hidden_layers)
    return sum(executed_flops(config, n, alive, heads))


def at_keep(config, schedule, keep, n):
    """--keep: the schedule of these stages that costs, at n tokens, what the paper's at keep do."""
    if config.num_hidden_layers < 5:
        raise ValueError("--keep goes by the paper's stages, from layer 4 on: leave it out")
    paper = paper_schedule(config.num_hidden_layers, keep)
    if sorted(schedule) == list(paper) and all(schedule.values()):
        return paper  # shares of keep**s
    return meet_budget(config, schedule, schedule_flops(config, paper, n), n)


def meet_budget(config, schedule, budget, n):
    """The schedule that costs `budget` FLOPs at n tokens, as nearly as counts allow.

    Shares above 0 are raised to one power. A share of 0 stays; too cheap even with all others at 1,
    it moves to the first later layer where it is not, or goes. ValueError for too small a budget.
    """

    def powered(power):
        return {layer: share and share**power for layer, share in schedule.items()}

    def cost(power):
        return schedule_flops(config, powered(power), n)

    while 0 in schedule.values() and cost(0) < budget:
        *others, (floor, _) = sorted(schedule.items())
        later = {floor + 1: 0.0} if floor + 1 < config.num_hidden_layers else {}
        schedule = dict(others) | later
    low, high = 0.0, 100.0  # the cost falls as the power grows
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > budget else (low, middle)
    if cost(high) > budget * (1 + 1e-6):
        raise ValueError(f"stages at layers {list(schedule)} cannot cost as little: start lower")
    return powered(min(1.0, high, low, key=lambda power: abs(cost(power) - budget)))
