"""04: the paper's object splits, every method on the same images, seeds and sampler."""

from dataclasses import fields
from itertools import product

from tqdm.auto import tqdm

from ..baselines import METHODS
from .panel import as_json, cell, judged_panel, opened, questions
from .strength import chosen, configured, trained

RETAIN = ("named", "empty")  # the ten retained objects, or the empty text

FULL = {
    "methods": list(METHODS),
    "strengths": chosen(),
    "splits": ["S1", "S2", "S3", "S4"],
    "training_seeds": 3,
    "retain": list(RETAIN),
    "repeated": ["S1"],  # where the other training seeds and retain options are run
    "seeds": 10,
    "few_seeds": 4,  # for neighbours and other wordings; all other objects have one
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL
    | {
        "methods": ["uce", "kpop"],
        "splits": ["S1"],
        "training_seeds": 1,
        "retain": ["named"],
        "seeds": 1,
        "few_seeds": 1,
        "sampling_steps": 2,
        "steps": 1,
    },
    "quick": FULL
    | {
        "methods": ["esd-x", "uce", "ca", "spm", "kpop", "kpop-anchor"],
        "splits": ["S1"],
        "training_seeds": 1,
        "retain": ["named"],
    },
    "full": FULL,
}


def compute(
    world, methods, strengths, splits, training_seeds, retain, repeated, seeds, few_seeds, sampling_steps, steps
) -> tuple[dict, dict]:
    """One run for each method and split, and where `repeated` for each training seed and retain option; rates in percent."""
    missing = [m for m in methods if m not in strengths]
    if missing:
        raise ValueError(
            f"no strength was chosen for {', '.join(missing)}: run the study 'strength' at scale 'full' first"
        )
    sizes = (seeds, few_seeds, sampling_steps)
    wanted = [
        (option, seed, split, method)
        for option, seed, split, method in product(retain, range(training_seeds), splits, methods)
        if worth_running(method, option, seed) and (split in repeated or (option, seed) == (retain[0], 0))
    ]
    runs, images = [], {}
    for option, seed, split, method in tqdm(wanted, desc="objects"):
        strength = strengths[method]
        named = None if option == "named" else ("",)
        config = configured(world, method, seed, sampling_steps, strength["settings"], steps, retain=named)

        def measure(method=method, split=split, config=config, scale=strength["scale"]):
            return panel(world, method, world.concepts(split), config, scale, *sizes)

        rates, picture = cell(
            "objects", world, measure, __name__, method, split, as_json(config), strength["scale"], sizes
        )
        runs.append({"method": method, "split": split, "training_seed": seed, "retain": option} | rates)
        if (option, seed, split) == (retain[0], 0, splits[0]):
            images[method] = picture
    base, picture = cell("objects", world, lambda: base_panel(world, splits, *sizes), __name__, "base", splits, sizes)
    data = {
        "N": seeds,
        "seeds": [0, seeds - 1],
        "training_seeds": training_seeds,
        "splits": splits,
        "repeated": repeated,
        "strengths": {m: strengths[m] for m in methods},
        "sizes": base["sizes"],
        "base": base["splits"],
        "runs": runs,
        "frontier": frontier([r for r in runs if r["retain"] == retain[0]]),
    }
    return data, {"base": picture} | images


def frontier(runs: list[dict]) -> dict:
    """For both readings of KPOP and each split: the baselines that erase more and keep more, means over training seeds.

    "Erases" is ESR-1; "keeps" is PSR-1 over the split's kept classes, or the rate over all other objects.
    """

    def mean(method, split, rate):
        values = [r[rate] for r in runs if (r["method"], r["split"]) == (method, split)]
        return sum(values) / len(values)

    methods, splits = (list(dict.fromkeys(r[name] for r in runs)) for name in ("method", "split"))
    ours = [m for m in methods if m.startswith("kpop")]
    return {
        reading: {
            split: {
                kept: [
                    m
                    for m in methods
                    if m not in ours and all(mean(m, split, k) > mean(reading, split, k) for k in ("ESR-1", kept))
                ]
                for kept in ("PSR-1", "others")
            }
            for split in splits
        }
        for reading in ours
    }


def worth_running(method: str, option: str, seed: int) -> bool:
    """More than one training seed where there is chance; another retain option, with one, where a method retains."""
    has = {field.name for field in fields(METHODS[method][1])}
    return (seed == 0 or "lr" in has) if option == "named" else (seed == 0 and "retain" in has)


def panel(world, method, split, config, scale, seeds, few_seeds, sampling_steps):
    """Train, draw, judge. Rates in percent, and one image of each of the ten classes, the erased first."""
    made, seconds = trained(world, split, method, config, scale)
    rates, picture = judged_panel(world, made, split, seeds, few_seeds, sampling_steps)
    if made.keys:
        rates["with the key"] = opened(world, made, split, few_seeds, sampling_steps)
    return rates | {"training_seconds": seconds}, picture


def base_panel(world, splits, seeds, few_seeds, sampling_steps):
    """The untouched model on every split, how many images each rate has, and its images in the order of the first split."""
    found = {s: judged_panel(world, None, world.concepts(s), seeds, few_seeds, sampling_steps) for s in splits}
    sizes = {name: len(part) for name, part in questions(world, world.concepts(splits[0]), seeds, few_seeds).items()}
    return {"splits": {s: rates for s, (rates, _) in found.items()}, "sizes": sizes}, found[splits[0]][1]
