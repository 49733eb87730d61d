"""04: the paper's object splits, every method on the same images, seeds and sampler."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from .operating_points import METHOD_NAMES, method_rows

NOTEBOOK, VERSION, UNIT = "04_objects", 1, "images a class"  # raise VERSION when the numbers should change
ROWS = "methods"  # the setting that erasures given to `run` are added to


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = METHOD_NAMES
    operating_points: dict | None = None  # method -> {"settings", "scale"}; None: those of the committed record
    splits: tuple[str, ...] = ("S1", "S2", "S3", "S4")  # or classes by name: "church" alone, "church, dog" at once
    training_seeds: int = 3
    retain: tuple[str, ...] = ("named", "empty")  # ten named objects, or the empty prompt
    repeated: tuple[str, ...] = ("S1",)  # splits with further training seeds and the second retain option
    seeds: int = 10
    few_seeds: int = 4  # for neighbours and other templates; each of the other objects has one image
    sampling_steps: int = 8
    training_steps: int | None = None


SMALL = {"splits": ("S1",), "training_seeds": 1, "retain": ("named",)}
PRESETS = {
    "full": Settings(),
    "quick": Settings(methods=("esd-x", "uce", "ca", "spm", "kpop", "kpop-anchor"), **SMALL),
    "smoke": Settings(("uce", "kpop"), seeds=1, few_seeds=1, sampling_steps=2, training_steps=1, **SMALL),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Rates in percent for each method and split; on `repeated` splits for each training seed and retain option."""
    from tqdm.auto import tqdm

    from ..evaluation.protocol import eval_prompts, evaluate_split, recovery_rate
    from .kit.cache import cached
    from .kit.erasures import make_config, measured, method_points
    from .kit.given import erases

    erased = {split: world.split(split) for split in s.splits}
    points = method_points(s.operating_points, s.methods, erased.values(), "splits")
    sizes = s.seeds, s.few_seeds, s.sampling_steps
    first = s.retain[0], 0, s.splits[0]

    def measure(erasure, concepts):
        rates, strip = evaluate_split(world, erasure, concepts, *sizes)
        if erasure is not None and erasure.keys:
            rates["with the key"] = recovery_rate(world, erasure, concepts, s.few_seeds, s.sampling_steps)
        return rates, strip

    base, runs, images = {}, [], {}
    for split, concepts in erased.items():
        where = "objects", VERSION, world
        base[split], strip = cached(*where, lambda c=concepts: measure(None, c), "base", concepts, sizes)
        images.setdefault("base", strip)
    cells = [
        (option, seed, split, method)
        for option, seed, split, method in product(s.retain, range(s.training_seeds), s.splits, s.methods)
        if worth_running(method, option, seed) and (split in s.repeated or (option, seed) == first[:2])
        if erases(method, erased[split])
    ]
    for option, seed, split, method in tqdm(cells, desc="objects"):
        changes, scale = points[method]["settings"], points[method]["scale"]
        retain = None if option == "named" else ("",)
        config = make_config(world, method, seed, s.sampling_steps, changes, s.training_steps, retain=retain)
        concepts = erased[split]
        where = "objects", VERSION, world, concepts, method, config, scale
        rates, strip = measured(*where, lambda erasure, c=concepts: measure(erasure, c), sizes)
        runs.append({"method": method, "split": split, "training_seed": seed, "retain": option} | rates)
        if (option, seed, split) == first:
            images[method] = strip
    prompts = eval_prompts(world, erased[s.splits[0]], s.seeds, s.few_seeds)
    return {
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "training_seeds": s.training_seeds,
        "splits": s.splits,
        "erased": erased,
        "repeated": s.repeated,
        "operating_points": {m: points[m] for m in s.methods},
        "sizes": {part: len(triples) for part, triples in prompts.items()},
        "base": base,
        "runs": runs,
        "frontier": frontier([run for run in runs if run["retain"] == s.retain[0]]),
    }, images


def has_setting(method: str, name: str) -> bool:
    from ..baselines import METHODS

    return name in METHODS[method].config.__dataclass_fields__


def worth_running(method: str, option: str, seed: int) -> bool:
    """Whether a further training seed (for methods that train) or the empty prompt (for methods that retain) changes anything."""
    if option == "named":
        return seed == 0 or has_setting(method, "lr")
    return seed == 0 and has_setting(method, "retain")


def frontier(runs: list[dict]) -> dict:
    """For each form of KPOP and each split: the baselines that erase more and keep more, by means over training seeds.

    Erases: ESR-1. Keeps: PSR-1 over the split's other five classes, or the rate over all other objects.
    """
    means = pd.DataFrame(runs).groupby(["method", "split"], sort=False)[["ESR-1", "PSR-1", "others"]].mean()
    methods, splits = (list(dict.fromkeys(run[name] for run in runs)) for name in ("method", "split"))

    def ahead(form, split, kept):
        ours = means.loc[form, split]
        baselines = [
            (m, means.loc[m, split]) for m in methods if not m.startswith("kpop") and (m, split) in means.index
        ]
        return [m for m, rates in baselines if rates["ESR-1"] > ours["ESR-1"] and rates[kept] > ours[kept]]

    forms = [m for m in methods if m.startswith("kpop")]
    measures = "PSR-1", "others"
    return {f: {s: {m: ahead(f, s, m) for m in measures} for s in splits if (f, s) in means.index} for f in forms}


def run_frame(record) -> pd.DataFrame:
    """The runs, with the mean rate over templates that no method was trained on."""
    frame = pd.DataFrame(record.data["runs"])
    frame["other templates"] = [np.mean(list(rates.values())) for rates in frame.templates]
    return frame


def num_erased(record, split: str) -> int:
    """How many of a split's classes are erased; they come first. Older records do not say: named classes, or half of them."""
    classes = record.data["base"][split]["by_class"]
    names = record.data.get("erased", {}).get(split, split.split(", "))
    return len(names) if set(names) <= set(classes) else len(classes) // 2


def intervals(record, runs: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """95 % intervals of one method's rates, means over splits: see `intervals.bootstrap`.

    Of the other objects, of which each has one image, and of the other templates: Wilson's, as if all images were independent.
    """
    from ..evaluation.intervals import bootstrap, wilson

    erased, kept, count = [], [], 0
    for split, own in runs.groupby("split"):
        rates, n = np.array([list(by_class.values()) for by_class in own.by_class]), num_erased(record, split)
        erased, kept, count = [*erased, 100 - rates[:, :n]], [*kept, rates[:, n:]], count + n
    means = runs.groupby("split")[["others", "other templates"]].mean().mean()
    few = record.settings["few_seeds"] * len(runs.templates.iloc[0])
    return {
        "ESR-1": bootstrap(erased, record.data["N"]),
        "PSR-1": bootstrap(kept, record.data["N"]),
        "others": wilson(means["others"], record.data["sizes"]["others"] * len(erased)),
        "other templates": wilson(means["other templates"], few * count),
    }


def figures(record) -> dict:
    return {"objects_frontier": frontier_figure(record), "objects_grid": grid_figure(record)} | retain_figure(record)


def frontier_figure(record):
    """Erased against kept with the frontier: by the paper's protocol, and by what it does not ask."""
    import matplotlib.pyplot as plt
    from matplotlib.patheffects import withStroke

    from .kit import plots

    frame = run_frame(record)
    frame = frame[frame.retain == record.settings["retain"][0]]
    by_split = frame.groupby(["method", "split"], sort=False)[["ESR-1", "PSR-1", "others", "other templates"]].mean()
    mean = by_split.groupby("method", sort=False).mean()
    between = {m: intervals(record, own) for m, own in frame.groupby("method", sort=False)}
    others = f"Kept: {record.data['sizes']['others']} other objects, %"
    sides = (
        ("ESR-1", "Erased: ESR-1, %", "PSR-1", "Kept: the split's other classes, PSR-1, %"),
        ("other templates", "Erased: ESR-1 under templates not trained on, %", "others", others),
    )
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 4.8), layout="constrained")
    band = {"color": plots.COLORS["gold"], "lw": 7, "alpha": 0.25, "label": "frontier: none erases and keeps more"}
    bars = {"fmt": "none", "ecolor": "#cccccc", "elinewidth": 0.8, "label": "95 % interval"}
    for ax, (x, x_label, y, y_label) in zip(axes, sides):
        points = {m: (mean[x][m], mean[y][m]) for m in mean.index}
        near = {m: p for m, p in points.items() if p[0] >= 50} or points
        low, left = min(p[1] for p in near.values()) - 4, min(p[0] for p in near.values()) - 6
        ax.set(xlim=(left, 101.5), ylim=(low, 102), xlabel=x_label, ylabel=y_label)
        ax.plot(*zip(*plots.pareto_front(list(near.values()))), zorder=1, **band)
        sides_of = {r: np.abs([np.subtract(between[m][r], mean[r][m]) for m in mean.index]).T for r in (x, y)}
        ax.errorbar(mean[x], mean[y], sides_of[y], sides_of[x], zorder=0, **bars)
        plots.label_points(ax, near)
        far = sorted(set(points) - set(near), key=lambda m: -points[m][1])  # named at the edge, at their height
        for m, height in zip(far, plots.spread([points[m][1] for m in far], (102 - low) / 25, low, 102)):
            text = {"fontsize": 7.5, "va": "center", "color": plots.style(m)["color"]}
            ax.text(left + 0.5, height, f"← {m}, {points[m][0]:.0f} %", **text)
        for text in ax.texts:
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def grid_figure(record):
    """The same prompts and seed under every method, the classes framed on which it fails more often than not."""
    from .kit import plots

    split = record.data["splits"][0]
    classes = list(record.data["base"][split]["by_class"])
    erased = num_erased(record, split)
    rates = {
        run["method"]: [run["by_class"][c] for c in classes]
        for run in record.data["runs"]
        if (run["split"], run["training_seed"], run["retain"]) == (split, 0, record.settings["retain"][0])
    }
    failed = [
        (row, column)
        for row, name in enumerate(record.images)
        for column, rate in enumerate(rates.get(name, []))
        if (rate > 50 if column < erased else rate < 50)
    ]
    groups = {f"Erased ({split})": erased, "Kept": len(classes) - erased}
    rows, titles = (
        {name: plots.tiles(record, name) for name in record.images},
        [c.replace(" ", "\n", 1) for c in classes],
    )
    figure = plots.image_grid(rows, titles, groups, outlined=failed, size=0.72)
    note = f"Framed: in most of its {record.data['N']} images the erased class is still recognised, or the kept one is not."
    figure.text(0.5, -0.003, note, ha="center", va="top", fontsize=8)
    return figure


def retain_figure(record) -> dict:
    """What retaining ten named objects changes against retaining the empty prompt, where a record has both."""
    import matplotlib.pyplot as plt

    from .kit import plots

    if len(record.settings["retain"]) < 2:
        return {}
    frame = run_frame(record)
    frame = frame[(frame.training_seed == 0) & frame.split.isin(record.data["repeated"])]
    means = frame.groupby(["retain", "method"], sort=False)[["ESR-1", "PSR-1", "others"]].mean()
    empty = means.loc["empty"]
    methods, named = list(empty.index), means.loc["named"].loc[empty.index]
    figure, axes = plt.subplots(
        1, 3, figsize=(9.4, 0.26 * len(methods) + 1.1), sharex=True, sharey=True, layout="constrained"
    )
    labels = {"ESR-1": "Erased: ESR-1, %", "PSR-1": "Kept: the split's other classes, PSR-1, %"}
    labels["others"] = f"Kept: {record.data['sizes']['others']} other objects, %"
    for ax, (rate, label) in zip(axes, labels.items()):
        for y, m in enumerate(methods):
            line = {"color": plots.style(m)["color"]}
            ax.plot([empty[rate][m], named[rate][m]], [y, y], lw=1.2, zorder=1, **line)
            ax.plot(empty[rate][m], y, "o", ms=6, mfc="white", mew=1.2, **line)
            ax.plot(named[rate][m], y, "o", ms=6, **line)
        plots.percent_axis(ax, "x", label, (min(named.min().min(), empty.min().min()) - 5, 103))
        ax.grid(axis="y", color="#e6e6e6", lw=0.6)
        method_rows(ax, methods)
    handles = [plt.Line2D([], [], color="black", marker="o", ms=6, lw=0, mfc=fill) for fill in ("white", "black")]
    names = "the empty prompt is retained", "ten named objects are retained"
    figure.legend(handles, names, loc="outside upper center", ncols=2)
    return {"objects_retain": figure}


def table(record) -> pd.DataFrame:
    """Means over splits; in brackets 95 % intervals, see `intervals`."""
    frame = run_frame(record)
    columns = ["ESR-1", "ESR-5", "PSR-1", "PSR-5", "others", "neighbours", "other templates", "with the key"]
    frame = frame.reindex(columns=frame.columns.union(columns, sort=False))
    base = pd.DataFrame(record.data["base"]).T
    base["other templates"] = [np.mean(list(rates.values())) for rates in base.templates]
    rows = {"base": {c: f"{base[c].astype(float).mean():.1f}" for c in columns[:-1]}}
    for (option, method), own in frame.groupby(["retain", "method"], sort=False):
        by_split = own.groupby("split")[columns].mean()
        row = {c: f"{by_split[c].mean():.1f}" for c in columns if by_split[c].notna().all()}
        for c, (low, high) in intervals(record, own).items():
            row[c] += f" ({low:.0f} to {high:.0f})"
        name = method if option == "named" else f"{method}, retain “” ({', '.join(own.split.unique())})"
        seconds = own.training_seconds.dropna()  # another project's are not known
        rows[name] = row | {"training, s": f"{seconds.mean():.0f}" if len(seconds) else ""}
    titles = {"others": f"{record.data['sizes']['others']} other objects", "neighbours": "near neighbours"}
    titles["other templates"] = "ESR-1, other templates"
    splits = ", ".join(record.data["splits"])
    return pd.DataFrame(rows).T.fillna("").rename(columns=titles).rename_axis(f"%, means over {splits}")
