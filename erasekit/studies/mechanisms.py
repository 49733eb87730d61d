"""07: how the prompt enters attention, what makes it, and how much removal weighs the prompted term."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

NOTEBOOK, VERSION, UNIT = "07_mechanisms", 1, "images a class"

ESR = 90  # percent at which mechanisms are compared
# Of the trainings that choose learning rates; their images without a key start at this seed too, those with one at 0.
TUNING_SEED = 100
TARGETS = {"concept": ("recoverable", "lambda"), "neutral": ("adversarial", "b")}  # name and weight of each reading


@dataclass(frozen=True)
class Settings:
    mechanisms: tuple[str, ...] = ("shared", "layers", "projected", "added", "timed", "network")
    prompt_lrs: tuple[float, ...] = (1e-2, 3e-2, 1e-1)  # each mechanism's is chosen on concepts that no table reports
    weights: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)  # lambda, or b in the adversarial reading
    step_scales: tuple[float, ...] = (0.6, 0.8, 1.0)
    prompted_targets: tuple[str, ...] = tuple(TARGETS)
    untrained: int = 2  # erased concepts whose keys are not trained
    operating_point: dict | None = None  # of kpop; None takes that of the record "operating_points"
    split: str = "S1"
    training_seeds: int = 1
    training_steps: int | None = None
    seeds: int = 25
    key_seeds: int = 25
    sampling_steps: int = 15


PRESETS = {
    "full": Settings(),
    "quick": Settings(mechanisms=("shared", "added", "network"), prompt_lrs=(3e-2,), weights=(0.1, 1.0)),
    "smoke": Settings(
        mechanisms=("network",),
        prompt_lrs=(3e-2,),
        weights=(1.0,),
        step_scales=(1.0,),
        prompted_targets=("concept",),
        training_steps=1,
        seeds=1,
        key_seeds=1,
        sampling_steps=2,
    ),
}
VERIFY = {
    "mechanisms": ("network", "timed"),
    "prompt_lrs": (3e-2,),
    "weights": (1.0,),
    "prompted_targets": ("concept",),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """ESR, PSR and recovery in percent, for each mechanism, each weight of the prompted term, and for untrained keys.

    Each training is measured at several scales of its step, so that trainings can be compared at the same erasure.
    """
    from tqdm.auto import tqdm

    from ..evaluation.protocol import rates, recovery_rate
    from .kit.erasures import make_config, measured, operating_points, require_operating_points

    points = {"kpop": s.operating_point or operating_points().get("kpop")}
    require_operating_points(points, "kpop")
    settings, erased = points["kpop"]["settings"], world.concepts(s.split)
    kept = [c for c in world.concepts("classes") if c not in erased]
    trained, untrained = erased[: len(erased) - s.untrained], erased[len(erased) - s.untrained :]

    def questions(concepts, others, first_seed=0):
        return [(world.prompt(c), c, first_seed + n) for c in concepts + tuple(others) for n in range(s.seeds)]

    def measure(erasure):
        rows = []
        for scale in s.step_scales:
            scaled = erasure.scaled(world.pipe.unet, scale)
            row = {"scale": scale}
            row |= rates(world, scaled, questions(erased, kept), len(erased) * s.seeds, s.sampling_steps)
            by_concept = {c: recovery_rate(world, scaled, [c], s.key_seeds, s.sampling_steps) for c in erased}
            for name, names in (("with the key", erased), ("key, trained", trained), ("key, untrained", untrained)):
                row[name] = round(sum(by_concept[c] for c in names) / max(1, len(names)), 1)
            rows.append(row)
        numbers = sum(key.k.numel() + key.v.numel() for key in erasure.keys.values()) // len(erasure.keys)
        return {"points": rows, "numbers per key": numbers}, None

    tuning = world.concepts("tuning")
    tuning_prompts = questions(tuning, world.concepts("tuning kept"), TUNING_SEED)

    def tune(erasure):
        found = rates(world, erasure, tuning_prompts, len(tuning) * s.seeds, s.sampling_steps)
        return found | {"with the key": recovery_rate(world, erasure, tuning, s.key_seeds, s.sampling_steps)}, None

    def run(concepts, seed, changes, function, *sizes):
        config = make_config(world, "kpop", seed, s.sampling_steps, settings | changes, s.training_steps)
        how = "kpop", config, 1.0, function, *sizes, s.seeds, s.key_seeds, s.sampling_steps
        return measured("mechanisms", VERSION, world, concepts, *how)[0]

    sweep = []
    for mechanism, lr in tqdm(list(product(s.mechanisms, s.prompt_lrs)), desc="prompt learning rates"):
        changes = {"mechanism": mechanism, "prompt_lr": lr}
        sweep.append(changes | run(tuning, TUNING_SEED, changes, tune, "tuning"))
    best = best_prompt_lrs(sweep)

    tasks = [{"mechanism": name, "prompt_lr": best[name]} for name in s.mechanisms]
    tasks += [task | {"train_keys_for": trained} for task in tasks if task["mechanism"] in ("shared", "network")]
    tasks += [{"prompted_target": target, "lam": lam} for target, lam in product(s.prompted_targets, s.weights)]
    runs = []
    for seed, changes in tqdm(list(product(range(s.training_seeds), tasks)), desc="mechanisms"):
        found = run(erased, seed, changes, measure, s.step_scales, s.split, s.untrained)
        changes = {name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()}
        runs.append({"changes": changes, "training_seed": seed} | found)
    return {
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "training_seeds": s.training_seeds,
        "split": s.split,
        "trained": list(trained),
        "untrained": list(untrained),
        "operating_point": points["kpop"],
        "sweep": sweep,
        "runs": runs,
    }, {}


def best_prompt_lrs(sweep: list[dict]) -> dict[str, float]:
    """Each mechanism's learning rate whose keys bring back most; of equals, the one whose model erases and keeps more."""
    best: dict[str, dict] = {}
    for row in sweep:
        value = row["with the key"], row["ESR-1"] + row["PSR-1"]
        if row["mechanism"] not in best or value > best[row["mechanism"]]["value"]:
            best[row["mechanism"]] = row | {"value": value}
    return {mechanism: row["prompt_lr"] for mechanism, row in best.items()}


def read_runs(record) -> pd.DataFrame:
    """A row per run: what was changed, and its rates where it erases `ESR` percent, linear between the scales of its step.

    A run that erases more at its smallest scale has its rates there; one that never erases as much has NaN.
    """
    rows, names = [], ("PSR-1", "with the key", "key, trained", "key, untrained")
    for run in record.data["runs"]:
        points, changes = pd.DataFrame(run["points"]).sort_values("scale"), run["changes"]
        x = np.maximum.accumulate(points["ESR-1"].to_numpy())
        enough = x[-1] >= ESR
        found = {n: float(np.interp(ESR, x, points[n])) if enough else np.nan for n in names}
        if "train_keys_for" not in changes:
            found |= {"key, trained": np.nan, "key, untrained": np.nan}
        found |= {"read at ESR-1": max(ESR, x[0]) if enough else np.nan, "numbers per key": run["numbers per key"]}
        found |= {"ESR-1, whole step": points["ESR-1"].iloc[-1], "training_seed": run["training_seed"]}
        rows.append(changes | found | {"change": label(record, changes)})
    columns = ["mechanism", "train_keys_for", "prompted_target", "lam"]
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=[*columns, *frame.columns.difference(columns, sort=False)])


def label(record, changes: dict) -> str:
    """A run's name in the table."""
    if "prompted_target" in changes:
        reading, weight = TARGETS[changes["prompted_target"]]
        return f"{reading}, {weight} = {changes['lam']:g}"
    count, total = len(record.data["trained"]), len(record.data["trained"] + record.data["untrained"])
    return changes["mechanism"] + (f", {count} of {total} trained" if "train_keys_for" in changes else "")


def figures(record) -> dict:
    """Left: mechanisms. Middle: the weight of the prompted term in both readings. Right: keys that were never trained.

    Lines on the left are Wilson's 95 % intervals, over the images of all training seeds.
    """
    import matplotlib.pyplot as plt

    from ..evaluation.intervals import wilson
    from .kit import plots

    frame, data = read_runs(record), record.data
    images = len(data["trained"] + data["untrained"]) * data["N"] * data["training_seeds"]  # of each rate
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(9.4, 3.4), width_ratios=[1.1, 1.1, 1], layout="constrained"
    )
    looks = {"PSR-1": ("kept (PSR-1)", "grey", "s"), "with the key": ("with the key", "green", "o")}
    plain = frame[frame.mechanism.notna() & frame.train_keys_for.isna()].groupby("mechanism", sort=False)[list(looks)]
    for offset, (rate, (name, color, marker)) in zip((-0.12, 0.12), looks.items()):
        y, mean, color = np.arange(plain.ngroups) + offset, plain.mean()[rate], plots.COLORS[color]
        for height, value in zip(y, mean):
            left.hlines(height, *(wilson(value, images) if np.isfinite(value) else (np.nan, np.nan)), color=color, lw=1)
        left.plot(mean, y, marker, color=color, ms=7, label=name)
    left.set_yticks(range(plain.ngroups), list(plain.groups))
    lowest = np.nanmin([89.0, *plain.min().to_numpy().ravel() - 5])
    left.set(ylim=(plain.ngroups - 0.4, -0.6), title="how the prompt enters attention")
    left.grid(axis="x", color="#e5e5e5")
    plots.percent_axis(left, "x", f"images, % (at {ESR} % erased)", (lowest, 101))
    ends, colors = {}, {}
    for (target, (reading, _)), ls in zip(TARGETS.items(), ("-", "--")):
        own = frame[frame.prompted_target == target]
        for rate, (name, color, marker) in looks.items() if len(own) else ():
            grid = own.pivot_table(index="training_seed", columns="lam", values=rate, dropna=False)
            color, text = plots.COLORS[color], f"{name.split(' (')[0]},\n{reading}"
            plots.mean_band(middle, range(grid.shape[1]), grid.to_numpy(), color=color, ls=ls, marker=marker, ms=5)
            middle.set_xticks(range(grid.shape[1]), [f"{lam:g}" for lam in grid.columns])
            ends[text], colors[text] = grid.iloc[:, -1].mean(), color
    middle.set(xlabel="weight (λ recoverable, b adversarial)", title="weight of the prompted term")
    plots.percent_axis(middle, "y", f"images, % (at {ESR} % erased)")
    keys = frame[frame.train_keys_for.notna()].groupby("mechanism", sort=False)[["key, trained", "key, untrained"]]
    for offset, (rate, color) in zip((-0.2, 0.2), (("key, trained", "green"), ("key, untrained", "purple"))):
        x, mean = np.arange(keys.ngroups) + offset, keys.mean()[rate]
        bars = right.bar(x, mean, 0.38, color=plots.COLORS[color], label=rate.removeprefix("key, "))
        right.bar_label(bars, fmt="%.0f", fontsize=8)
        right.vlines(x, keys.min()[rate], keys.max()[rate], color="black", lw=0.8)
    right.set_xticks(range(keys.ngroups), ["one prompt per\nconcept" if k == "shared" else k for k in keys.groups])
    count, total = len(data["trained"]), len(data["trained"] + data["untrained"])
    right.set_title(f"keys trained for {count} of {total} concepts")
    plots.percent_axis(right, "y", "images with the key, %", (0, 108))
    for ax in (left, right):
        ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    plots.label_ends(middle, ends, colors=colors)
    return {"mechanisms": figure}


def table(record) -> pd.DataFrame:
    """Means over training seeds for each change; nothing where nothing was measured."""
    columns = ["ESR-1, whole step", "read at ESR-1", "PSR-1", "with the key", "key, trained", "key, untrained"]
    means = read_runs(record).groupby("change", sort=False)[[*columns, "numbers per key"]].mean()
    means["numbers per key"] = means["numbers per key"].astype(int).astype(str)
    means = means.round(1).astype(object).where(means.notna(), "")
    return means.rename_axis(f"{record.data['split']}, % where {ESR} % are erased")
