"""The look of every figure, and the pieces they share."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

plt.style.use(Path(__file__).with_name("erasekit.mplstyle"))
BLUE, ORANGE, GREEN, PURPLE, GREY, GOLD = (c["color"] for c in plt.rcParams["axes.prop_cycle"])
OURS = {"kpop": GREEN, "kpop-anchor": PURPLE, "kpop-adversarial": ORANGE}


def colour(method: str) -> str:
    """The forms of KPOP stand out from the baselines; a variant has its method's colour."""
    return OURS.get(method.removesuffix("-u") if method.startswith("kpop") else method, GREY)


def tiles(record, name: str) -> list[np.ndarray]:
    """The images of a strip."""
    pixels = np.asarray(record.images[name].convert("RGB"))
    return np.split(pixels, pixels.shape[1] // pixels.shape[0], axis=1)


def picture(ax, image, title: str | None = None) -> None:
    ax.imshow(image)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title, fontsize=8)


def labelled(ax, points: dict[str, tuple[float, float]], gap: float) -> None:
    """A scatter with its names in a column to the right, in the points' order from top to bottom, `gap` apart in y."""
    low, high = ax.get_ylim()
    ordered = sorted(points.items(), key=lambda item: -item[1][1])
    heights = spread([y for _, (_, y) in ordered], gap, low, high)
    right = ax.get_xlim()[1]
    for (name, (x, y)), height in zip(ordered, heights):
        ax.scatter([x], [y], color=colour(name), s=28, zorder=3)
        end = right + 0.06 * (right - ax.get_xlim()[0])
        ax.plot([x, end], [y, height], color=colour(name), lw=0.5, alpha=0.6, clip_on=False, zorder=2)
        bold = "bold" if name in OURS else "normal"
        ax.text(end, height, f" {name}", va="center", fontsize=7.5, color=colour(name), weight=bold)


def spread(heights: list[float], gap: float, low: float, high: float) -> list[float]:
    """Descending heights pushed apart by at least `gap`, within [low, high] as far as they fit."""
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] - gap) if placed else min(height, high))
    for n in reversed(range(len(placed))):
        floor = low if n == len(placed) - 1 else placed[n + 1] + gap
        placed[n] = max(placed[n], floor)
    return placed


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in one coordinate without losing in the other, by x."""
    best, kept = float("-inf"), []
    for x, y in sorted(points, key=lambda p: (-p[0], -p[1])):
        if y > best:
            kept.append((x, y))
            best = y
    return kept[::-1]
