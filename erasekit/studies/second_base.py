"""04: does the comparison hold on another base? Five methods on two bases, and what varies: base, training or images."""

from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd

from .stronger import REFERENCE, difference, equal_erasure, rates_along_step, untrained

NOTEBOOK, VERSION, UNIT = "04_objects", 1, "images an erased class"  # raise VERSION when the numbers should change
RATES = {"ESR-1": "ESR-1 at its own step", "others": "other objects kept where 95 % are erased"}
PARTS = "concepts", "trainings", "bases", "images"  # what rates vary with
BASES = ("bundled", "second")


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = ("esd-x", "uce", "ca", "kpop", "kpop-anchor")
    operating_points: dict | None = None  # by method, for both bases; None: of the record of "operating_points"
    splits: tuple[str, ...] = ("S1", "S2")  # together they erase each of the ten classes once
    factors: tuple[float, ...] = (0.85, 1.0, 1.15, 1.3, 1.5)  # of the operating point's step from the base
    training_seeds: int = 3
    seeds: int = 25
    kept_seeds: int = 10  # for each of the split's other classes
    other_seeds: int = 1  # for each of the other objects
    sampling_steps: int = 15
    training_steps: int | None = None


SMALL = {"splits": ("S1",), "factors": (1.0, 1.3)}
PRESETS = {
    "full": Settings(),
    "quick": Settings(("esd-x", "kpop"), training_seeds=1, seeds=10, kept_seeds=5, **SMALL),
    "smoke": Settings(
        ("uce", "kpop"), None, training_seeds=1, seeds=1, kept_seeds=1, sampling_steps=2, training_steps=1, **SMALL
    ),
}
VERIFY = {"methods": ("uce", "kpop"), "splits": ("S1",), "training_seeds": 1}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Rates in percent by base, method, split, training seed and part of the step, as in the study "stronger".

    A world without a second base has the rows of its own alone.
    """
    from tqdm.auto import tqdm

    from .kit.erasures import method_points
    from .objects import has_setting

    points, runs, base = method_points(s.operating_points, s.methods), [], {}
    bases = {name: w for name, w in zip(BASES, (world, world.second_base())) if w}
    for name, split in product(bases, s.splits):
        base.setdefault(name, {})[split] = untrained(bases[name], s, split)
    cells = list(product(bases, s.splits, s.methods, range(s.training_seeds)))
    for name, split, method, seed in tqdm(cells, desc="second base"):
        if seed and not has_setting(method, "lr"):
            continue  # a closed form is the same for every seed
        line = rates_along_step(bases[name], s, split, method, points[method], seed)
        about = {"base": name, "method": method, "split": split, "training_seed": seed}
        runs += [about | {"factor": f} | point for f, point in zip(s.factors, line)]
    return {
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "training_seeds": s.training_seeds,
        "bases": {name: {"pipeline_hash": w.pipeline_hash} for name, w in bases.items()},
        "operating_points": {m: points[m] for m in s.methods},
        "base": base,
        "runs": runs,
    }, {}


def trainings(record, base: str, method: str) -> list:
    """One view of the record for each training seed of a method on a base, as the study "stronger" reads its own."""
    runs = [run for run in record.data["runs"] if (run["base"], run["method"]) == (base, method)]
    seeds = dict.fromkeys(run["training_seed"] for run in runs)
    own = ([run for run in runs if run["training_seed"] == seed] for seed in seeds)
    return [SimpleNamespace(data={"runs": each}, settings=record.settings) for each in own]


def measured_rates(record, base: str, method: str) -> dict[str, np.ndarray]:
    """Rate -> (training seeds, concepts): ESR-1 of each erased class at its own step; other objects kept at equal erasure.

    An object that both splits keep is their mean.
    """
    splits, found = len(record.settings["splits"]), {name: [] for name in RATES}
    for view in trainings(record, base, method):
        at_own = [run for run in view.data["runs"] if run["factor"] == 1.0]
        found["ESR-1"].append([100 - rate for run in at_own for rate in run["by_class"]["ESR-1"].values()])
        kept = equal_erasure(view, method)[1]["others"]
        found["others"].append(kept.reshape(splits, -1).mean(0))
    return {name: np.array(rows) for name, rows in found.items()}


def ranking(record) -> list[str]:
    """The methods, by what they keep of other objects where all erase 95 %, on the first base."""
    kept = {m: measured_rates(record, BASES[0], m)["others"].mean() for m in record.settings["methods"]}
    return sorted(kept, key=kept.get, reverse=True)


def mean_training(record, base: str):
    """A view of the record as `trainings`, of all methods, with the mean over the trainings of each rate of a class."""
    views = []
    for method in record.settings["methods"]:
        for same in zip(*(view.data["runs"] for view in trainings(record, base, method))):
            groups = {
                name: {c: np.mean([run["by_class"][name][c] for run in same]) for c in rates}
                for name, rates in same[0]["by_class"].items()
            }
            views.append(same[0] | {"by_class": groups})
    return SimpleNamespace(data={"runs": views}, settings=record.settings)


def images_of(record, rate: str) -> int:
    """The images behind each concept's rate, as `intervals.bootstrap` takes them."""
    s = record.settings
    return s["seeds"] if rate == "ESR-1" else s["other_seeds"] * len(s["splits"])


def spread(record, method: str) -> dict[str, dict[str, float]]:
    """Rate -> by how many points a mean varies, as standard deviations, with each of `PARTS`.

    Bases: of their means. Trainings: within a base, pooled. Concepts: within a base, had other classes or objects been
    taken. Images: of one training's mean, had each concept's images been drawn anew.
    """
    values, found = [measured_rates(record, base, method) for base in record.data["bases"]], {}
    for rate in RATES:
        means, count = [own[rate].mean(1) for own in values], images_of(record, rate)
        shares = np.concatenate([own[rate] for own in values]) / 100
        noise = np.sqrt((shares * (1 - shares) / (count - 1)).mean() / shares.shape[1])
        between = np.sqrt(np.mean([own[rate].mean(0).var(ddof=1) for own in values]) / shares.shape[1])
        found[rate] = {
            "concepts": float(between),
            "trainings": float(np.sqrt(np.mean([m.var(ddof=1) for m in means]))) if len(means[0]) > 1 else np.nan,
            "bases": float(np.std([m.mean() for m in means], ddof=1)) if len(means) > 1 else np.nan,
            "images": 100 * float(noise),
        }
    return found


def figures(record) -> dict:
    """A panel for each rate: every method on each base, a dot for each training, and the mean with its 95 % interval."""
    from ..evaluation.intervals import bootstrap
    from .kit import plots

    methods, bases = ranking(record), list(record.data["bases"])
    figure, axes = plots.panels(len(RATES), columns=2, height=0.42 * len(methods) + 1.2, sharex=False)
    for ax, (rate, title) in zip(axes, RATES.items()):
        for (n, method), base in product(enumerate(methods), bases):
            rates, look = measured_rates(record, base, method)[rate], plots.style(method)
            y, mean = n + 0.2 * (2 * bases.index(base) - 1), rates.mean()
            low, high = bootstrap([rates], images_of(record, rate))
            face = {"mfc": "white"} if bases.index(base) else {}
            ax.plot(rates.mean(1), [y] * len(rates), "|", ms=9, color=look["color"], alpha=0.6)
            ax.errorbar(mean, y, xerr=[[max(0, mean - low)], [max(0, high - mean)]], ms=6, lw=1, **look | face)
        plots.method_rows(ax, methods)
        ax.set(xlabel=f"{title}, %")
        ax.set_xlim(right=100.5)
    handles = [
        plots.plt.Line2D([], [], lw=1, marker="o", ms=6, color="black", mfc=face, label=f"{base} base, 95 % interval")
        for base, face in zip(bases, ("black", "white"))
    ]
    handles.append(plots.plt.Line2D([], [], lw=0, marker="|", ms=9, color="black", label="one training"))
    figure.legend(handles=handles, ncols=3, loc="outside upper center")
    return {"objects_second_base": figure}


def table(record) -> pd.DataFrame:
    """Each method's rates on each base, with 95 % intervals, and how much they vary with each of `PARTS`.

    What is kept is also compared with `REFERENCE`, by `stronger.difference` of the means over the trainings.
    """
    from ..evaluation.intervals import bootstrap

    rows, bases = {}, list(record.data["bases"])
    on = f": {' / '.join(bases)} base"
    means, more = {base: mean_training(record, base) for base in bases}, f"of these, more than {REFERENCE}, paired{on}"
    for method in ranking(record):
        row = rows[method] = {}
        for rate, title in RATES.items():
            own = [measured_rates(record, base, method)[rate] for base in bases]
            found = [(rates.mean(), *bootstrap([rates], images_of(record, rate))) for rates in own]
            row[title + on] = " / ".join("{:.1f} ({:.0f} to {:.0f})".format(*each) for each in found)
        if REFERENCE in record.settings["methods"]:
            found = [difference(means[base], method, REFERENCE) for base in bases if method != REFERENCE]
            row[more] = " / ".join("{:+.1f} ({:+.1f} to {:+.1f})".format(*each) for each in found)
        for rate, varies in spread(record, method).items():
            deviations = ("–" if np.isnan(varies[part]) else f"{varies[part]:.1f}" for part in PARTS)
            row[f"SD of {'ESR-1' if rate == 'ESR-1' else 'kept'}: {' / '.join(PARTS)}"] = " / ".join(deviations)
    splits = " and ".join(record.settings["splits"])
    return pd.DataFrame(rows).T.rename_axis(f"%, {splits}, {record.data['training_seeds']} trainings")
