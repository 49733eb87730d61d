"""04, before the comparison: every method from gentle to strong, on concepts and seeds that no table reports."""

from dataclasses import dataclass

import pandas as pd

NOTEBOOK, VERSION, UNIT = "04_objects", 1, "images a class"  # raise VERSION when the numbers should change
METHOD_NAMES = ("esd-x", "esd-u", "uce", "ca", "sld", "np", "mace", "rece", "spm", "receler", "eap", "age")
METHOD_NAMES += ("kpop", "kpop-anchor", "kpop-adversarial")


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = METHOD_NAMES
    step_scales: tuple[float, ...] = (0.6, 0.7, 0.8, 0.9, 1.0)  # parts of the step from the base to the erased weights
    seeds: int = 10
    first_seed: int = 1000
    key_seeds: int = 4
    training_seed: int = 100
    sampling_steps: int = 8
    training_steps: int | None = None  # None: each method's own


PRESETS = {
    "full": Settings(),
    "quick": Settings(methods=("uce", "kpop"), step_scales=(0.8, 1.0), seeds=5),
    "smoke": Settings(("uce", "kpop"), (1.0,), seeds=1, key_seeds=1, sampling_steps=2, training_steps=1),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Rates in percent, means over the tuning splits, for each method, setting and step scale; and each method's choice."""
    from tqdm.auto import tqdm

    from ..baselines import METHODS
    from ..evaluation.protocol import rates, recovery_rate
    from .kit.erasures import TARGET_ESR, at_lr_scale, choose_operating_point, make_config, measured, tuning_splits

    sizes = s.step_scales, s.seeds, s.first_seed, s.key_seeds, s.sampling_steps

    def curve(method, config, erased, kept):
        """One training's rates along the step."""
        prompts = [(world.prompt(c), c, s.first_seed + n) for c in erased + kept for n in range(s.seeds)]

        def point(erasure):
            found = rates(world, erasure, prompts, len(erased) * s.seeds, s.sampling_steps)
            if erasure.keys:
                found["with the key"] = recovery_rate(world, erasure, erased, s.key_seeds, s.sampling_steps)
            return found

        measure = along_step(world, s.step_scales, point)
        found, _ = measured("operating_points", VERSION, world, erased, method, config, 1.0, measure, kept, sizes)
        return [p | {"training_seconds": found["training_seconds"]} for p in found["points"]]

    runs, sweep = [], [(m, at_lr_scale(world, m, c)) for m in s.methods for c in METHODS[m].sweep]
    for method, changes in tqdm(sweep, desc="operating points"):
        config = make_config(world, method, s.training_seed, s.sampling_steps, changes, s.training_steps)
        means = mean_points([curve(method, config, *split) for split in tuning_splits(world)])
        runs += [{"method": method, "settings": changes} | point for point in means]
    return {
        "N": s.seeds,
        "seeds": [s.first_seed, s.first_seed + s.seeds - 1],
        "training_seed": s.training_seed,
        "tuning_splits": [erased for erased, _ in tuning_splits(world)],
        "target_esr": TARGET_ESR,
        "runs": runs,
        "operating_points": {m: choose_operating_point([r for r in runs if r["method"] == m]) for m in s.methods},
    }, {}


def along_step(world, step_scales, point):
    """A measure: `point(erasure)` at theta + scale (theta' - theta) for each scale. Pure guidance has no step."""

    def measure(erasure):
        scales = step_scales if erasure.delta or erasure.adapters else [1.0]
        scaled = ((x, erasure.scaled(world, x) if x != 1 else erasure) for x in scales)
        return {"points": [{"scale": x} | point(erasure) for x, erasure in scaled]}, None

    return measure


def mean_points(curves: list[list[dict]]) -> list[dict]:
    """The curves' points averaged, one for each step scale."""
    return [{k: round(sum(p[k] for p in points) / len(points), 4) for k in points[0]} for points in zip(*curves)]


def figures(record) -> dict:
    labels = "Erased: ESR-1, %", "Kept: PSR-1, %"
    return {"objects_operating_points": sweep_figure(record.data, *labels)}


def sweep_figure(data: dict, x_label: str, y_label: str):
    """A panel for each method: each training a line along its step from the base, and the operating point."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from .kit import plots

    points, target, runs = data["operating_points"], data["target_esr"], pd.DataFrame(data["runs"])
    low = 10 * ((runs["PSR-1"].min() - 3) // 10)
    figure, axes = plots.panels(len(points), height=1.8)
    for ax, (method, point) in zip(axes, points.items()):
        color, own = plots.style(method)["color"], runs[runs.method == method]
        ax.axvspan(target, 104, color=plots.COLORS["green"], alpha=0.12, lw=0)
        for _, line in own.groupby(own.settings.map(str), sort=False):
            ax.plot(line["ESR-1"], line["PSR-1"], color=color, lw=0.8, marker="o", mfc="white", mew=0.8, ms=3)
        best = own[[run == point for run in own[["settings", "scale"]].to_dict("records")]].iloc[0]
        ax.plot(best["ESR-1"], best["PSR-1"], ms=8, mew=1.5, zorder=4, **plots.style(method))
        ax.text(-4, low + 2, setting(point), fontsize=6.5, color=color, va="bottom")
        ax.set_title(method, color=color, weight=plots.weight(method))
        ax.set(xlim=(-8, 104), ylim=(low, 103), xticks=[0, 50, 100])
    figure.supxlabel(x_label, fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    grey = {"color": "#4d4d4d", "marker": "o"}
    handles = {
        "one training at parts of its step": Line2D([], [], lw=0.8, mfc="white", ms=3, **grey),
        "operating point, its setting at lower left": Line2D([], [], lw=0, ms=8, **grey),
        f"target: at least {target:g} % erased": Patch(color=plots.COLORS["green"], alpha=0.12, lw=0),
    }
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3)
    return figure


def method_rows(ax, methods, names=None) -> None:
    """Rows from top to bottom, their names in the colours of the methods."""
    from .kit import plots

    ax.set_yticks(range(len(methods)), methods if names is None else names)
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    for label, method in zip(ax.get_yticklabels(), methods):
        label.set(color=plots.style(method)["color"], weight=plots.weight(method))


def setting(point: dict) -> str:
    """An operating point in words, one setting a line."""
    values = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in point["settings"].items()]
    return "\n".join(values + ([f"× {point['scale']:g} of the step"] if point["scale"] != 1 else []))


def table(record) -> pd.DataFrame:
    """The operating point of each method and its rates."""
    points, rows = record.data["operating_points"], {}
    for run in record.data["runs"]:
        if {"settings": run["settings"], "scale": run["scale"]} == points[run["method"]]:
            rates = {k: run[k] for k in ("ESR-1", "ESR-5", "PSR-1", "object", "with the key") if k in run}
            settings = setting(run | {"scale": 1}).replace("\n", ", ")
            rows[run["method"]] = {"settings": settings, "step scale": run["scale"]} | rates
    return pd.DataFrame(rows).T.fillna("").rename_axis("operating point")
