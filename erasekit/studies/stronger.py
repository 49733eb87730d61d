"""04: who keeps more when all erase as much? Every method along its step, on the reported concepts; chooses nothing."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .operating_points import METHOD_NAMES, along_step

NOTEBOOK, VERSION, UNIT = "04_objects", 2, "images an erased class"  # raise VERSION when the numbers should change
RATES = ("ESR-1", "PSR-1", "others")


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = tuple(m for m in METHOD_NAMES if m not in ("sld", "np"))  # pure guidance has no step
    operating_points: dict | None = None  # by method; None: of the record of "operating_points"
    splits: tuple[str, ...] = ("S1", "S2")  # together they erase each of the ten classes once
    factors: tuple[float, ...] = (0.85, 1.0, 1.15, 1.3, 1.5)  # of the operating point's step from the base
    seeds: int = 25
    kept_seeds: int = 10  # for each of the split's other classes
    other_seeds: int = 1  # for each of the other objects
    training_seed: int = 0
    sampling_steps: int = 15
    training_steps: int | None = None


PRESETS = {
    "full": Settings(),
    "quick": Settings(("esd-x", "ca", "kpop", "kpop-anchor"), None, ("S1",), (1.0, 1.3), seeds=10, kept_seeds=5),
    "smoke": Settings(("kpop",), None, ("S1",), (1.0, 1.3), 1, 1, sampling_steps=2, training_steps=1),
}
VERIFY = {"methods": ("ca", "kpop-anchor"), "splits": ("S1",)}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Rates in percent of each method and split at each part of its step, on images of the same prompts and seeds."""
    from tqdm.auto import tqdm

    from .kit.cache import cached
    from .kit.erasures import make_config, measured, method_points

    points, base, runs = method_points(s.operating_points, s.methods), {}, []
    sizes = s.factors, s.seeds, s.kept_seeds, s.other_seeds, s.sampling_steps
    for split, method in tqdm([(split, m) for split in s.splits for m in (None, *s.methods)], desc="stronger"):
        erased = world.split(split)
        groups = {
            "ESR-1": (erased, s.seeds),
            "PSR-1": ([c for c in world.concepts("classes") if c not in erased], s.kept_seeds),
            "others": (world.unseen_classes("classes"), s.other_seeds),
        }

        def measure(erasure, groups=groups):
            return rates(world, erasure, groups, s.sampling_steps)

        if method is None:
            parts = "base", erased, sizes[1:]
            base[split], _ = cached("stronger", VERSION, world, lambda m=measure: (m(None), None), *parts)
            continue
        settings, scale = points[method]["settings"], points[method]["scale"]
        config = make_config(world, method, s.training_seed, s.sampling_steps, settings, s.training_steps)
        scales = [round(scale * factor, 4) for factor in s.factors]
        line = along_step(world, scales, measure)
        found, _ = measured("stronger", VERSION, world, erased, method, config, 1.0, line, scale, sizes)
        about = {"method": method, "split": split}
        runs += [about | {"factor": f} | point for f, point in zip(s.factors, found["points"])]
    return {
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "training_seeds": 1,
        "erased": {split: list(world.split(split)) for split in s.splits},
        "operating_points": {m: points[m] for m in s.methods},
        "base": base,
        "runs": runs,
    }, {}


def rates(world, erasure, groups: dict, steps: int) -> dict:
    """Each group's mean rate, and under "by_class" how many percent of each class's images the judge recognises."""
    from ..evaluation.images import sample_images
    from ..evaluation.metrics import object_correct, percent

    prompts = [(world.prompt(c), c, n) for names, count in groups.values() for c in names for n in range(count)]
    correct = object_correct(world, sample_images(world, erasure, prompts, steps), [label for _, label, _ in prompts])
    found, by_class = {}, {}
    for (name, (classes, count)), part in zip(groups.items(), correct.split([len(c) * n for c, n in groups.values()])):
        by_class[name] = {c: percent(own) for c, own in zip(classes, part.split(count))}
        found[name] = percent(~part if name == "ESR-1" else part)
    return found | {"by_class": by_class}


def intervals(record, run: dict) -> dict[str, tuple[float, float]]:
    """95 % intervals of one training's rates over classes and images, see `intervals.bootstrap`."""
    from ..evaluation.intervals import bootstrap

    s = record.settings
    images = {"ESR-1": s["seeds"], "PSR-1": s["kept_seeds"], "others": s["other_seeds"]}
    seen = {name: np.array([*run["by_class"][name].values()]) for name in RATES}
    return {name: bootstrap([100 - seen[name] if name == "ESR-1" else seen[name]], images[name]) for name in RATES}


def figures(record) -> dict:
    """A line for each method, from its operating point on: what more erasure costs."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    from .kit import plots

    runs = record.data["runs"]
    frame, between = pd.DataFrame(runs), [intervals(record, run) for run in runs]
    labels = {"PSR-1": "Kept: the split's other classes, PSR-1, %"}
    labels["others"] = f"Kept: {len(runs[0]['by_class']['others'])} other objects, %"
    low, left = frame[["PSR-1", "others"]].min(axis=None) - 2, frame["ESR-1"].min() - 3
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 4.2), sharex=True, sharey=True, layout="constrained")
    for ax, (rate, label) in zip(axes, labels.items()):
        sides = {r: np.abs([np.subtract(b[r], run[r]) for b, run in zip(between, runs)]).T for r in ("ESR-1", rate)}
        bars = {"fmt": "none", "ecolor": "#dddddd", "elinewidth": 0.8, "zorder": 0}
        ax.errorbar(frame["ESR-1"], frame[rate], sides[rate], sides["ESR-1"], **bars)
        for method, own in frame.groupby("method", sort=False):
            ax.plot(own["ESR-1"], own[rate], color=plots.style(method)["color"], marker="o", mfc="white", ms=4, lw=1.2)
            ax.plot(own["ESR-1"].iloc[0], own[rate].iloc[0], ms=7, lw=0, **plots.style(method))
        ax.set(xlim=(left, 101), ylim=(low, 101), xlabel=f"Erased: {record.settings['split']}, ESR-1, %", ylabel=label)
        ax.set_yticks([tick for tick in ax.get_yticks() if low <= tick <= 100])
        starts = frame.groupby("method", sort=False).first()
        plots.label_points(ax, {m: (starts["ESR-1"][m], starts[rate][m]) for m in starts.index}, markers=False)
        for text in ax.texts:
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    grey = {"color": "#4d4d4d", "marker": "o", "lw": 0}
    parts = " and ".join(f"{factor:g}" for factor in frame["factor"].unique()[1:])
    handles = {
        "operating point": Line2D([], [], ms=7, **grey),
        f"{parts} times its step": Line2D([], [], ms=4, mfc="white", **grey),
        "95 % interval": Line2D([], [], color="#dddddd", marker="+", ms=9, lw=0),
    }
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3)
    return {"objects_stronger": figure}


def table(record) -> pd.DataFrame:
    """Every method at its operating point and beyond; in brackets 95 % intervals of one training."""
    rows = {"base": {name: f"{record.data['base'][name]:.1f}" for name in RATES}}
    for run in record.data["runs"]:
        between = intervals(record, run)
        row = {name: f"{run[name]:.1f} ({between[name][0]:.0f} to {between[name][1]:.0f})" for name in RATES}
        rows[f"{run['method']}, × {run['factor']:g}"] = row | {"part of the step": f"{run['scale']:.2f}"}
    others = f"{len(record.data['base']['by_class']['others'])} other objects"
    return (
        pd.DataFrame(rows).T.fillna("").rename(columns={"others": others}).rename_axis(f"%, {record.settings['split']}")
    )
