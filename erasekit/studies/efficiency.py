"""13: our training procedure against the published one, which samples a new trajectory for every training step."""

from dataclasses import dataclass, field
from itertools import product

import pandas as pd

NOTEBOOK, VERSION, UNIT = "13_cost", 1, "images a class"
VERIFY = {"procedures": ("kpop, ours",), "splits": ("S1",), "training_seeds": 1}

# Published: 1,000 steps of batch 1, each on a trajectory of its own; ESD-x retains nothing. Ours: prompt and weights are trained
# in one pass, on about as many samples, from many short trajectories of erased texts and a few of retained ones. All else, from
# the prompted layers to the retained objects, sampler and judges, is the same for all.
OURS = {
    "schedule": "joint",
    "num_trajectories": 40,
    "num_retain_trajectories": 8,
    "trajectory_steps": 4,
    "batch_size": 8,
}
PUBLISHED = {"latents": "on_policy", "batch_size": 1}
OURS_NAME, REFERENCE, ESD = "kpop, ours", "kpop, as published", "esd-x, as published"
PROCEDURES = {  # procedure -> method, changed settings, and numbers of steps after which rates are measured
    OURS_NAME: ("kpop", OURS, (20, 60, 140)),
    REFERENCE: ("kpop", PUBLISHED, (100, 300, 1000)),
    ESD: ("esd-x", PUBLISHED | {"retain": ()}, (100, 300, 1000)),
}
LRS = {OURS_NAME: (4e-4, 8e-4, 1.6e-3), REFERENCE: (3e-5, 1e-4, 3e-4), ESD: (3e-5, 1e-4, 3e-4)}
COARSE, FINE = (0.6, 0.7, 0.8, 0.9, 1.0), (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
TUNING_SEED = 100  # of the trainings that choose learning rates and scales
TUNING_FIRST_SEED = 1000  # of their images


@dataclass(frozen=True)
class Settings:
    procedures: tuple[str, ...] = tuple(PROCEDURES)
    lrs: dict[str, tuple] = field(default_factory=lambda: LRS)
    # Scales of the step. Coarser for the reference: one of its trainings takes half an hour of a core.
    step_scales: dict[str, tuple] = field(default_factory=lambda: {OURS_NAME: FINE, REFERENCE: COARSE, ESD: FINE})
    # ESR-5 in percent that a procedure must have where it is tuned, so that costs are of the same erasure. ESR-1 is 100 for too
    # many settings to tell them apart.
    target_esr5: float = 94.0
    splits: tuple[str, ...] = ("S1",)
    curve_scales: dict[str, tuple] = field(default_factory=lambda: {OURS_NAME: COARSE, ESD: COARSE})
    training_seeds: int = 1
    first_training_seed: int = 0  # so that processes can share the seeds
    seeds: int = 25
    key_seeds: int = 25
    sampling_steps: int = 15
    stops: dict[str, tuple] = field(default_factory=lambda: {name: stops for name, (_, _, stops) in PROCEDURES.items()})


SHORT = {
    "lrs": dict.fromkeys(PROCEDURES, (1e-3,)),
    "step_scales": dict.fromkeys(PROCEDURES, (1.0,)),
    "curve_scales": {OURS_NAME: (0.5,)},
    "stops": dict.fromkeys(PROCEDURES, (1,)),
}
SHORT |= {"splits": ("S1",), "training_seeds": 1, "seeds": 1, "key_seeds": 1, "sampling_steps": 2}
PRESETS = {
    "smoke": Settings((OURS_NAME, REFERENCE), **SHORT),
    "quick": Settings((OURS_NAME,), splits=("S1",), training_seeds=1),
    "full": Settings(),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Along each training: U-Net evaluations and seconds so far, rates in percent, and recovery with the keys.

    Learning rate and scale of the step are chosen for each procedure at its full length, on one half of the tuning objects: of
    those with an ESR-5 of `target_esr5`, the one that keeps most (`choose_operating_point`). They are then the same for every
    split, training seed and number of steps: earlier points are of the same training stopped early, not the best of that length.

    Ends of trainings in `curve_scales` are measured at other scales of the step too, with top-1 of the objects that no procedure
    retains, one image each: which procedure keeps more at the same erasure must not depend on the chosen scale.
    """
    from tqdm.auto import tqdm

    from ..evaluation.images import sample_images
    from ..evaluation.metrics import percent
    from ..evaluation.protocol import correct, rates, recovery_rate
    from .kit.cache import cached, settings_dict
    from .kit.erasures import choose_operating_point, make_config, tuning_splits

    def measure(erasure, erased, kept, first_seed=0):
        prompts = [(world.prompt(c), c, first_seed + n) for c in (*erased, *kept) for n in range(s.seeds)]
        found = rates(world, erasure, prompts, len(erased) * s.seeds, s.sampling_steps)
        if erasure.keys:
            found["with the key"] = recovery_rate(world, erasure, erased, s.key_seeds, s.sampling_steps, first_seed)
        return found

    def config_parts(name, lr):
        """What of a training, beside its seed, decides a cached result."""
        method, changes = procedure(world, name)
        return name, settings_dict(make_config(world, method, 0, 0, changes | {"lr": lr, "steps": s.stops[name][-1]}))

    others = world.unseen_classes("classes")
    sizes = s.seeds, s.key_seeds, s.sampling_steps
    sweep, points = [], {}
    for name, lr in tqdm([(p, lr) for p in s.procedures for lr in s.lrs[p]], desc="learning rates"):

        def tune(name=name, lr=lr):
            erased, kept = tuning_splits(world)[0]
            *_, (_, usage, erasure) = train_to_stops(world, s, name, erased, TUNING_SEED, lr, s.stops[name][-1:])
            scaled = [(scale, erasure.scaled(world.pipe.unet, scale)) for scale in s.step_scales[name]]
            return [{"scale": scale} | measure(e, erased, kept, TUNING_FIRST_SEED) | usage for scale, e in scaled], None

        parts = *config_parts(name, lr), s.step_scales[name], *sizes
        rows, _ = cached("efficiency", VERSION, world, tune, "tuning", *parts)
        sweep += [{"procedure": name, "settings": {"lr": lr}} | row for row in rows]
    for name in s.procedures:
        rows = [row for row in sweep if row["procedure"] == name]
        points[name] = choose_operating_point([row for row in rows if row["ESR-5"] >= s.target_esr5] or rows)

    runs, seeds = [], range(s.first_training_seed, s.first_training_seed + s.training_seeds)
    for seed, name, split in tqdm(list(product(seeds, s.procedures, s.splits)), desc="efficiency"):
        lr, scale = points[name]["settings"]["lr"], points[name]["scale"]
        erased = world.concepts(split)
        kept = [c for c in world.concepts("classes") if c not in erased]
        scales = sorted({*s.curve_scales[name], scale}) if name in s.curve_scales else []

        def train(name=name, seed=seed, lr=lr, scale=scale, erased=erased, kept=kept, scales=scales):
            path, curve = [], []
            for steps, usage, erasure in train_to_stops(world, s, name, erased, seed, lr, s.stops[name]):
                path.append({"steps": steps} | usage | measure(erasure.scaled(world.pipe.unet, scale), erased, kept))
            for each in scales:
                scaled = erasure.scaled(world.pipe.unet, each)
                images = sample_images(world, scaled, [(world.prompt(c), c, 0) for c in others], s.sampling_steps)
                found = measure(scaled, erased, kept) | {"others": percent(correct(world, images, others))}
                curve.append({"scale": each} | found)
                if each == scale:
                    path[-1]["others"] = found["others"]
            return {"points": path, "curve": curve}, None

        parts = *config_parts(name, lr), s.stops[name], seed, split, scale, *sizes, scales
        found, _ = cached("efficiency", VERSION, world, train, *parts)
        runs.append({"procedure": name, "split": split, "training_seed": seed} | found)
    about = {"N": s.seeds, "seeds": [0, s.seeds - 1], "training_seeds": s.training_seeds, "splits": list(s.splits)}
    return about | {"others": len(others), "sweep": sweep, "operating_points": points, "runs": runs}, {}


def procedure(world, name: str) -> tuple[str, dict]:
    """Method and changed settings of a procedure; a world with a pool of its own, as at preset smoke, keeps that."""
    method, changes, _ = PROCEDURES[name]
    own = world.pool_defaults if "num_trajectories" in changes else {}
    return method, changes | own | ({"num_retain_trajectories": 1} if own else {})


def train_to_stops(world, s: Settings, name: str, concepts, seed: int, lr: float, stops):
    """Yield (steps, usage so far, erasure) at each number of steps of one training, which pays for its own pool of latents."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from ..baselines import erase
    from ..evaluation.profiling import count_evaluations, measure
    from .kit.erasures import make_config

    method, changes = procedure(world, name)
    world.trajectories.clear()
    total = {"evaluations": 0, "with gradient": 0, "seconds": 0.0}
    with TemporaryDirectory() as folder:
        for steps in stops:
            config = make_config(world, method, seed, s.sampling_steps, changes | {"lr": lr, "steps": steps})
            with measure(world.pipe.device) as usage, count_evaluations(world.pipe.unet) as count:
                resumed = {"checkpoint": Path(folder) / "training.safetensors", "progress": False}
                erasure = erase(world, list(concepts), method, config, **resumed)
            spent = count.evaluations, count.with_gradient, usage.seconds
            total = {key: round(total[key] + new, 1) for (key, new) in zip(total, spent)}
            yield steps, total, erasure


def figures(record) -> dict:
    """Above: rates against evaluations, for each split. Below: kept against erased along the step from the base."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    from .kit.plots import mean_band

    data, splits = record.data, record.data["splits"]
    figure = plt.figure(figsize=(9.6, 6), layout="constrained")
    above, below = figure.subfigures(2, 1)
    groups = {split: {} for split in splits}
    for run in data["runs"]:
        groups[run["split"]].setdefault(run["procedure"], []).append(run)
    axes = above.subplots(1, 2 * len(splits), sharex=True)
    titles = [(rate, split) for rate in ("ESR-1", "PSR-1") for split in splits]
    for n, (ax, (rate, split)) in enumerate(zip(axes, titles)):
        for name, runs in groups[split].items():
            paths = [pd.DataFrame(run["points"]) for run in runs]
            evaluations = sum(path.evaluations for path in paths) / len(paths)
            mean_band(ax, evaluations, [path[rate] for path in paths], label=name, **_look(name))
        ax.set(xscale="log", title=f"{split}: {'erased' if rate == 'ESR-1' else 'kept'}")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
        ax.xaxis.set_minor_formatter(NullFormatter())
        if n % len(splits):
            ax.sharey(axes[n - 1])
            ax.tick_params(labelleft=False)
        else:
            ax.set_ylabel(f"{rate}, %")
    above.supxlabel("U-Net evaluations of the training (forward passes)", fontsize=9)
    above.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, handlelength=3.5)
    axes = below.subplots(1, 1 + len(splits))
    for name, point in data["operating_points"].items():
        tuned = [p for p in data["sweep"] if (p["procedure"], p["settings"]) == (name, point["settings"])]
        _draw_curve(axes[0], name, pd.DataFrame(tuned), "PSR-1", point["scale"])
        for ax, split in zip(axes[1:], splits):
            rows = [row for run in groups[split].get(name, ()) for row in run["curve"]]
            if rows:
                mean = pd.DataFrame(rows).groupby("scale", as_index=False).mean()
                _draw_curve(ax, name, mean, "others", point["scale"])
    axes[0].set_ylabel("kept: PSR-1, %")
    axes[1].set_ylabel(f"kept: {data['others']} other objects, %")
    for ax, title in zip(axes, ("tuning objects", *splits)):
        ax.set(title=title, xlabel="erased: ESR-5, %")
    for ax in axes[2:]:
        ax.sharey(axes[1])
    below.suptitle("along the step from the base to the erased weights; ring: the chosen scale", fontsize=9.5)
    return {"efficiency": figure}


def _look(name: str) -> dict:
    """A procedure has its method's color and marker; published ones are dashed, with open markers."""
    from .kit.plots import style

    published = {"ls": "--", "mfc": "white"} if name != OURS_NAME else {}
    return style(PROCEDURES[name][0]) | {"ms": 6} | published


def _draw_curve(ax, name: str, rows: pd.DataFrame, kept: str, scale: float) -> None:
    look, chosen = _look(name), rows[rows.scale == scale]
    ax.plot(rows["ESR-5"], rows[kept], **look)
    ax.plot(chosen["ESR-5"], chosen[kept], "o", ms=13, mfc="none", color=look["color"])


def table(record) -> pd.DataFrame:
    """At the end of each training, means over training seeds; costs also in percent of KPOP's as published on the same split."""
    frame = pd.DataFrame(
        [{"procedure": r["procedure"], "split": r["split"]} | r["points"][-1] for r in record.data["runs"]]
    )
    columns = ["evaluations", "with gradient", "seconds", "ESR-1", "PSR-1", "others", "with the key"]
    groups = frame.groupby(["split", "procedure"], sort=False)[[name for name in columns if name in frame]]
    rows, spread = groups.mean(), groups.std(ddof=0)
    for rate in [name for name in ("ESR-1", "PSR-1", "others") if name in rows]:
        rows[rate] = [f"{mean:.1f} ± {sd:.1f}" if mean == mean else "" for mean, sd in zip(rows[rate], spread[rate])]
    for cost in ("evaluations", "seconds"):
        reference = rows[cost][rows.index.get_level_values("procedure") == REFERENCE].droplevel("procedure")
        rows[f"{cost}, %"] = 100 * rows[cost] / reference.reindex(rows.index, level="split")
    for count in [name for name in ("evaluations", "with gradient") if name in rows]:
        rows[count] = rows[count].round().astype(int).astype(str)
    if "with the key" in rows:  # ESD-x has no keys
        rows["with the key"] = rows["with the key"].map("{:.1f}".format).replace("nan", "")
    rows.index = [f"{split}: {procedure}" for split, procedure in rows.index]
    return rows.rename_axis("at the end of the training; ± over training seeds")
