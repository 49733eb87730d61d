"""06, before the comparison: every method at several strengths on styles, with objects and seeds that no table reports."""

import torch
from tqdm.auto import tqdm

from ..metrics import in_top, judged, percent
from .hidden import hidden
from .panel import drawn, hits
from .strength import choose, configured

RATES = ({"lr": 8e-4}, {"lr": 1.6e-3}, {"lr": 3.2e-3})  # a style takes more than an object
SWEEP = {
    "esd-x": RATES,
    "uce": tuple({"lam": lam} for lam in (50.0, 15.0, 5.0)),
    "ca": RATES,
    "sld": ({"level": "max"},),
    "np": ({},),
    "mace": tuple({"lam": lam} for lam in (30.0, 10.0)),
    "spm": tuple({"anchor_weight": weight} for weight in (10.0, 3.0)),
    "kpop": RATES,
    "kpop-anchor": RATES,
}
PLAIN_SEEDS = 10  # images of each object asked for in no style

FULL = {
    "methods": list(SWEEP),
    "erased": ["openmoji"],
    "step_scales": [0.6, 0.8, 1.0],
    "seeds": 4,
    "first_seed": 1000,
    "training_seed": 100,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL
    | {
        "methods": ["uce", "kpop"],
        "erased": ["noto"],
        "step_scales": [1.0],
        "seeds": 1,
        "sampling_steps": 2,
        "steps": 1,
    },
    "quick": FULL | {"methods": ["uce", "kpop"], "step_scales": [0.8, 1.0]},
    "full": FULL,
}


def compute(world, methods, erased, step_scales, seeds, first_seed, training_seed, sampling_steps, steps):
    """Rates in percent, means over the erased styles, for each method, setting and scale of its step; and what 06 takes.

    Enough is what leaving the style unnamed does, since the base draws an object in some style anyway. ESR-1: images of the
    erased style whose style is not the judge's first. PSR-1: images of the other styles, style and object right. "object":
    images of the erased style that are still their object.
    """
    objects = world.concepts("tuning") + world.concepts("tuning kept")
    sizes = (objects, seeds, first_seed, sampling_steps)

    def ask(style, count):
        return [(world.prompt(o, style), o, first_seed + n) for o in objects for n in range(count)]

    def rates(made, gone):
        own, others = ask(gone, seeds), [s for s in world.styles if s != gone]
        asked = own + [q for s in others for q in ask(s, 1)]
        styles = [gone] * len(own) + [s for s in others for _ in objects]
        images = drawn(world, made, asked, sampling_steps)
        style = in_top(judged(world, images)[1], world.judge.styles, styles)
        thing = hits(world, images, [o for _, o, _ in asked])
        mine = torch.arange(len(asked)) < len(own)
        return {
            "ESR-1": percent(~style[mine]),
            "PSR-1": percent(style[~mine] & thing[~mine]),
            "object": percent(thing[mine]),
        }

    def along(made, gone):
        # A method that works by guidance alone takes no step.
        scales = step_scales if made.delta or made.adapters else [1.0]
        there = {s: made.scaled(world.pipe.unet, s) if s != 1 else made for s in scales}
        return {"points": [{"scale": s} | rates(way, gone) for s, way in there.items()]}, None

    runs = []
    for method, changes in tqdm([(m, changes) for m in methods for changes in SWEEP[m]], desc="style strengths"):
        config = configured(world, method, training_seed, sampling_steps, changes, steps)
        found = [
            hidden(
                "style_strength", world, [s], method, config, 1.0, lambda made, s=s: along(made, s), step_scales, sizes
            )
            for s in erased
        ]
        for points in zip(*(numbers["points"] for numbers, _ in found)):
            mean = {name: round(sum(p[name] for p in points) / len(points), 4) for name in points[0]}
            runs.append({"method": method, "settings": changes} | mean)
    base = [rates(None, s) for s in erased]
    unnamed = [(world.prompt(o), o, first_seed + n) for o in objects for n in range(PLAIN_SEEDS)]
    plain = judged(world, drawn(world, None, unnamed, sampling_steps))[1].argmax(1)
    enough = sum(percent(plain != world.judge.styles.index(s)) for s in erased) / len(erased)
    data = {
        "N": len(objects) * seeds,
        "seeds": [first_seed, first_seed + seeds - 1],
        "training_seed": training_seed,
        "erased": erased,
        "enough": enough,
        "base": {name: round(sum(b[name] for b in base) / len(base), 4) for name in base[0]},
        "runs": runs,
        "chosen": {m: choose([r for r in runs if r["method"] == m], enough) for m in methods},
    }
    return data, {}
