"""flops.py against PyTorch's counter and plain loops."""

import math

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from flops import alive_per_layer, at_keep, executed_flops, meet_budget, pairs, schedule_flops
from model import Config
from sdtp import PruneHead, paper_schedule, prefill

CONFIG = Config.from_dict({**tiny.SIZES, "model_type": "llama", "num_hidden_layers": 30})
N = 1000


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_pairs_equal_a_loop(window):
    positions = torch.tensor([0, 1, 2, 3, 6, 7, 12, 13, 14, 20])
    for alive, given in ((positions, positions), (range(13), 13)):
        seen = [0 <= int(i - j) < (window or 10**9) for i in alive for j in alive]
        assert pairs(given, window) == sum(seen)


@pytest.mark.parametrize("schedule", [{}, {1: 0.6, 3: 0.3}, {0: 0.7, 2: 0.4}, {2: 0.0}])
@pytest.mark.parametrize("window", [None, 7])
def test_executed_flops(schedule, window):
    """Linear and head FLOPs are what PyTorch counts in a prefill, attention's those of pairs."""
    fields = dict(model_type="mistral", sliding_window=window, head_dim=16)
    model = tiny.build(torch.float32, num_hidden_layers=4, **fields)
    heads = {layer: PruneHead(32, divisor=2) for layer, share in schedule.items() if share}
    with FlopCounterMode(display=False) as counter:
        _, cache = prefill(model, tiny.ids(40), heads, schedule)
    counted = counter.get_flop_counts()["Global"]
    positions = [layer.rows()[2] for layer in cache.layers]
    linear, attention, scoring = executed_flops(model.config, 40, positions, heads)
    assert linear + scoring == sum(v for op, v in counted.items() if "attention" not in str(op))
    rows = [40, *map(len, positions)]
    assert scoring == sum(2 * rows[layer] * (32 * 16 + 16 * 2) for layer in heads)
    seen = [(i - j).item() for p in positions for i in p for j in p]
    assert attention == 4 * 16 * 4 * sum(0 <= s < (window or 99) for s in seen)
    if window is None:
        counts = [count for (count,) in cache.alive]
        assert counts == alive_per_layer(schedule, 40, 4)
        assert executed_flops(model.config, 40, counts, heads) == (linear, attention, scoring)


@pytest.mark.parametrize("fields", [tiny.QWEN3, tiny.BLOOM, tiny.GPT_OSS])
def test_families(fields):
    """A token meets the router and its experts alone; BLOOM's keys are eight columns wider."""
    model, positions = tiny.build(torch.float32, **fields), [torch.arange(40)] * 3
    with FlopCounterMode(display=False) as counter:
        prefill(model, tiny.ids(40))
    counted = counter.get_flop_counts()["Global"].items()
    linear, attention, _ = executed_flops(model.config, 40, positions)
    assert linear == sum(v for op, v in counted if "attention" not in str(op))
    if fields == tiny.BLOOM:
        assert attention == 3 * 4 * 2 * (16 + 8) * 820


def test_part_of_a_pass():
    """Fewer layers than the model has, other rows through the LM head; a scorer without weights."""
    whole = executed_flops(CONFIG, 20, [20] * 30)
    first = executed_flops(CONFIG, 20, [20] * 10, {0: len}, logit_rows=0)
    assert first == (10 * 2 * 20 * 32 * (2 * 6 * 8 + 3 * 48), whole[1] // 3, 0)
    rows = executed_flops(CONFIG, 20, [20] * 30, logit_rows=20)[0] - whole[0]
    assert rows == 19 * 2 * 61 * 32


@pytest.mark.parametrize("keep", [0.95, 0.9, 0.8, 0.7])
def test_at_keep(keep):
    """On the paper's stages shares of keep**s, on others their FLOPs, all shares to one power."""
    paper = paper_schedule(30, keep)
    assert at_keep(CONFIG, paper_schedule(30, 0.5), keep, N) == paper
    for schedule in ({4: 0.5}, {0: 0.9, 10: 0.4}, {2: 0.7, 3: 0.7, 29: 0.1}, {4: 0.75, 25: 0.0}):
        got = at_keep(CONFIG, schedule, keep, N)
        cost, budget = (schedule_flops(CONFIG, s, N) for s in (got, paper))
        assert cost == pytest.approx(budget, rel=0.01)
        scored = {layer: share for layer, share in schedule.items() if share}
        powers = [math.log(got[layer]) / math.log(share) for layer, share in scored.items()]
        assert powers == pytest.approx(powers[:1] * len(powers))


def test_floors_move():
    """A share of 0 stays while what is spent before it fits; else it goes on, up to none."""
    floor = {24: 0.0, 4: 0.8}  # in any order
    dense = schedule_flops(CONFIG, {}, N)
    for share, layer in ((0.6, 24), (0.8, 24), (0.86, 26), (0.9, 27), (0.96, 29), (0.998, 30)):
        got = meet_budget(CONFIG, floor, share * dense, N)
        assert sorted(got) == [4, layer][: 1 + (layer < 30)] and got.get(layer, 0.0) == 0.0
        assert schedule_flops(CONFIG, got, N) == pytest.approx(share * dense, rel=0.01)
        before = {4: 1.0, layer - 1: 0.0}
        assert layer in (24, 30) or schedule_flops(CONFIG, before, N) < share * dense
    assert meet_budget(CONFIG, floor, 2 * dense, N) == {4: 1.0}
    assert meet_budget(CONFIG, floor, schedule_flops(CONFIG, floor, N), N) == floor
    with pytest.raises(ValueError, match="layers .15. cannot cost"):
        meet_budget(CONFIG, {15: 0.5}, 0.4 * dense, N)
