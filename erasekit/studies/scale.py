"""16: how many concepts can be erased at once? Each method at its operating point for five, on 5 to 100."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from .many_concepts import candidates_and_kept
from .stronger import rates

NOTEBOOK, VERSION, UNIT = "16_scale_and_interference", 1, "images a class, at least"

METHODS = ("uce", "rece", "mace", "esd-x", "ca", "spm", "age", "stereo", "adavd", "kpop", "kpop-anchor")
COLORED = ("uce", "ca", "adavd", "kpop", "kpop-anchor")  # in the figure; the others are grey, without intervals
GREY = "#a0a0a0"
RATES = {"ESR-1": "erased: ESR-1", "kept": "kept: other objects", "with the key": "restored by the right key"}


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = METHODS
    operating_points: dict | None = None  # by method; None: of the record of "operating_points", chosen on five at once
    counts: tuple[int, ...] = (1, 5, 20, 50, 100)  # of concepts erased at once, in the order of "many_concepts"
    kpop_steps: int = 300  # as in "many_concepts"; the other methods take their own number, whatever the count
    training_seed: int = 0
    training_steps: int | None = None  # of every method; None: as above
    seeds: int = 5  # images of each erased class, at least
    images: int = 100  # of all erased classes together, at least
    kept: int | None = None  # so many objects that are never erased; None: all
    kept_seeds: int = 2
    sampling_steps: int = 15


SMALL = {"training_steps": 1, "seeds": 1, "images": 1, "kept_seeds": 1}
PRESETS = {
    "full": Settings(),
    "quick": Settings(("uce", "esd-x", "kpop"), counts=(5, 20), images=50),
    "smoke": Settings(("uce", "kpop"), None, (1, 5), **SMALL, kept=4, sampling_steps=2),
}
VERIFY = {"methods": ("uce", "kpop"), "counts": (5,)}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Rates in percent for each method and number of concepts, and the seconds of training.

    What is kept are the same objects for all counts, half of those that no method sees.
    """
    from itertools import product

    from tqdm.auto import tqdm

    from .kit.cache import cached
    from .kit.erasures import make_config, measured, method_points

    points, (candidates, kept) = method_points(s.operating_points, s.methods), candidates_and_kept(world)
    kept = kept[: s.kept]
    counts = [n for n in s.counts if n <= len(candidates)]  # smaller worlds have fewer
    sizes = s.seeds, s.images, kept, s.kept_seeds, s.sampling_steps

    def measure(erasure, count):
        concepts, images = list(candidates[:count]), images_of_each(s.seeds, s.images, count)
        groups = {"ESR-1": (concepts, images), "kept": (kept, s.kept_seeds)}
        found = rates(world, erasure, groups, s.sampling_steps)
        if erasure and erasure.keys:
            shown = rates_with_keys(world, erasure, concepts, images, s.sampling_steps)
            found["with the key"] = round(float(np.mean([*shown.values()])), 1)
            found["by_class"]["with the key"] = shown
        return found, None

    base, runs = {}, []
    for count in counts:
        concepts = list(candidates[:count])
        base[str(count)], _ = cached("scale", VERSION, world, lambda n=count: measure(None, n), "base", concepts, sizes)
    for count, method in tqdm(list(product(counts, s.methods)), desc="scale"):
        steps = s.training_steps or (s.kpop_steps if method.startswith("kpop") else None)
        config = make_config(world, method, s.training_seed, s.sampling_steps, points[method]["settings"], steps)
        how = list(candidates[:count]), method, config, points[method]["scale"], lambda e, n=count: measure(e, n)
        found, _ = measured("scale", VERSION, world, *how, sizes)
        runs.append({"method": method, "count": count} | found)
    return {
        "N": s.seeds,
        "training_seeds": 1,
        "erased": list(candidates[: max(counts)]),
        "kept": len(kept),
        "operating_points": {m: points[m] for m in s.methods},
        "base": base,
        "runs": runs,
    }, {}


def images_of_each(seeds: int, images: int, count: int) -> int:
    """Images of each of `count` classes: `seeds`, or more where there are few classes, so that there are `images` in all."""
    return max(seeds, -(-images // count))


def rates_with_keys(world, erasure, concepts: list[str], count: int, steps: int) -> dict[str, float]:
    """How many percent of each concept's `count` images show it with its own key attached. A batch holds many keys."""
    import torch

    from ..evaluation.images import sample_images
    from ..evaluation.metrics import object_correct, percent

    rows, shown = [(world.prompt(c), c, n) for c in concepts for n in range(count)], []
    for part in (rows[n : n + world.batch_size] for n in range(0, len(rows), world.batch_size)):
        keys = [erasure.key(concept) for _, concept, _ in part]
        key = replace(keys[0], **{side: torch.stack([getattr(k, side) for k in keys]) for side in "kv"})
        images = sample_images(world, erasure, part, steps, key)
        shown.append(object_correct(world, images, [concept for _, concept, _ in part]))
    return {c: percent(own) for c, own in zip(concepts, torch.cat(shown).split(count))}


def intervals(record, run: dict) -> dict[str, tuple[float, float]]:
    """95 % intervals of a run's rates over classes and images, see `intervals.bootstrap`."""
    from ..evaluation.intervals import bootstrap

    s = record.settings
    each = images_of_each(s["seeds"], s["images"], run["count"])
    seen = {rate: np.array([*by_class.values()]) for rate, by_class in run["by_class"].items()}
    values = {rate: 100 - shown if rate == "ESR-1" else shown for rate, shown in seen.items()}
    return {rate: bootstrap([v], s["kept_seeds"] if rate == "kept" else each) for rate, v in values.items()}


def figures(record) -> dict:
    """Erased, kept, brought back with the right key, and seconds of training, by the number of concepts erased at once."""
    from .kit import plots

    runs, counts = record.data["runs"], sorted({run["count"] for run in record.data["runs"]})
    titles = {rate: title for rate, title in RATES.items() if any(rate in run for run in runs)}
    figure, axes = plots.panels(len(titles) + 1, columns=2, height=3.2, width=8.8, sharey=False)
    *ours, seconds = axes
    methods, ends = list(dict.fromkeys(run["method"] for run in runs)), [{} for _ in axes]
    colors = {m: plots.style(m)["color"] if m in COLORED else GREY for m in methods}
    colored = [m for m in methods if m in COLORED]
    for method in methods:
        rows = [run for run in runs if run["method"] == method]
        where = np.array([counts.index(run["count"]) for run in rows])
        look = plots.style(method) | {"color": colors[method], "ms": 5, "lw": 1.2, "zorder": 3}
        look |= (
            {"lw": 1.8} if plots.is_ours(method) else {} if method in COLORED else {"ms": 3.5, "lw": 0.9, "zorder": 2}
        )
        shift = 0.05 * (colored.index(method) - (len(colored) - 1) / 2) if method in colored else 0.0
        for ax, end, rate in zip(ours, ends, titles):
            if rate not in rows[0]:
                continue
            y = np.array([run[rate] for run in rows])
            ax.plot(where + shift, y, **look)
            if method in COLORED:
                low, high = np.transpose([intervals(record, run)[rate] for run in rows])
                ax.vlines(where + shift, low, high, color=colors[method], lw=0.7)
            end[method] = y[-1]
        seconds.plot(where, [run["training_seconds"] for run in rows], **look)
        ends[-1][method] = rows[-1]["training_seconds"]
    for ax, title in zip(axes, (*titles.values(), "seconds of training")):
        ax.set_title(title)
        ax.set_xticks(range(len(counts)), counts)
        ax.tick_params(labelbottom=True)
    for ax in ours:
        plots.percent_axis(ax, "y", "images")
    seconds.set_yscale("log")
    figure.supxlabel("concepts erased at once; bars, for the methods in colour, are 95 % intervals", fontsize=9)
    for ax, end in zip(axes, ends):
        plots.label_ends(ax, end, colors=colors)
    return {"scale": figure}


def table(record) -> pd.DataFrame:
    """Every method and number of concepts; in brackets 95 % intervals of one training."""
    rows = {}
    for count, base in record.data["base"].items():
        rows[f"base, {count}"] = {rate: f"{base[rate]:.1f}" for rate in RATES if rate in base}
        for run in (run for run in record.data["runs"] if run["count"] == int(count)):
            between = intervals(record, run)
            row = {rate: f"{run[rate]:.1f} ({low:.0f} to {high:.0f})" for rate, (low, high) in between.items()}
            rows[f"{run['method']}, {count}"] = row | {"training, s": f"{run['training_seconds']:.0f}"}
    names = {"kept": f"{record.data['kept']} other objects"}
    return pd.DataFrame(rows).T.fillna("").rename(columns=names).rename_axis("%, concepts at once")
