"""What the comparisons rest on: distances of features, the choice of a strength, the frontier, and how a figure is laid out."""

from itertools import pairwise

import pytest
import torch

from erasekit.drawing import front, spread
from erasekit.metrics import fid, kid
from erasekit.studies import objects, strength


def test_fid_of_two_gaussians_is_known():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    y = 2 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64) + torch.tensor([3.0, 0.0, 0.0])
    # |mean|^2 = 9, and (2 - 1)^2 in each of three dimensions.
    assert fid(x, y) == pytest.approx(12.0, rel=0.03)
    assert fid(x, x) == pytest.approx(0.0, abs=1e-9)


def test_kid_is_unbiased_and_sees_a_shift():
    draws = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(2, 20, 4, generator=generator, dtype=torch.float64)
        draws.append((kid(x, y), kid(x, y + 1)))
    same, shifted = torch.tensor(draws).mean(0)
    assert abs(same) < 0.1 < 1 < shifted


def test_of_what_erases_enough_that_is_taken_which_keeps_most_and_else_what_erases_most():
    tried = ((1, 0.8, 60.0, 99.0), (1, 1.0, 95.0, 80.0), (2, 0.8, 96.0, 90.0), (2, 1.0, 100.0, 85.0))
    runs = [
        {"settings": {"lr": lr}, "scale": scale, "ESR-1": esr, "ESR-5": 0.0, "PSR-1": psr}
        for lr, scale, esr, psr in tried
    ]
    assert strength.choose(runs) == {"settings": {"lr": 2}, "scale": 0.8}
    assert strength.choose(runs[:2]) == {"settings": {"lr": 1}, "scale": 1.0}
    assert strength.choose(runs[:1]) == {"settings": {"lr": 1}, "scale": 0.8}
    assert strength.choose(runs, enough=50.0) == {"settings": {"lr": 1}, "scale": 0.8}


def test_nothing_a_strength_is_chosen_on_or_a_model_is_held_to_is_reported(world):
    reported = set(world.concepts("classes")).union(*world.neighbours.values())
    assert not any(reported & set(world.concepts(g)) for g in ("tuning", "tuning kept", "retained"))
    assert set(strength.SWEEP) == set(objects.METHODS)


def test_a_baseline_is_ahead_only_if_it_erases_more_and_keeps_more():
    def run(method, esr, psr):
        return {"method": method, "split": "S1", "ESR-1": esr, "PSR-1": psr, "others": 50.0}

    runs = [run("kpop", 90, 90), run("a", 95, 95), run("b", 99, 90), run("c", 80, 99)]
    assert objects.frontier(runs) == {"kpop": {"S1": {"PSR-1": ["a"], "others": []}}}


def test_front_holds_what_nothing_beats():
    assert front([(1, 5), (2, 4), (2, 3), (3, 1), (0, 5)]) == [(1, 5), (2, 4), (3, 1)]


def test_labels_are_apart_in_order_and_on_the_axis():
    placed = spread([10.0, 9.9, 9.8, 1.0], gap=1.0, low=0.0, high=10.0)
    assert placed[0] == 10.0 and placed == sorted(placed, reverse=True)
    assert all(a - b >= 1.0 - 1e-9 for a, b in pairwise(placed))
    assert min(spread([0.1, 0.1, 0.0], gap=1.0, low=0.0, high=10.0)) == 0.0
