"""95 % intervals of rates. All rates and intervals are in percent."""

from collections.abc import Sequence

import numpy as np

DRAWS = 4000


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Of a rate of `count` independent images (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(round(rate / 100 * count), count).proportion_ci(method="wilson")
    return 100 * float(found.low), 100 * float(found.high)


def bootstrap(groups: Sequence[np.ndarray], images: int) -> tuple[float, float]:
    """Of the mean over `groups` of the mean of rates (training seeds, concepts), each of `images` images.

    Each draw takes training seeds, concepts and, within a concept, images with replacement; concepts are the same for all
    seeds. Rates of 0 or 100 alone would have no spread: an interval is never narrower than Wilson's for all images of one
    training seed, since further seeds draw the same concepts from the same noise.
    """
    generator = np.random.default_rng(0)
    means, count = np.zeros(DRAWS), 0
    for rates in groups:
        rates = np.atleast_2d(rates) / 100
        seeds, concepts = rates.shape
        chosen = (
            generator.integers(seeds, size=(DRAWS, seeds, 1)),
            generator.integers(concepts, size=(DRAWS, 1, concepts)),
        )
        means += generator.binomial(images, rates[chosen]).mean((1, 2)) / images / len(groups)
        count += concepts * images
    low, high = 100 * np.quantile(means, (0.025, 0.975))
    least, most = wilson(100 * float(np.mean([np.mean(rates) / 100 for rates in groups])), count)
    return float(min(low, least)), float(max(high, most))


def bootstrap_mean(values: Sequence[float]) -> tuple[float, float]:
    """Of the mean of any values, one a unit, by drawing units with replacement; of a single one, from -inf to inf."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return -np.inf, np.inf
    draws = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return float(low), float(high)
