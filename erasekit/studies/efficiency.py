"""13: our training procedure against the published one, which samples a new trajectory for every training step."""

from dataclasses import dataclass, field

import pandas as pd

NOTEBOOK, VERSION, UNIT = "13_cost", 1, "images a class"
VERIFY = {"procedures": ("kpop, ours",)}

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
PROCEDURES = {  # procedure -> method, changed settings, training steps
    OURS_NAME: ("kpop", OURS, 140),
    REFERENCE: ("kpop", PUBLISHED, 1000),
    ESD: ("esd-x", PUBLISHED | {"retain": ()}, 1000),
}
LRS = {OURS_NAME: (4e-4, 8e-4, 1.6e-3), REFERENCE: (3e-5, 1e-4, 3e-4), ESD: (3e-5, 1e-4, 3e-4)}
COARSE, FINE = (0.6, 0.7, 0.8, 0.9, 1.0), (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
SEED, FIRST_SEED = 100, 1000  # of the trainings, and of their images


@dataclass(frozen=True)
class Settings:
    procedures: tuple[str, ...] = tuple(PROCEDURES)
    lrs: dict[str, tuple] = field(default_factory=lambda: LRS)
    # Parts of the step. Coarser for the reference: one of its trainings takes hours of a core.
    step_scales: dict[str, tuple] = field(default_factory=lambda: {OURS_NAME: FINE, REFERENCE: COARSE, ESD: FINE})
    seeds: int = 25
    key_seeds: int = 25
    sampling_steps: int = 15
    training_steps: int | None = None


SHORT = {"lrs": dict.fromkeys(PROCEDURES, (1e-3,)), "step_scales": dict.fromkeys(PROCEDURES, (1.0,))}
SHORT |= {"seeds": 1, "key_seeds": 1, "sampling_steps": 2, "training_steps": 1}
PRESETS = {
    "smoke": Settings((OURS_NAME, REFERENCE), **SHORT),
    "quick": Settings((OURS_NAME,), lrs={OURS_NAME: (4e-4,)}),
    "full": Settings(),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Of every procedure and learning rate: U-Net evaluations, seconds, and along the step rates in percent, and with the keys.

    On one half of the tuning objects, the other half kept. No learning rate is chosen: all of them are shown.
    """
    from tqdm.auto import tqdm

    from ..evaluation.protocol import rates, recovery_rate
    from .kit.cache import cached, settings_dict
    from .kit.erasures import make_config, tuning_splits

    erased, kept = tuning_splits(world)[0]
    prompts = [(world.prompt(c), c, FIRST_SEED + n) for c in (*erased, *kept) for n in range(s.seeds)]
    sizes, rows = (s.seeds, s.key_seeds, s.sampling_steps), []
    for name, lr in tqdm([(p, lr) for p in s.procedures for lr in s.lrs[p]], desc="efficiency"):
        method, changes = procedure(world, name)
        changes |= {"lr": lr, "steps": s.training_steps or PROCEDURES[name][2]}

        def train(name=name, method=method, changes=changes):
            config = make_config(world, method, SEED, s.sampling_steps, changes)
            usage, erasure = train_alone(world, erased, method, config)
            points = []
            for scale in s.step_scales[name]:
                scaled = erasure.scaled(world.pipe.unet, scale)
                point = {"scale": scale}
                point |= rates(world, scaled, prompts, len(erased) * s.seeds, s.sampling_steps)
                if scaled.keys:
                    found = recovery_rate(world, scaled, erased, s.key_seeds, s.sampling_steps, FIRST_SEED)
                    point["with the key"] = found
                points.append(point | usage)
            return points, None

        parts = name, settings_dict(make_config(world, method, 0, 0, changes)), s.step_scales[name], *sizes
        points, _ = cached("efficiency", VERSION, world, train, "tuning", *parts)
        rows += [{"procedure": name, "lr": lr} | point for point in points]
    about = {"N": s.seeds, "seeds": [FIRST_SEED, FIRST_SEED + s.seeds - 1], "training_seeds": 1}
    return about | {"erased": list(erased), "kept": list(kept), "rows": rows}, {}


def procedure(world, name: str) -> tuple[str, dict]:
    """Method and changed settings of a procedure; a world with a pool of its own, as at preset smoke, keeps that."""
    method, changes, _ = PROCEDURES[name]
    own = world.pool_defaults if "num_trajectories" in changes else {}
    return method, changes | own | ({"num_retain_trajectories": 1} if own else {})


def train_alone(world, concepts, method: str, config) -> tuple[dict, object]:
    """What a training spends, with a pool of latents of its own, and its erasure."""
    from ..baselines import erase
    from ..evaluation.profiling import count_evaluations, measure

    world.trajectories.clear()
    with measure(world.pipe.device) as usage, count_evaluations(world.pipe.unet) as count:
        erasure = erase(world, list(concepts), method, config, progress=False)
    spent = {"evaluations": count.evaluations, "with gradient": count.with_gradient}
    return spent | {"seconds": round(usage.seconds, 1)}, erasure


def lines(record) -> pd.DataFrame:
    return pd.DataFrame(record.data["rows"]).groupby(["procedure", "lr"], sort=False)


def figures(record) -> dict:
    """U-Net evaluations of each procedure, and what it keeps where it first erases the target: a dot for each learning rate."""
    import matplotlib.pyplot as plt

    from ..evaluation.intervals import wilson
    from .kit.erasures import TARGET_ESR, at_target
    from .kit.plots import COLORS

    looks = {OURS_NAME: (COLORS["blue"], "o"), REFERENCE: (COLORS["orange"], "s"), ESD: ("#555555", "^")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 2.8), layout="constrained", sharey=True)
    first = pd.DataFrame(record.data["rows"]).groupby("procedure", sort=False).first()[::-1]
    colors = [looks[name][0] for name in first.index]
    bars = left.barh(first.index, first.evaluations, color=colors, height=0.6)
    left.bar_label(bars, [f"{n:,}" for n in first.evaluations], padding=3, fontsize=8)
    left.set(xlabel="U-Net evaluations of a training", xlim=(0, 1.2 * first.evaluations.max()))
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.locator_params(axis="x", nbins=4)
    order, places = [*first.index], {}
    for (name, lr), own in lines(record):
        point = at_target(own.to_dict("records"), TARGET_ESR)
        color, marker = looks[name]
        y = order.index(name) + 0.22 * (1 - places.get(name, 0))  # three learning rates a procedure, beside its bar
        places[name] = places.get(name, 0) + 1
        if point is None:
            continue
        low, high = wilson(rate := point["PSR-1"], record.data["N"] * len(record.data["kept"]))
        sides = [[max(rate - low, 0)], [max(high - rate, 0)]]
        right.errorbar([rate], [y], xerr=sides, color=color, marker=marker, ms=5, lw=1)
        right.annotate(f"lr {lr:g}", (100.2, y), va="center", fontsize=7, color=color, annotation_clip=False)
    label = f"kept at {TARGET_ESR:g} % erased, PSR-1, %; bars: 95 % intervals"
    right.set(xlabel=label, xlim=(min(94, right.get_xlim()[0]), 100.1))
    right.tick_params(axis="y", length=0, labelleft=False)
    return {"efficiency": figure}


def table(record) -> pd.DataFrame:
    """Each procedure and learning rate where it first erases 95 %, interpolated along its step, and what a training spends."""
    from .kit.erasures import TARGET_ESR, at_target

    rows = {}
    for (name, lr), own in lines(record):
        points = [{k: v for k, v in point.items() if v == v} for point in own.to_dict("records")]
        point = at_target(points, TARGET_ESR) or points[-1]
        rates = {k: f"{point[k]:.1f}" for k in ("ESR-1", "ESR-5", "PSR-1", "with the key") if k in point}
        spent = {k: f"{points[0][k]:,.0f}" for k in ("evaluations", "with gradient")}
        rows[f"{name}, lr {lr:g}"] = {"part of the step": f"{point['scale']:.2f}"} | rates | spent
    return pd.DataFrame(rows).T.fillna("").rename_axis(f"%, tuning objects, {TARGET_ESR:g} % erased")
