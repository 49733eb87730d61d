"""Intervals of rates: Wilson's by published values, the bootstrap by what is known of it."""

import numpy as np
import pytest

from erasekit.evaluation.intervals import bootstrap, wilson


def test_wilsons_interval():
    assert wilson(0.0, 50) == pytest.approx((0.0, 7.13), abs=0.01)
    assert wilson(88.0, 50) == pytest.approx((76.19, 94.38), abs=0.01)


def test_without_spread_the_bootstrap_is_as_wide_as_wilsons():
    assert bootstrap([np.full((3, 5), 100.0)], 10) == pytest.approx(wilson(100.0, 50))


def test_images_alone_give_the_binomials_width():
    """One concept and one seed: nothing but images is resampled."""
    low, high = bootstrap([np.array([[60.0]])], 400)
    half = 1.96 * 100 * (0.6 * 0.4 / 400) ** 0.5
    assert (low, high) == pytest.approx((60 - half, 60 + half), abs=0.4)


def test_concepts_and_seeds_widen_it():
    """Ten concepts of 40 and of 80 %: the mean of ten draws has the standard error 20 / sqrt(10), whatever the images."""
    rates = np.tile([40.0, 80.0], 5)
    low, high = bootstrap([np.stack([rates] * 4)], 100_000)
    assert (high - low) / 2 == pytest.approx(1.96 * 20 / 10**0.5, rel=0.06)
    low, high = bootstrap([np.repeat([[50.0], [70.0]], 10, axis=1)], 100_000)
    assert (low, high) == pytest.approx((50, 70), abs=0.2)


def test_groups_are_averaged_and_the_result_is_the_same_twice():
    groups = [np.full((1, 5), 90.0), np.full((1, 5), 50.0)]
    low, high = bootstrap(groups, 50)
    assert low < 70 < high and high - low < 10
    assert bootstrap(groups, 50) == (low, high)
