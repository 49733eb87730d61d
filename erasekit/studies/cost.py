"""13: what each method costs beside what it does; what a key costs in drawing; and how many steps drawing needs."""

import time
from contextlib import nullcontext

import torch
from tqdm.auto import tqdm

from ..baselines import METHODS, erase
from ..counting import counted, spending
from ..sampling import sample
from .hidden import hidden, known
from .panel import cell, rates
from .strength import chosen, configured

FULL = {
    "methods": list(METHODS),
    "strengths": chosen(),
    "split": "S1",
    "training_seed": 0,
    "seeds": 10,
    "sampling_steps": 8,
    # The public models that are drawn with several numbers of steps; of the first with a key, drawing is timed too.
    "drawn_by": ["kpop", "esd-x", "uce", "ca"],
    "numbers_of_steps": [4, 6, 8, 12, 25, 50],
    "repeats": 15,  # of each timed drawing
    "steps": None,
}
SCALES = {
    "smoke": FULL
    | {
        "methods": ["uce", "kpop"],
        "seeds": 1,
        "sampling_steps": 2,
        "drawn_by": ["kpop"],
        "numbers_of_steps": [2],
        "repeats": 1,
        "steps": 1,
    },
    "quick": FULL
    | {"methods": ["esd-x", "uce", "kpop"], "drawn_by": ["uce", "kpop"], "numbers_of_steps": [8, 25], "repeats": 5},
    "full": FULL,
}


def compute(
    world,
    methods,
    strengths,
    split,
    training_seed,
    seeds,
    sampling_steps,
    drawn_by,
    numbers_of_steps,
    repeats,
    steps,
):
    """For each method: evaluations of the U-Net, seconds, memory, numbers and bytes shipped, beside ESR and PSR.

    Each method pays for its own pool. Then rates by the number of sampling steps, and seconds of drawing with and without a key.
    """
    known(strengths, *methods, *drawn_by)
    erased = world.concepts(split)
    kept = [c for c in world.concepts("classes") if c not in erased]
    asked = [(world.prompt(c), c, seed) for c in (*erased, *kept) for seed in range(seeds)]
    sizes = split, seeds, sampling_steps

    def setting(method):
        strength = strengths[method]
        return configured(world, method, training_seed, sampling_steps, strength["settings"], steps), strength["scale"]

    def priced(method):
        config, scale = setting(method)
        world.trajectories.clear()
        with spending(world.pipe.device) as spent, counted(world.pipe.unet) as training:
            made = erase(world, list(erased), method, config, progress=False)
        row = {
            "evaluations": training.evaluations,
            "with gradient": training.with_gradient,
            "seconds": round(spent.seconds, 1),
        }
        row |= {"peak MB": round(spent.peak_mb)} | shipped(made)
        with counted(world.pipe.unet) as drawing:
            sample(world.pipe, [asked[0][0]], [0], erasure=made, steps=sampling_steps)
        row["evaluations a sampling step"] = drawing.evaluations / sampling_steps
        there = made.scaled(world.pipe.unet, scale) if scale != 1 else made
        return row | rates(world, there, asked, len(erased) * seeds, sampling_steps), None

    warm = configured(world, "esd-x", training_seed, sampling_steps, {}, 1)
    erase(world, list(erased[:1]), "esd-x", warm, progress=False)  # what a process pays once falls on no method
    rows = []
    for method in tqdm(methods, desc="cost"):
        config, scale = setting(method)
        parts = str(config), scale, *sizes
        rows.append({"method": method} | cell("cost", world, lambda m=method: priced(m), __name__, method, *parts)[0])

    def by_steps(made):
        points = []
        for count in numbers_of_steps:
            points.append({"steps": count} | rates(world, made, asked, len(erased) * seeds, count))
        return {"points": points} | (
            {"timed": timing(world, made, erased[0], repeats)} if made and made.keys else {}
        ), None

    how = split, seeds, numbers_of_steps, repeats
    base, _ = cell("cost", world, lambda: by_steps(None), __name__, "by steps", "base", *how)
    drawn = [{"method": "base"} | base]
    for method in tqdm(drawn_by, desc="sampling steps"):
        drawn.append({"method": method} | hidden("cost", world, erased, method, *setting(method), by_steps, *how)[0])
    about = {"N": seeds, "seeds": [0, seeds - 1], "training_seeds": 1, "split": split, "sampling_steps": sampling_steps}
    return about | {"rows": rows, "drawn": drawn}, {}


def shipped(made) -> dict:
    """What is given away: the public delta or adapters, and the keys."""
    public, private = made.delta | made.adapters, [half for key in made.keys.values() for half in (key.k, key.v)]
    return {
        "numbers shipped": sum(t.numel() for t in (*public.values(), *private)),
        "bytes, public": sum(t.numel() * t.element_size() for t in public.values()),
        "bytes, keys": sum(t.numel() * t.element_size() for t in private),
    }


def timing(world, made, concept: str, repeats: int, images: int = 8, steps: int = 10) -> dict:
    """Median seconds of drawing `images` by the base, by the public model, and with the key: in turn, so that other work falls
    on all alike."""
    asked, unet = [world.prompt(concept)] * images, world.pipe.unet
    ways = {
        "base": (nullcontext, None),
        "hidden": (made.applied, None),
        "with the key": (made.applied, made.key(concept)),
    }
    seconds = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, (public, key) in ways.items():
            with public(unet):
                began = time.perf_counter()
                sample(world.pipe, asked, list(range(images)), key=key, steps=steps, autocast=world.autocast)
                if turn:  # the first warms up
                    seconds[name].append(time.perf_counter() - began)
    return {name: torch.tensor(each).median().item() for name, each in seconds.items()}
