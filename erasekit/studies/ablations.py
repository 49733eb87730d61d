"""03: what moves KPOP, and what does not? One setting changed at a time, on concepts and seeds that no table reports."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

NOTEBOOK, VERSION, UNIT = "03_prompt_length", 1, "images a class"  # raise VERSION when the numbers should change

# Row -> method, and what is changed of its operating point.
VARIANTS = {
    "kpop": ("kpop", {}),
    "transfer steps 2": ("kpop", {"transfer_steps": 2}),
    "lambda 0.3": ("kpop", {"lam": 0.3}),
    "lambda 3": ("kpop", {"lam": 3.0}),
    "m 3": ("kpop", {"m": 3}),
    "layers mid": ("kpop", {"layers": "mid"}),
    "layers mid+up": ("kpop", {"layers": "mid+up"}),
    "retain weight 3": ("kpop", {"retain_weight": 3.0}),
    "loss on x0": ("kpop", {"loss_space": "x0"}),
    "eta 2": ("kpop", {"eta": 2.0}),
    "lambda 0.3, eta 2": ("kpop", {"lam": 0.3, "eta": 2.0}),
    "keys and values": ("kpop", {"train_method": "xattn-kv"}),
    "twice the steps": ("kpop", {"steps": 300}),
    "anchor": ("kpop-anchor", {}),
    "anchor, no prompt": ("kpop-anchor", {"lam": 0.0, "transfer_steps": 0}),
    "esd-x": ("esd-x", {}),
    "esd-x, eta 2": ("esd-x", {"eta": 2.0}),
    "ca": ("ca", {}),
    "spm": ("spm", {}),
    "spm, always on": ("spm", {"transport": False}),
}


@dataclass(frozen=True)
class Settings:
    variants: tuple[str, ...] = tuple(VARIANTS)
    operating_points: dict | None = None  # method -> {"settings", "scale"}; None: those of the committed record
    step_scales: tuple[float, ...] = (0.6, 0.8, 1.0, 1.25, 1.5)  # parts of the operating point's step
    tunings: int = 1  # of the two halves of the tuning concepts, how many are erased in turn
    seeds: int = 25
    first_seed: int = 1000
    key_seeds: int = 25
    training_seed: int = 100
    sampling_steps: int = 15
    training_steps: int | None = None


PRESETS = {
    "full": Settings(),
    "quick": Settings(variants=("kpop", "anchor"), step_scales=(0.8, 1.0, 1.25), seeds=5, key_seeds=4),
    "smoke": Settings(("kpop", "spm"), step_scales=(1.0,), seeds=1, key_seeds=1, sampling_steps=2, training_steps=1),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Rates in percent along the step from the base, a curve from one training, for each variant and tuning split."""
    from tqdm.auto import tqdm

    from ..evaluation.protocol import rates, recovery_rate
    from .kit.erasures import make_config, measured, method_points, tuning_splits

    points = method_points(s.operating_points, [VARIANTS[name][0] for name in s.variants])
    sizes = s.step_scales, s.seeds, s.first_seed, s.key_seeds, s.sampling_steps
    runs = []
    for name in tqdm(s.variants, desc="ablations"):
        method, changes = VARIANTS[name]
        point = points[method]
        changes, scale = point["settings"] | changes, point["scale"]
        config = make_config(world, method, s.training_seed, s.sampling_steps, changes, s.training_steps)
        for erased, kept in tuning_splits(world)[: s.tunings]:
            prompts = [(world.prompt(c), c, s.first_seed + n) for c in erased + kept for n in range(s.seeds)]

            def measure(erasure, erased=erased, prompts=prompts):
                found = {"curve": []}
                if erasure.keys:
                    found["with the key"] = recovery_rate(world, erasure, erased, s.key_seeds, s.sampling_steps)
                for x in s.step_scales:
                    point = rates(world, erasure.scaled(world, x), prompts, len(erased) * s.seeds, s.sampling_steps)
                    found["curve"].append({"scale": x} | point)
                return found, None

            found, _ = measured("ablations", VERSION, world, erased, method, config, scale, measure, kept, sizes)
            runs.append({"variant": name, "method": method, "erased": list(erased)} | found)
    seeds = [s.first_seed, s.first_seed + s.seeds - 1]
    return {"N": s.seeds, "seeds": seeds, "training_seed": s.training_seed, "runs": runs}, {}


def curves(record) -> pd.DataFrame:
    """Each variant's rates at each step scale, means over what is erased in turn, gentlest first."""
    rows = [{"variant": run["variant"]} | point for run in record.data["runs"] for point in run["curve"]]
    return pd.DataFrame(rows).groupby(["variant", "scale"], sort=False).mean().reset_index()


def figures(record) -> dict:
    """A row for each variant: erased at the operating point's step, kept there and beyond, and recovered with the key."""
    import matplotlib.pyplot as plt

    from ..evaluation.intervals import wilson
    from .kit import plots

    values, runs = table(record).replace("", np.nan).astype(float), record.data["runs"]
    methods = {run["variant"]: run["method"] for run in runs}
    concepts = sum(len(run["erased"]) for run in runs if run["variant"] == values.index[0])
    titles = {
        "ESR-1, operating point's step": ("erased at the\noperating point's step", "ESR-1"),
        "PSR-1 at ESR-1 95": ("kept where\n95 % are erased", "PSR-1"),
        "PSR-1, largest step": ("kept at the\nlargest step", "PSR-1"),
        "with the key": ("recovered\nwith the key", "images"),
    }
    titles = {column: title for column, title in titles.items() if column in values}
    height = max(3, 0.21 * len(values) + 1.2)
    figure, axes = plt.subplots(1, len(titles), figsize=(9.4, height), sharey=True, layout="constrained")
    lowest = values[[column for column in titles if column != "with the key"]].min().min() - 10
    note = {"ha": "center", "va": "center", "fontsize": 7, "color": "#777777"}
    for ax, (column, (title, rate)) in zip(axes, titles.items()):
        images = concepts * record.settings["key_seeds" if column == "with the key" else "seeds"]
        ax.axvline(values[column].iloc[0], color=plots.COLORS["blue"], lw=4, alpha=0.2)
        for y, (name, value) in enumerate(values[column].items()):
            look = plots.style(methods[name])
            if np.isfinite(value):
                ax.hlines(y, *wilson(value, images), color=look["color"], lw=1)
                ax.plot(value, y, ms=7, **look)
            else:
                text = "no key" if column == "with the key" else "erases less than 95 %"
                ax.text(0.5, y, text, transform=ax.get_yaxis_transform(), **note)
        plots.method_rows(ax, [methods[name] for name in values.index], values.index)
        ax.grid(axis="y", color="#e6e6e6", lw=0.6)
        ax.set_title(title)
        plots.percent_axis(ax, "x", rate, (-8, 108) if column == "with the key" else (lowest, 102))
    return {"objects_ablations": figure}


def table(record) -> pd.DataFrame:
    """What each variant keeps where 95 % are erased, interpolated along its curve, and its rates at two steps.

    A curve that starts above 95 % keeps at least what it keeps at its start; one that ends below has no value.
    """
    frame, rows = curves(record), {}
    keys = pd.DataFrame(record.data["runs"]).groupby("variant")
    for name, own in frame.groupby("variant", sort=False):
        x, y = np.maximum.accumulate(own["ESR-1"].to_numpy()), own["PSR-1"].to_numpy()
        trained = own[own.scale == 1.0].iloc[0]
        rows[name] = {
            "PSR-1 at ESR-1 95": float(np.interp(95, x, y)) if x[-1] >= 95 else np.nan,
            "ESR-1, operating point's step": trained["ESR-1"],
            "ESR-5, operating point's step": trained["ESR-5"],
            "PSR-1, operating point's step": trained["PSR-1"],
            "PSR-1, largest step": y[-1],
        }
        if "with the key" in (group := keys.get_group(name)):
            rows[name]["with the key"] = group["with the key"].mean()
    return pd.DataFrame(rows).T.round(1).astype(object).fillna("").rename_axis("%")
