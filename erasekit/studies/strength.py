"""04, before the comparison: every method at several strengths, on concepts and seeds that no table reports."""

import time
from dataclasses import fields, replace

from tqdm.auto import tqdm

from ..baselines import METHODS, erase, settings
from ..paths import RECORDS
from ..results import Record
from .common import erasure
from .panel import as_json, cell, opened, rates

RATES = ({"lr": 2e-4}, {"lr": 4e-4}, {"lr": 8e-4})
# Methods that train the weights themselves share their learning rates; the others are swept around the setting that does
# something here. Each training is then a curve, along its step from the base.
SWEEP = {
    "esd-x": RATES,
    "esd-u": RATES,
    "ca": RATES,
    "uce": tuple({"lam": lam} for lam in (500.0, 200.0, 150.0, 100.0, 50.0)),
    "rece": tuple({"lam": lam, "round_lam": lam, "rounds": 1} for lam in (2000.0, 500.0)),
    "sld": ({"level": "medium"}, {"level": "strong"}, {"level": "max"}),
    "np": ({},),
    "mace": tuple({"lam": lam} for lam in (300.0, 100.0)),
    "spm": tuple({"anchor_weight": weight} for weight in (30.0, 10.0)),
    "receler": ({"lr": 2e-3}, {"lr": 4e-3}),
    "eap": RATES,
    "age": RATES,
    "kpop": RATES,
    "kpop-anchor": RATES,
    "kpop-adversarial": RATES,
}
ENOUGH = 95.0  # ESR-1 in percent at which methods are compared

FULL = {
    "methods": list(SWEEP),
    "step_scales": [0.6, 0.7, 0.8, 0.9, 1.0],
    "seeds": 10,
    "first_seed": 1000,
    "key_seeds": 4,
    "training_seed": 100,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL
    | {"methods": ["uce", "kpop"], "step_scales": [1.0], "seeds": 1, "key_seeds": 1, "sampling_steps": 2, "steps": 1},
    "quick": FULL | {"methods": ["uce", "kpop"], "step_scales": [0.8, 1.0], "seeds": 5},
    "full": FULL,
}


def compute(world, methods, step_scales, seeds, first_seed, key_seeds, training_seed, sampling_steps, steps):
    """Rates in percent, means over the halves, for each method, setting and scale of its step; and what the comparison takes."""
    sizes = (seeds, first_seed, key_seeds, sampling_steps)
    runs = []
    for method, changes in tqdm([(m, changes) for m in methods for changes in SWEEP[m]], desc="strengths"):
        config = configured(world, method, training_seed, sampling_steps, changes, steps)
        curves = [curve(world, method, config, gone, kept, step_scales, *sizes) for gone, kept in halves(world)]
        for points in zip(*curves):
            mean = {name: round(sum(p[name] for p in points) / len(points), 4) for name in points[0]}
            runs.append({"method": method, "settings": changes} | mean)
    data = {
        "N": seeds,
        "seeds": [first_seed, first_seed + seeds - 1],
        "training_seed": training_seed,
        "halves": [list(gone) for gone, _ in halves(world)],
        "runs": runs,
        "chosen": {m: choose([r for r in runs if r["method"] == m]) for m in methods},
    }
    return data, {}


def halves(world) -> tuple:
    """(erased, kept) of the concepts that strengths are chosen on: each five is erased once, while the other is kept."""
    one, other = world.concepts("tuning"), world.concepts("tuning kept")
    return (one, other), (other, one)


def curve(world, method, config, gone, kept, step_scales, seeds, first_seed, key_seeds, sampling_steps) -> list[dict]:
    """One training, seen along theta + scale (theta' - theta): rates in percent at each scale."""

    def measure():
        made, seconds = trained(world, gone, method, config)
        asked = [(world.prompt(c), c, first_seed + n) for c in gone + kept for n in range(seeds)]
        points = []
        # A method that works by guidance alone takes no step.
        for scale in step_scales if made.delta or made.adapters else [1.0]:
            there = made.scaled(world.pipe.unet, scale) if scale != 1 else made
            point = {"scale": scale} | rates(world, there, asked, len(gone) * seeds, sampling_steps)
            if there.keys:
                point["with the key"] = opened(world, there, gone, key_seeds, sampling_steps)
            points.append(point | {"seconds": seconds})
        return points, None

    parts = as_json(config), gone, kept, step_scales, seeds, first_seed, key_seeds, sampling_steps
    return cell("strength", world, measure, __name__, method, *parts)[0]


def configured(
    world, method: str, seed: int, sampling_steps: int, changes: dict, steps: int | None = None, retain=None
):
    """A method's settings, with those that all methods of a study share where the method has them.

    `retain`: what is kept, by default the world's retained objects.
    """
    retain = world.concepts("retained") if retain is None else retain
    shared = {"retain": retain, "seed": seed, "sampling_steps": sampling_steps}
    has = {field.name for field in fields(METHODS[method][1])}
    # A world's own training is that of weights; adapters and prompts keep their method's.
    shared |= (world.training if "group" in has else {}) | ({"steps": steps} if steps else {})
    config = settings(method, **{k: v for k, v in shared.items() if k in has} | changes)
    return replace(config, lr=config.lr * world.lr_scale) if "group" in has and world.lr_scale != 1 else config


def trained(world, concepts, method: str, config, scale: float = 1.0):
    """The erasure, its step from the base scaled, and the seconds it took to train.

    A world that keeps its images keeps its erasures too: trained again, they might differ in a bit, and the images with them.
    """
    if world.keeps_images:
        made, seconds = erasure(world, list(concepts), config, METHODS[method][0])
    else:
        began = time.time()
        made = erase(world, list(concepts), method, config, progress=False)
        seconds = round(time.time() - began, 1)
    return (made if scale == 1 else made.scaled(world.pipe.unet, scale)), seconds


def choose(runs: list[dict], enough: float = ENOUGH) -> dict:
    """Of the runs that erase enough, the one that keeps most; where none does, the one that erases most."""
    able = [run for run in runs if run["ESR-1"] >= enough]
    by = ("PSR-1", "ESR-1") if able else ("ESR-1", "PSR-1")
    taken = max(able or runs, key=lambda run: [*(run[name] for name in by), run.get("ESR-5", 0.0)])
    return {"settings": taken["settings"], "scale": taken["scale"]}


def chosen(study: str = "strength") -> dict[str, dict]:
    """Each method's settings and step scale by the committed sweep over all methods. Empty where there is none yet."""
    path = RECORDS / "emojinette" / "full" / f"{study}.json"
    return Record.read(path).data["chosen"] if path.exists() else {}
