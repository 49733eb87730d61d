"""One look for all figures: method colours and markers, direct labels, bands, heat maps and image grids.

Use everything inside `with style_sheet():`; importing this module changes no matplotlib setting.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler

# Okabe and Ito's palette, with a darker purple and gold, and grey: distinguishable with colour-blindness, but for gold and red.
COLORS = {
    "blue": "#0072b2",
    "orange": "#e69f00",
    "green": "#009e73",
    "purple": "#882255",
    "grey": "#707070",
    "gold": "#a6761d",
    "red": "#d55e00",
    "black": "#000000",
}
# Baselines are muted; a family (ESD, closed forms, anchors, guidance, adapters) shares a colour, the marker tells its members.
_SLATE, _SAND, _MAUVE, _SAGE = "#5b7089", "#8a7a3a", "#8c5f7a", "#4f7f70"
_STYLES = {
    "base": ("#4d4d4d", "."),
    "oracle": (COLORS["green"], "s"),
    "esd-x": (_SLATE, "^"),
    "esd-u": (_SLATE, "v"),
    "uce": (_SAND, "X"),
    "rece": (_SAND, "*"),
    "mace": (_SAND, "p"),
    "speed": (_SAND, ">"),
    "oce": (_SAND, "<"),
    "ca": (_MAUVE, "P"),
    "eap": (_MAUVE, "x"),
    "age": (_MAUVE, "+"),
    "ace": (_SLATE, "<"),
    "ant": (_SLATE, ">"),
    "stereo": (_SLATE, "s"),
    "race": (_SLATE, "D"),
    "sld": ("#777777", "<"),
    "np": ("#777777", ">"),
    "spm": (_SAGE, "d"),
    "receler": (_SAGE, "h"),
    "adavd": (_SAGE, "s"),
    "kpop": (COLORS["blue"], "o"),
    "kpop-anchor": (COLORS["red"], "D"),
    "kpop-adversarial": (COLORS["purple"], "s"),
}


def style_sheet():
    """Context in which figures are drawn and saved."""
    cycle = {"axes.prop_cycle": cycler(color=list(COLORS.values()))}
    return plt.style.context([Path(__file__).with_name("erasekit.mplstyle"), cycle])


def style(method: str) -> dict:
    """{"color", "marker"} of a method, the same in all figures. "kpop-u" looks like "kpop", an unknown name is grey."""
    color, marker = _STYLES.get(method) or _STYLES.get(method.removesuffix("-u"), (COLORS["grey"], "o"))
    return {"color": color, "marker": marker}


def is_ours(method: str) -> bool:
    return method.startswith("kpop")


def weight(method: str) -> str:
    """Font weight of a method's name."""
    return "bold" if is_ours(method) else "normal"


def tiles(record, name: str) -> list[np.ndarray]:
    """The square images (H, H, 3) of a record's strip."""
    pixels = np.asarray(record.images[name].convert("RGB"))
    return np.split(pixels, pixels.shape[1] // pixels.shape[0], axis=1)


def show_image(ax, image, title: str | None = None) -> None:
    """An image without axes."""
    ax.imshow(image)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title, fontsize=8)


def panels(count: int, columns: int = 5, height: float = 2.0, width: float = 9.4, **options):
    """`count` axes in rows of `columns`, with shared axes unless `options` (of plt.subplots) say otherwise."""
    columns = min(columns, count)
    rows = -(-count // columns)
    options = {"sharex": True, "sharey": True, "layout": "constrained"} | options
    figure, axes = plt.subplots(rows, columns, figsize=(width, height * rows + 0.3), squeeze=False, **options)
    for n, ax in enumerate(axes.flat):
        if n >= count:
            axes.flat[n - columns].tick_params(labelbottom=True)  # now the lowest of its column
            ax.remove()
    return figure, list(axes.flat[:count])


def percent_axis(ax, axis: str, label: str, limits: tuple[float, float] = (-3, 103)) -> None:
    """Label and limits of an axis ("x" or "y") in percent; the label gets its ", %" if it has none."""
    ax.set(**{f"{axis}label": label if "%" in label else f"{label}, %", f"{axis}lim": limits})


def mean_band(ax, x, rows, **line) -> None:
    """The mean of `rows` (runs, len(x)) as a line, and the range they span as a band."""
    rows = np.asarray(rows, dtype=float)
    (mean,) = ax.plot(x, rows.mean(0), **({"marker": "o", "ms": 4} | line))
    if len(rows) > 1:
        ax.fill_between(x, rows.min(0), rows.max(0), color=mean.get_color(), alpha=0.15, lw=0)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates (larger is better), by x."""
    best, front = float("-inf"), []
    for x, y in sorted(points, key=lambda p: (-p[0], -p[1])):
        if y > best:
            front.append((x, y))
            best = y
    return front[::-1]


def heatmap(ax, frame, label: str, fmt: str = "{:.0f}", cmap: str = "viridis", colorbar: bool = True, **limits):
    """A table as colours with its numbers written in; blank where NaN. `label` (with unit) names the colour bar."""
    values = frame.to_numpy(dtype=float)
    image = ax.imshow(np.ma.masked_invalid(values), cmap=cmap, aspect="auto", **limits)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = np.dot(image.cmap(image.norm(value))[:3], (0.299, 0.587, 0.114)) < 0.5
            color = "white" if dark else "black"
            ax.text(column, row, fmt.format(value), ha="center", va="center", fontsize=7.5, color=color)
    ax.set_xticks(range(frame.shape[1]), [str(name) for name in frame.columns])
    ax.set_yticks(range(frame.shape[0]), [str(name) for name in frame.index])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if colorbar:
        ax.figure.colorbar(image, ax=ax, label=label)
    return image


def by_rate(models: Sequence[str], rates) -> tuple[list[str], list[int]]:
    """The base and methods with a rate above 50 %, highest first; then the others; then the oracle. And where groups begin.

    `rates`: model -> how often it shows the erased concept without an attack. Above 50 % an attack says little about it.
    """
    methods = sorted((m for m in models if m not in ("base", "oracle")), key=lambda m: -rates.get(m, 0))
    first = ["base"] * ("base" in models) + [m for m in methods if rates.get(m, 0) > 50]
    names = first + [m for m in methods if m not in first] + ["oracle"] * ("oracle" in models)
    return names, [n for n in (len(first), len(names) - ("oracle" in models)) if 0 < n < len(names)]


def method_rows(ax, methods: Sequence[str], names: Sequence[str] | None = None) -> None:
    """Rows from top to bottom, their names in the colours of the methods."""
    ax.set_yticks(range(len(methods)), methods if names is None else names)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(methods) - 0.5, -0.5)
    for label, method in zip(ax.get_yticklabels(), methods):
        label.set(color=style(method)["color"], weight=weight(method))


def rows_with_gaps(ax, models: list[str], starts: list[int]) -> None:
    """The rows of a heat map, with a gap before each of `starts`; see `by_rate`."""
    method_rows(ax, models, [f"{m} (never saw it)" if m == "oracle" else m for m in models])
    for start in starts:
        ax.axhline(start - 0.5, color="white", lw=4)


def image_grid(
    rows: dict[str, list],
    column_titles: Sequence[str] = (),
    groups: dict[str, int] | None = None,
    captions: dict[tuple[int, int], str] | None = None,
    outlined: Sequence[tuple[int, int]] = (),
    size: float = 0.8,
    title_size: float = 7.5,
    rotation: float = 0,
):
    """A figure of labelled rows of square images; None leaves a cell empty.

    `groups`: heading -> number of columns under it, with a gap between groups. `captions` and `outlined` are by (row, column);
    a caption is below its image and may extend over the next columns. `size` is that of an image, in inches. Row labels
    that are methods have their colours.
    """
    count, groups, captions = max(map(len, rows.values())), groups or {}, captions or {}
    starts = np.cumsum([0, *groups.values()])[:-1]
    x = np.arange(count) * 1.04 + 0.3 * np.searchsorted(starts[1:], np.arange(count), side="right")
    line = 0.14 / size  # of text, in image heights
    step = 1.04 + 1.2 * line * max([text.count("\n") + 1 for text in captions.values()], default=0)
    title_lines = max([title.count("\n") + 1 for title in column_titles], default=0) if not rotation else 4
    top = line * (title_lines * title_size / 8 + 1.6 * bool(groups) + 0.3)
    left = line * (0.46 * max(len(part) for label in rows for part in label.split("\n")) + 0.9)
    width, height = left + x[-1] + 1.02, top + step * len(rows)
    figure = plt.figure(figsize=(width * size, height * size))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.axis("off")
    for row, (label, images) in enumerate(rows.items()):
        y = row * step
        known = label in _STYLES or label.removesuffix("-u") in _STYLES
        color = style(label)["color"] if known else "black"
        ax.text(-0.12, y + 0.5, label, ha="right", va="center", fontsize=8, color=color, weight=weight(label))
        for column, image in enumerate(images):
            if image is not None:
                ax.imshow(image, extent=(x[column], x[column] + 1, y + 1, y))
            if (row, column) in outlined:
                ax.add_patch(plt.Rectangle((x[column], y), 1, 1, fill=False, ec=COLORS["red"], lw=1.8, zorder=3))
            if (row, column) in captions:
                ax.text(x[column], y + 1.05, captions[row, column], va="top", fontsize=7, color="#444444")
    alignment = {"ha": "left", "rotation_mode": "anchor"} if rotation else {"ha": "center"}
    for at, title in zip(x + (0.2 if rotation else 0.5), column_titles):
        ax.text(at, -0.06, title, va="bottom", fontsize=title_size, rotation=rotation, linespacing=1.0, **alignment)
    for start, (heading, columns) in zip(starts, groups.items()):
        middle = (x[start] + x[start + columns - 1] + 1) / 2
        known = heading in _STYLES
        color = style(heading)["color"] if known else "black"
        ax.text(middle, -top + 0.3 * line, heading, ha="center", va="top", weight="bold", fontsize=9, color=color)
    ax.set(xlim=(-left, x[-1] + 1.02), ylim=(height - top, -top), aspect="auto")
    return figure


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Descending heights pushed apart by at least `gap`, within [low, high] as far as they fit."""
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] - gap) if placed else min(height, high))
    for n in reversed(range(len(placed))):
        floor = low if n == len(placed) - 1 else placed[n + 1] + gap
        placed[n] = max(placed[n], floor)
    return placed


def label_ends(ax, ends: dict[str, float], size: float = 7.5, colors: dict[str, str] | None = None) -> None:
    """Names of lines in a column right of the axes, at the heights where the lines end, pushed apart in their order.

    Works on linear and logarithmic axes. `colors` by name, where the lines are not methods.
    """
    ax.figure.draw_without_rendering()  # settles the layout
    box, to_pixel = ax.get_window_extent(), ax.transData.transform
    x, pixel = ax.get_xlim()[1], ax.figure.dpi / 72 / box.height
    places = {name: (to_pixel((x, y))[1] - box.y0) / box.height for name, y in ends.items()}
    heights = {name: float(np.clip(place, 0, 1)) for name, place in places.items() if not np.isnan(place)}
    ordered = sorted(heights, key=lambda name: -heights[name])
    lines = max([name.count("\n") + 1 for name in ends], default=1)
    for name, place in zip(ordered, spread([heights[name] for name in ordered], 1.25 * size * pixel * lines, 0, 1)):
        color = (colors or {}).get(name) or style(name)["color"]
        ax.plot([1.01, 1.05], [heights[name], place], transform=ax.transAxes, color=color, lw=0.6, clip_on=False)
        text = {"va": "center", "fontsize": size, "color": color, "weight": weight(name), "linespacing": 1.0}
        ax.text(1.06, place, name, transform=ax.transAxes, **text)


def label_points(ax, points: dict[str, tuple[float, float]], markers: bool = True, size: float = 7.5) -> None:
    """Draw each point in its method's style, with its name beside it, or on a leader line where it is crowded.

    Labels cover neither points nor each other and leader lines do not cross, as far as there is room: each label in turn takes
    the cheapest of places around its point until none moves. Call it last: it needs the final limits and layout.
    """
    if markers:
        for name, (x, y) in points.items():
            ours = is_ours(name)
            ax.plot([x], [y], ls="", ms=8 if ours else 6, mew=1.2, zorder=4 if ours else 3, **style(name))
    ax.figure.draw_without_rendering()
    pixel = ax.figure.dpi / 72  # of a typographic point
    at = {name: ax.transData.transform(point) for name, point in points.items()}
    frame = ax.get_window_extent()
    dots = {name: _box(p, 9 * pixel, 9 * pixel) for name, p in at.items()}
    options, chosen = {}, {}
    for name, point in at.items():
        text = ax.text(0, 0, name, fontsize=size, weight=weight(name))
        extent = text.get_window_extent()
        text.remove()
        options[name] = _places(point, extent.width + 6 * pixel, extent.height, pixel, frame)
    # The crowded choose first.
    distance = {n: sorted(np.hypot(*(p - q)) for q in at.values())[: len(at)] for n, p in at.items()}
    order = sorted(at, key=lambda name: sum(distance[name][1:4]))
    for _ in range(8):
        before = dict(chosen)
        for name in order:
            others = [place for other, place in chosen.items() if other != name]
            free = [dot for other, dot in dots.items() if other != name]
            chosen[name] = _cheapest(options[name], others, free)
        if chosen == before:
            break
    for name, (box, leader, _) in chosen.items():
        color = style(name)["color"]
        offset = np.subtract(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), at[name]) / pixel
        if np.hypot(*np.subtract(*leader)) > 11 * pixel:
            end = np.subtract(leader[1], at[name]) / pixel
            arrow = {"arrowstyle": "-", "color": color, "lw": 0.6, "shrinkA": 0, "shrinkB": 4}
            how = {"xy": points[name], "textcoords": "offset points", "arrowprops": arrow}
            ax.annotate("", xytext=end, **how).set_in_layout(False)
        text = {"fontsize": size, "color": color, "weight": weight(name), "ha": "center", "va": "center"}
        ax.annotate(name, points[name], offset, textcoords="offset points", zorder=5, **text).set_in_layout(False)


def _box(center, width: float, height: float) -> tuple:
    return center[0] - width / 2, center[1] - height / 2, center[0] + width / 2, center[1] + height / 2


def _places(point, width: float, height: float, pixel: float, frame) -> list[tuple]:
    """(box, leader line, own cost) of the places for a label around a point, cheapest first: near, and to the right."""
    places = []
    for radius in (8, 13, 20, 30, 42, 56, 75):
        for angle in np.arange(0, 2 * np.pi, np.pi / 12):
            direction = np.array([np.cos(angle), np.sin(angle)])
            x0, y0, x1, y1 = box = _box(
                point + direction * (radius * pixel + np.array([width, height]) / 2), width, height
            )
            outside = x0 < frame.x0 or x1 > frame.x1 or y0 < frame.y0 or y1 > frame.y1
            end = np.clip(point[0], x0, x1), np.clip(point[1], y0, y1)
            cost = radius + (1 - direction[0]) + abs(direction[1]) + 300 * outside
            places.append((box, (tuple(point), end), cost))
    return sorted(places, key=lambda place: place[2])


def _cheapest(places: list[tuple], others: list[tuple], dots: list[tuple]) -> tuple:
    """The place whose own cost and what it covers or crosses cost least."""
    best, least = places[0], float("inf")
    for place in places:
        box, leader, cost = place
        if cost >= least:
            break
        for other, line, _ in others:
            covers = _overlap(box, other) or _through(leader, other) or _through(line, box)
            cost += 200 * (covers + _cross(leader, line))
        cost += sum(200 * _overlap(box, dot) + 40 * _through(leader, dot) for dot in dots)
        if cost < least:
            best, least = place, cost
    return best


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _through(line: tuple, box: tuple) -> bool:
    """Whether a line passes through a box, by points along it."""
    (x0, y0), (x1, y1) = line
    steps = (n / 10 for n in range(11))
    return any(box[0] < x0 + s * (x1 - x0) < box[2] and box[1] < y0 + s * (y1 - y0) < box[3] for s in steps)


def _cross(a: tuple, b: tuple) -> bool:
    """Whether two lines cross."""

    def side(p, q, r):
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(*a, b[0]) * side(*a, b[1]) < 0 and side(*b, a[0]) * side(*b, a[1]) < 0
