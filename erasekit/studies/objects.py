"""04: the paper's object splits, every method on the same images, seeds and sampler."""

import textwrap
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from .object_rates import intervals, num_erased, num_others, on, run_frame, split_mean, untrained_frame
from .operating_points import METHOD_NAMES

NOTEBOOK, VERSION, UNIT = "04_objects", 2, "images a class"  # raise VERSION when the numbers should change
ROWS = "methods"  # the setting that erasures given to `run` are added to
NAMED = ("esd-x", "ca", "age", "adavd", "kpop", "kpop-anchor")  # in the figure of the frontier; the others are grey
GRID = ("esd-x", "uce", "ca", "spm", "age", "adavd", "kpop", "kpop-anchor")  # in the grid, below base and oracle
SLOW = ("stereo", "race")  # half an hour a training on two cores: their second retain option is left out


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = METHOD_NAMES
    operating_points: dict | None = None  # method -> {"settings", "scale"}; None: those of the committed record
    splits: tuple[str, ...] = ("S1", "S2", "S3", "S4")  # or classes by name: "church" alone, "church, dog" at once
    training_seeds: int = 3
    retain: tuple[str, ...] = ("named", "empty")  # ten named objects, or the empty prompt
    repeated: tuple[str, ...] = ("S1",)  # splits with further training seeds and the second retain option
    seeds: int = 25
    few_seeds: int = 4  # for neighbours, other templates and synonyms
    other_seeds: int = 3  # for each of the other objects
    sampling_steps: int = 15
    training_steps: int | None = None
    trajectories: int = 4  # a prompt, whose latents the distance to the oracle is measured at
    trajectory_steps: int = 25


SMALL = {"splits": ("S1",), "training_seeds": 1, "retain": ("named",)}
TINY = {"training_steps": 1, "trajectories": 1, "trajectory_steps": 2}
PRESETS = {
    "full": Settings(),
    "quick": Settings(methods=("esd-x", "uce", "ca", "spm", "kpop", "kpop-anchor"), seeds=10, **SMALL),
    "smoke": Settings(("uce", "kpop"), seeds=1, few_seeds=1, other_seeds=1, sampling_steps=2, **TINY, **SMALL),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Rates in percent for each method and split; on `repeated` splits for each training seed and retain option.

    The same of the oracles, on the splits that have one, and how far each erasure's predicted noise is from theirs.
    """
    from tqdm.auto import tqdm

    from ..evaluation.oracle import distances
    from ..evaluation.protocol import eval_prompts, evaluate_split, recovery_rate
    from .kit.cache import cached
    from .kit.erasures import make_config, measured, method_points
    from .kit.given import erases

    erased = {split: world.split(split) for split in s.splits}
    points = method_points(s.operating_points, s.methods, erased.values(), "splits")
    oracles = {split: world.oracle(concepts) for split, concepts in erased.items()}
    sizes = s.seeds, s.few_seeds, s.other_seeds, s.sampling_steps
    pool = s.trajectories, s.trajectory_steps
    parts = {split: (*sizes, *((*pool, o.digest()) if o else ())) for split, o in oracles.items()}
    first = s.retain[0], 0, s.splits[0]

    def measure(erasure, split):
        concepts = erased[split]
        rates, strip = evaluate_split(world, erasure, concepts, *sizes)
        if erasure.keys:
            rates["with the key"] = recovery_rate(world, erasure, concepts, s.few_seeds, s.sampling_steps)
        if oracles[split]:
            kept = [c for c in world.concepts("classes") if c not in concepts]
            prompts = {"erased": [*map(world.prompt, concepts)], "kept": [*map(world.prompt, kept)]}
            found = distances(world, erasure, oracles[split], prompts, *pool)
            rates |= {f"distance {part}": distance for part, distance in found.items()}
        return rates, strip

    base, oracle, runs, images = {}, {}, [], {}
    for split, concepts in erased.items():
        where, own = ("objects", VERSION, world), (concepts, sizes)
        base[split], strip = cached(*where, lambda c=concepts: evaluate_split(world, None, c, *sizes), "base", *own)
        images.setdefault("base", strip)
        if oracles[split]:
            again = concepts, parts[split]
            oracle[split], strip = cached(*where, lambda k=split: measure(oracles[k], k), "oracle", *again)
            images |= {"oracle": strip} if split == first[2] else {}
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
        where = "objects", VERSION, world, erased[split], method, config, scale
        rates, strip = measured(*where, lambda erasure, k=split: measure(erasure, k), parts[split])
        runs.append({"method": method, "split": split, "training_seed": seed, "retain": option} | rates)
        if (option, seed, split) == first:
            images[method] = strip
    prompts = eval_prompts(world, erased[s.splits[0]], *sizes[:-1])
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
    } | ({"oracle": oracle} if oracle else {}), images


def has_setting(method: str, name: str) -> bool:
    from ..baselines import METHODS

    return name in METHODS[method].config.__dataclass_fields__


def worth_running(method: str, option: str, seed: int) -> bool:
    """Whether a further training seed (for methods that train) or the empty prompt (for methods that retain) changes anything."""
    if option == "named":
        return seed == 0 or has_setting(method, "lr")
    return seed == 0 and has_setting(method, "retain") and method not in SLOW


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


def figures(record) -> dict:
    found = {"objects_frontier": frontier_figure(record), "objects_grid": grid_figure(record)}
    return found | {"objects_replaced": replaced_figure(record)} | retain_figure(record)


def frontier_figure(record):
    """Erased against kept with the frontier: by the paper's protocol, and by what it does not ask.

    In colour with their names: `NAMED`, and erasures given to `run`. A rate never exceeds 100 %, so that no axis does.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patheffects import withStroke

    from .kit import plots

    frame = run_frame(record)
    frame = frame[frame.retain == record.settings["retain"][0]]
    by_split = frame.groupby(["method", "split"], sort=False)[["ESR-1", "PSR-1", "others", "other templates"]].mean()
    mean = by_split.groupby("method", sort=False).mean()
    between = {m: intervals(record, own) for m, own in frame.groupby("method", sort=False)}
    star, shown = {}, mean
    if "oracle" in record.data:
        oracle = untrained_frame(record, "oracle")
        name = on(record, "oracle", oracle.split)
        star, between[name] = {name: oracle[mean.columns].mean()}, intervals(record, oracle)
        shown = pd.concat([mean, pd.DataFrame(star).T])
    others = f"Kept: {num_others(record)} other objects, %"
    sides = (
        ("ESR-1", "Erased: ESR-1, %", "PSR-1", "Kept: the split's other classes, PSR-1, %"),
        ("other templates", "Erased: ESR-1 under templates not trained on, %", "others", others),
    )
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 4.8), layout="constrained")
    band = {"color": plots.COLORS["gold"], "lw": 7, "alpha": 0.25, "label": "frontier: none erases and keeps more"}
    halo = {"marker": "o", "ms": 13, "mew": 0}  # a frontier of one point is seen too
    bars = {"fmt": "none", "ecolor": "#cccccc", "elinewidth": 0.8, "label": "95 % interval"}
    for ax, (x, x_label, y, y_label) in zip(axes, sides):
        points = {m: (mean[x][m], mean[y][m]) for m in mean.index}
        near = {m: p for m, p in points.items() if p[0] >= 50} or points
        stars = {name: (means[x], means[y]) for name, means in star.items()}
        low, left = (min(p[n] for p in (near | stars).values()) - more for n, more in ((1, 4), (0, 6)))
        ax.set(xlim=(left, 100), ylim=(low, 100), xlabel=x_label, ylabel=y_label)
        named = {m: p for m, p in near.items() if m in NAMED or m not in METHOD_NAMES}
        for point in (p for m, p in near.items() if m not in named):
            ax.plot(*point, "o", ms=5, color="#b5b5b5", zorder=2)
        ax.plot(*zip(*plots.pareto_front(list(near.values()))), zorder=1, **band, **halo)
        sides_of = {r: np.abs([np.subtract(between[m][r], shown[r][m]) for m in shown.index]).T for r in (x, y)}
        ax.errorbar(shown[x], shown[y], sides_of[y], sides_of[x], zorder=0, **bars)
        plots.label_points(ax, named | stars)
        if stars:  # the last that was drawn
            ax.lines[-1].set(marker="*", ms=12, mfc="none", mec="black")
        for line in ax.lines:  # a marker at 100 % is whole
            line.set_clip_on(False)
        if far := [m for m in points if m not in near]:  # by what they erase
            names = textwrap.fill(", ".join(sorted(far, key=lambda m: -points[m][0])), 30)
            ax.annotate(f"left of here:\n{names}", (left, low), (5, 5), textcoords="offset points", color="#707070")
        for text in ax.texts:
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
            text.set(color="black") if text.get_text() in stars else None
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def grid_figure(record):
    """The same prompts and seed under base, oracle, `GRID` and given erasures, and how often the class is recognised."""
    from .kit import plots

    split = record.data["splits"][0]
    classes = list(record.data["base"][split]["by_class"])
    erased = num_erased(record, split)
    rates = {
        run["method"]: run["by_class"]
        for run in record.data["runs"]
        if (run["split"], run["training_seed"], run["retain"]) == (split, 0, record.settings["retain"][0])
    }
    rates |= {name: record.data[name][split]["by_class"] for name in ("base", "oracle") if name in record.data}
    shown = [name for name in record.images if name in GRID or name not in METHOD_NAMES]
    groups = {f"Erased ({split})": erased, "Kept": len(classes) - erased}
    rows, titles = ({name: plots.tiles(record, name) for name in shown}, [c.replace(" ", "\n", 1) for c in classes])
    figure = plots.image_grid(rows, titles, groups, size=0.72)
    [ax] = figure.axes
    for image, rate in zip(ax.images, [rates[name][c] for name in shown for c in classes]):
        _, right, bottom, _ = image.get_extent()
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
        ax.text(right - 0.04, bottom - 0.05, f"{rate:.0f}", ha="right", va="bottom", fontsize=8, bbox=box)
    note = (
        f"In the corner: of the class's {record.data['N']} images, how many percent the judge recognises as the class."
    )
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
    labels["others"] = f"Kept: {num_others(record)} other objects, %"
    for ax, (rate, label) in zip(axes, labels.items()):
        for y, m in enumerate(methods):
            line = {"color": plots.style(m)["color"]}
            ax.plot([empty[rate][m], named[rate][m]], [y, y], lw=1.2, zorder=1, **line)
            ax.plot(empty[rate][m], y, "o", ms=6, mfc="white", mew=1.2, **line)
            ax.plot(named[rate][m], y, "o", ms=6, **line)
        plots.percent_axis(ax, "x", label, (min(named.min().min(), empty.min().min()) - 5, 103))
        ax.grid(axis="y", color="#e6e6e6", lw=0.6)
        plots.method_rows(ax, methods)
    handles = [plt.Line2D([], [], color="black", marker="o", ms=6, lw=0, mfc=fill) for fill in ("white", "black")]
    names = "the empty prompt is retained", "ten named objects are retained"
    figure.legend(handles, names, loc="outside upper center", ncols=2)
    return {"objects_retain": figure}


def replaced_figure(record):
    """What the prompts of erased classes show instead, and what those of their hypernyms show."""
    import matplotlib.pyplot as plt

    from .kit import plots

    frames = {"base": untrained_frame(record, "base")}
    if "oracle" in record.data:
        frames["oracle"] = untrained_frame(record, "oracle")
    runs = run_frame(record)
    frames |= dict(iter(runs[runs.retain == record.settings["retain"][0]].groupby("method", sort=False)))
    names = [on(record, name, frame.split) for name, frame in frames.items()]
    labels = {"nothing told": "no object recognised"}  # the judge is sure of none
    shares = pd.DataFrame([split_mean(frame, "replaced") for frame in frames.values()])
    hypernyms = "hypernyms" in runs
    figure, axes = plt.subplots(
        1, 1 + hypernyms, figsize=(9.4, 0.22 * len(names) + 1.2), sharey=True, squeeze=False, layout="constrained"
    )
    ax, start = axes[0, 0], np.zeros(len(names))
    for share, color in zip(shares, (plots.COLORS["red"], plots.COLORS["blue"], "#d9d9d9")):
        ax.barh(range(len(names)), shares[share], left=start, color=color, height=0.72, label=labels.get(share, share))
        start += shares[share]
    plots.percent_axis(ax, "x", "Prompts of erased classes: images, %", (0, 100))
    if hypernyms:
        ax, start = axes[0, 1], 0
        rates = pd.DataFrame([split_mean(frame, "hypernyms") for frame in frames.values()])
        for share, fill in (("an erased class", plots.COLORS["red"]), ("a member", "white")):
            mark = {"marker": "o", "ms": 6, "mec": "black", "mew": 1.0, "lw": 0}
            label = f"{share} of the hypernym" if share == "a member" else share
            ax.plot(rates[share], range(len(names)), mfc=fill, label=label, **mark)
        plots.percent_axis(ax, "x", "Prompts of their hypernyms: images, %")
        ax.grid(axis="y", color="#e6e6e6", lw=0.6)
    for ax in axes[0]:
        plots.method_rows(ax, list(frames), names)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    return figure


def table(record) -> pd.DataFrame:
    """Means over splits, of the distances over those with an oracle; in brackets 95 % intervals, see `intervals`."""
    runs = run_frame(record)
    frames = {"base": untrained_frame(record, "base")}
    if "oracle" in record.data:
        own = untrained_frame(record, "oracle")
        frames[on(record, "oracle (never saw them)", own.split)] = own
    for (option, method), own in runs.groupby(["retain", "method"], sort=False):
        frames[method if option == "named" else f"{method}, retain “” ({', '.join(own.split.unique())})"] = own
    rates = ["ESR-1", "PSR-1", "others", "neighbours", "other templates", "synonyms seen", "synonyms unseen"]
    columns, far = [*rates, "with the key"], ["distance erased", "distance kept"]
    rows = {}
    for name, own in frames.items():
        own = own.reindex(columns=[*own.columns.union([*columns, *far, "training_seconds"], sort=False)])
        by_split = own[[*columns, *far]].astype(float).groupby(own.split).mean()
        row = {c: f"{by_split[c].mean():.1f}" for c in columns if by_split[c].notna().all()}
        for c, (low, high) in intervals(record, own).items():
            row[c] += f" ({low:.0f} to {high:.0f})" if c != "other templates" else ""
        row |= {c: f"{by_split[c].mean():.2f}" for c in far if by_split[c].notna().any()}
        seconds = own.training_seconds.dropna()  # another project's are not known
        rows[name] = row | {"training, s": f"{seconds.mean():.0f}" if len(seconds) else ""}
    frame = pd.DataFrame(rows).T.reindex(columns=[*columns, *far, "training, s"]).dropna(axis=1, how="all").fillna("")
    titles = {"others": f"{num_others(record)} other objects", "neighbours": "near neighbours"}
    titles |= {c: f"ESR-1, {c}" for c in rates[4:]}
    titles |= {c: f"{c.replace('distance', 'distance to the oracle,')} (base: 1)" for c in far}
    splits = ", ".join(record.data["splits"])
    return frame.rename(columns=titles).rename_axis(f"%, means over {splits}")
