"""04, before the comparison: every method from gentle to strong, on concepts and seeds that no table reports."""

from dataclasses import dataclass

import pandas as pd

NOTEBOOK, VERSION, UNIT = "04_objects", 1, "images a class"  # raise VERSION when the numbers should change
METHOD_NAMES = ("esd-x", "esd-u", "uce", "ca", "sld", "np", "mace", "rece", "spm", "receler", "eap", "age")
METHOD_NAMES += ("speed", "oce", "adavd", "ace", "ant", "stereo", "race", "kpop", "kpop-anchor", "kpop-adversarial")
PUBLIC = tuple(m for m in METHOD_NAMES if m not in ("sld", "np"))  # pure guidance leaves the public weights as they are
STEP_SCALES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)  # parts of the step from the base to the erased weights


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = METHOD_NAMES
    step_scales: tuple[float, ...] = STEP_SCALES
    tunings: int = 1  # of two: one half of the tuning concepts is erased and the other kept, then the other way round
    extensions: int = 2  # further settings, at most, while the one that is taken is the edge of its grid
    seeds: int = 10  # of each concept; a setting is chosen over ten concepts
    first_seed: int = 1000
    key_seeds: int = 4
    training_seed: int = 100
    sampling_steps: int = 15
    training_steps: int | None = None  # None: each method's own


PRESETS = {
    "full": Settings(),
    "quick": Settings(methods=("uce", "kpop"), step_scales=(0.6, 0.8, 1.0), extensions=1, seeds=5),
    "smoke": Settings(("uce", "kpop"), (1.0,), extensions=0, seeds=1, key_seeds=1, sampling_steps=2, training_steps=1),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Rates in percent, means over the tuning splits, for each method, setting and step scale; and each method's choice."""
    from tqdm.auto import tqdm

    from ..baselines import METHODS
    from .kit import erasures
    from .kit.erasures import choose_operating_point, tuning_splits

    def line(method, changes):
        """The means of both splits' rates, at one setting."""
        means = mean_points([curve(world, s, method, changes, *split) for split in tuning_splits(world)[: s.tunings]])
        return [{"method": method, "settings": changes} | point for point in means]

    runs, points = [], {}
    for method in tqdm(s.methods, desc="operating points"):
        sweep = [erasures.at_lr_scale(world, method, changes) for changes in METHODS[method].sweep]
        own = [point for changes in sweep for point in line(method, changes)]
        for _ in range(s.extensions):
            if (further := erasures.beyond_edge(sweep, choose_operating_point(own)["settings"])) is None:
                break
            sweep.append(further)
            own += line(method, further)
        runs, points = runs + own, points | {method: choose_operating_point(own)}
    return {
        "N": s.seeds,
        "seeds": [s.first_seed, s.first_seed + s.seeds - 1],
        "training_seed": s.training_seed,
        "tuning_splits": [erased for erased, _ in tuning_splits(world)[: s.tunings]],
        "target_esr": erasures.TARGET_ESR,
        "runs": runs,
        "operating_points": points,
    }, {}


def curve(world, s: Settings, method: str, changes: dict, erased: tuple, kept: tuple) -> list[dict]:
    """One training's rates along its step from the base."""
    from ..evaluation.protocol import rates, recovery_rate
    from .kit.erasures import make_config, measured

    config = make_config(world, method, s.training_seed, s.sampling_steps, changes, s.training_steps)
    prompts = [(world.prompt(c), c, s.first_seed + n) for c in erased + kept for n in range(s.seeds)]

    def point(erasure):
        found = rates(world, erasure, prompts, len(erased) * s.seeds, s.sampling_steps)
        if erasure.keys:
            found["with the key"] = recovery_rate(world, erasure, erased, s.key_seeds, s.sampling_steps)
        return found

    measure = along_step(world, s.step_scales, point)
    sizes = s.step_scales, s.seeds, s.first_seed, s.key_seeds, s.sampling_steps
    found, _ = measured("operating_points", VERSION, world, erased, method, config, 1.0, measure, kept, sizes)
    return [p | {"training_seconds": found["training_seconds"]} for p in found["points"]]


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

    points, target, runs = rated_points(data), data["target_esr"], pd.DataFrame(data["runs"])
    low = 10 * ((runs["PSR-1"].min() - 3) // 10)
    figure, axes = plots.panels(len(points), height=1.8)
    for ax, (method, point) in zip(axes, points.items()):
        color, own = plots.style(method)["color"], runs[runs.method == method]
        ax.axvspan(target, 104, color=plots.COLORS["green"], alpha=0.12, lw=0)
        for _, line in own.groupby(own.settings.map(str), sort=False):
            ax.plot(line["ESR-1"], line["PSR-1"], color=color, lw=0.8, marker="o", mfc="white", mew=0.8, ms=3)
        ax.plot(point["ESR-1"], point["PSR-1"], ms=8, mew=1.5, zorder=4, **plots.style(method))
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


def setting(point: dict) -> str:
    """An operating point in words, one setting a line."""
    values = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in point["settings"].items()]
    return "\n".join(values + ([f"× {point['scale']:.2f} of the step"] if point["scale"] != 1 else []))


def rated_points(data: dict) -> dict[str, dict]:
    """Method -> operating point with its rates; a point that is one of the runs, not between two, may be stored without."""
    runs = {(run["method"], str(run["settings"]), run["scale"]): run for run in data["runs"]}
    points = data["operating_points"].items()
    return {m: p if "ESR-1" in p else runs[m, str(p["settings"]), p["scale"]] | p for m, p in points}


def table(record) -> pd.DataFrame:
    """The operating point of each method and its rates, interpolated along the step."""
    rows = {}
    for method, point in rated_points(record.data).items():
        rates = {k: f"{point[k]:.1f}" for k in ("ESR-1", "ESR-5", "PSR-1", "object", "with the key") if k in point}
        settings = setting(point | {"scale": 1}).replace("\n", ", ")
        rows[method] = {"settings": settings, "step scale": f"{point['scale']:.2f}"} | rates
    return pd.DataFrame(rows).T.fillna("").rename_axis("operating point")
