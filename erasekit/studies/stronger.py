"""04: who keeps more when all erase as much? Every method along its step, on the reported concepts; chooses nothing."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .kit.erasures import TARGET_ESR
from .operating_points import PUBLIC, along_step

NOTEBOOK, VERSION, UNIT = "04_objects", 2, "images an erased class"  # raise VERSION when the numbers should change
RATES = ("ESR-1", "PSR-1", "others")
LINES = ("esd-x", "uce", "ca", "spm", "adavd", "kpop", "kpop-anchor")  # whose lines the figure shows
REFERENCE = "kpop"  # the paper's method, which the table compares the others with


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = PUBLIC  # pure guidance has no step
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

    from .kit.erasures import method_points

    points, base, runs = method_points(s.operating_points, s.methods), {}, []
    for split, method in tqdm([(split, m) for split in s.splits for m in (None, *s.methods)], desc="stronger"):
        if method is None:
            base[split] = untrained(world, s, split)
            continue
        line = rates_along_step(world, s, split, method, points[method], s.training_seed)
        about = {"method": method, "split": split}
        runs += [about | {"factor": f} | point for f, point in zip(s.factors, line)]
    return {
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "training_seeds": 1,
        "erased": {split: list(world.split(split)) for split in s.splits},
        "operating_points": {m: points[m] for m in s.methods},
        "base": base,
        "runs": runs,
    }, {}


def groups_of(world, s, split: str) -> dict:
    """Rate -> the concepts that it is of, and the images of each."""
    erased = world.split(split)
    return {
        "ESR-1": (erased, s.seeds),
        "PSR-1": ([c for c in world.concepts("classes") if c not in erased], s.kept_seeds),
        "others": (world.unseen_classes("classes"), s.other_seeds),
    }


def untrained(world, s, split: str) -> dict:
    """The base's rates."""
    from .kit.cache import cached

    parts = "base", world.split(split), (s.seeds, s.kept_seeds, s.other_seeds, s.sampling_steps)

    def measure():
        return rates(world, None, groups_of(world, s, split), s.sampling_steps), None

    return cached("stronger", VERSION, world, measure, *parts)[0]


def rates_along_step(world, s, split: str, method: str, point: dict, seed: int) -> list[dict]:
    """The rates of one training at each of `s.factors` of its operating point's step."""
    from .kit.erasures import make_config, measured

    groups, scale = groups_of(world, s, split), point["scale"]
    config = make_config(world, method, seed, s.sampling_steps, point["settings"], s.training_steps)
    scales = [round(scale * factor, 4) for factor in s.factors]
    line = along_step(world, scales, lambda erasure: rates(world, erasure, groups, s.sampling_steps))
    sizes = s.factors, s.seeds, s.kept_seeds, s.other_seeds, s.sampling_steps
    found, _ = measured("stronger", VERSION, world, world.split(split), method, config, 1.0, line, scale, sizes)
    return found["points"]


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


def by_class(record, method: str) -> list[dict[str, np.ndarray]]:
    """For each factor, the rates of all splits' classes: ESR-1 of the erased, PSR-1 and "others" of the kept."""
    runs = [run for run in record.data["runs"] if run["method"] == method]
    points = []
    for factor in record.settings["factors"]:
        own = [run["by_class"] for run in runs if run["factor"] == factor]
        rates = {name: np.array([rate for each in own for rate in each[name].values()]) for name in RATES}
        points.append(rates | {"ESR-1": 100 - rates["ESR-1"]})
    return points


def equal_erasure(record, method: str, target: float = TARGET_ESR) -> tuple[float, dict[str, np.ndarray]]:
    """The part of the step at which a method first erases `target` percent, and each class's rates there, interpolated.

    One that erases more at the gentlest factor is taken there, one that never does at the strongest.
    """
    factors, points = record.settings["factors"], by_class(record, method)
    erased = [point["ESR-1"].mean() for point in points]
    after = next((n for n, rate in enumerate(erased) if rate >= target), len(erased) - 1)
    if after == 0 or erased[after] < target:
        return factors[after], points[after]
    part = (target - erased[after - 1]) / (erased[after] - erased[after - 1])
    between = {name: points[after - 1][name] * (1 - part) + points[after][name] * part for name in RATES}
    return factors[after - 1] * (1 - part) + factors[after] * part, between


def intervals(record, rates: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """95 % intervals of one training's rates over classes and images, see `intervals.bootstrap`."""
    from ..evaluation.intervals import bootstrap

    s = record.settings
    images = {"ESR-1": s["seeds"], "PSR-1": s["kept_seeds"], "others": s["other_seeds"]}
    return {name: bootstrap([rates[name]], images[name]) for name in RATES}


def difference(record, method: str, other: str) -> tuple[float, float, float]:
    """How much more of the other objects `method` keeps than `other` where both erase `TARGET_ESR` percent: mean, 95 % interval.

    Paired: each draw takes erased classes and kept objects with replacement, the same ones for both methods, and finds anew
    where each method first erases enough. Two methods fail on much the same objects, so that this tells apart more than two
    intervals side by side. Images of an object are not drawn apart, and there is one training.
    """
    from ..evaluation.intervals import DRAWS

    generator = np.random.default_rng(0)
    first, second = by_class(record, method), by_class(record, other)
    splits = len(record.settings["splits"])  # the other objects are the same in all of them
    classes, objects = len(first[0]["ESR-1"]), len(first[0]["others"]) // splits

    def weights(count):
        """Before the draws, all with equal weight."""
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=DRAWS)
        return np.vstack([np.ones(count), drawn]) / count

    of_class, of_object = weights(classes), weights(objects)
    kept = [
        _kept_at_target(
            np.array([of_class @ point["ESR-1"] for point in points]),
            np.array([of_object @ point["others"].reshape(splits, objects).mean(0) for point in points]),
        )
        for points in (first, second)
    ]
    mean, *draws = kept[0] - kept[1]
    return float(mean), *map(float, np.quantile(draws, (0.025, 0.975)))


def _kept_at_target(erased: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Of rates (factors, draws), what is kept where a draw first erases `TARGET_ESR` percent, as in `equal_erasure`."""
    reached, draws = erased >= TARGET_ESR - 1e-9, np.arange(erased.shape[1])
    after = np.where(reached.any(0), reached.argmax(0), len(erased) - 1)
    before = np.maximum(after - 1, 0)
    low, high = erased[before, draws], erased[after, draws]
    between = reached.any(0) & (after > 0)
    part = np.where(between, (TARGET_ESR - low) / np.where(between, high - low, 1), 1)
    return kept[before, draws] * (1 - part) + kept[after, draws] * part


def ranking(record) -> list[str]:
    """The methods: first those that erase `TARGET_ESR` percent at some part of their step, by what they then keep of others."""
    ends = {m: equal_erasure(record, m)[1] for m in record.settings["methods"]}
    kept = {m: (round(rates["ESR-1"].mean(), 6) >= TARGET_ESR, rates["others"].mean()) for m, rates in ends.items()}
    return sorted(kept, key=kept.get, reverse=True)


def figures(record) -> dict:
    """What each method keeps where all erase as much, and the lines of some of them along their step."""
    import matplotlib.pyplot as plt

    from .kit import plots

    methods = ranking(record)
    size = {"figsize": (9.4, 0.24 * len(methods) + 1.9), "width_ratios": [1.15, 1]}
    figure, (left, right) = plt.subplots(1, 2, layout="constrained", **size)
    looks = {"others": {"marker": "o", "color": "black"}, "PSR-1": {"marker": "s", "mfc": "white", "color": "#777777"}}
    labels = {"others": "other objects", "PSR-1": "the split's other classes, PSR-1"}
    low, short = 100.0, {}
    for n, method in enumerate(methods):
        _, rates = equal_erasure(record, method)
        if round(rates["ESR-1"].mean(), 6) < TARGET_ESR:
            short[n] = rates["ESR-1"].mean()
            continue
        between = intervals(record, rates)
        for shift, name in ((0.14, "others"), (-0.14, "PSR-1")):
            mean, (start, end) = rates[name].mean(), between[name]
            sides = [[max(0, mean - start)], [max(0, end - mean)]]
            left.errorbar(mean, shift - n, xerr=sides, ms=5, lw=1, **looks[name])
            low = min(low, start)
    for n, most in short.items():
        left.text(low, -n, f"erases {most:.0f} % at most", va="center", fontsize=7.5, color="#777777")
    left.set(ylim=(0.6 - len(methods), 0.6), xlim=(low - 1, 100.5), xlabel=f"kept where {TARGET_ESR:g} % are erased, %")
    left.set_yticks([-n for n in range(len(methods))], methods)
    for label in left.get_yticklabels():  # in colour: the methods whose lines are on the right
        name = label.get_text()
        label.set(color=plots.style(name)["color"] if name in LINES else "#4d4d4d", weight=plots.weight(name))
    handles = [plt.Line2D([], [], lw=0, ms=5, label=labels[name], **look) for name, look in looks.items()]
    left.legend(handles=handles, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    for method in [m for m in LINES if m in methods]:
        points = by_class(record, method)
        x, y = ([point[name].mean() for point in points] for name in ("ESR-1", "others"))
        right.plot(x, y, lw=1.4, ms=5, label=method, **plots.style(method))
    right.axvline(TARGET_ESR, color="#bbbbbb", lw=1, ls=":", zorder=0)
    right.set(xlabel="erased, ESR-1, %", ylabel="kept: other objects, %")
    right.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return {"objects_stronger": figure}


def table(record) -> pd.DataFrame:
    """Every method where it erases `TARGET_ESR` percent, best first; in brackets 95 % intervals of one training a split.

    What it keeps of other objects is also compared with `REFERENCE`, by the paired `difference`.
    """
    base = record.data["base"].values()
    rows = {"base": {name: f"{np.mean([each[name] for each in base]):.1f}" for name in RATES}}
    more = f"of these, more than {REFERENCE}, paired"
    for method in ranking(record):
        factor, rates = equal_erasure(record, method)
        between = intervals(record, rates)
        row = {name: f"{rates[name].mean():.1f} ({between[name][0]:.0f} to {between[name][1]:.0f})" for name in RATES}
        at_one = by_class(record, method)[record.settings["factors"].index(1.0)]["ESR-1"].mean()
        enough = round(rates["ESR-1"].mean(), 6) >= TARGET_ESR
        if enough and method != REFERENCE and REFERENCE in record.settings["methods"]:
            row |= {more: "{:+.1f} ({:+.1f} to {:+.1f})".format(*difference(record, method, REFERENCE))}
        rows[method] = row | {"times its step": f"{factor:.2f}", "ESR-1 at its own step": f"{at_one:.1f}"}
    splits = " and ".join(record.settings["splits"])
    others = f"{len(next(iter(base))['by_class']['others'])} other objects"
    frame = pd.DataFrame(rows).T.fillna("").rename(columns={"others": others})
    return frame.rename_axis(f"%, {splits}, all erasing {TARGET_ESR:g} %")
