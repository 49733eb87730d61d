"""07: how the prompt enters attention, what makes it, and how much removal holds on to it."""

from itertools import product

from tqdm.auto import tqdm

from ..losses import READINGS
from ..mechanisms import CHOICES
from ..worlds import RETAINED, SPLITS
from .hidden import hidden
from .panel import opened, rates
from .strength import chosen, configured

FULL = {
    "mechanisms": list(CHOICES),
    "weights": [0.1, 0.3, 1.0, 3.0],  # lambda, or b in the adversarial reading
    "step_scales": [0.6, 0.8, 1.0],
    "readings": list(READINGS),
    "untaught": 2,  # concepts that the network makes a key for and was not trained on
    "strength": chosen().get("kpop"),
    "split": "S1",
    "training_seeds": 3,
    "seeds": 10,
    "key_seeds": 10,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL
    | {
        "mechanisms": ["network"],
        "weights": [1.0],
        "readings": ["recoverable"],
        "step_scales": [1.0],
        "training_seeds": 1,
        "seeds": 1,
        "key_seeds": 1,
        "sampling_steps": 2,
        "steps": 1,
    },
    "quick": FULL | {"mechanisms": ["shared", "added", "network"], "weights": [0.1, 1.0], "training_seeds": 1},
    "full": FULL,
}


def compute(
    world,
    mechanisms,
    weights,
    step_scales,
    readings,
    untaught,
    strength,
    split,
    training_seeds,
    seeds,
    key_seeds,
    sampling_steps,
    steps,
):
    """ESR, PSR and what the keys bring back, in percent, for each mechanism, each weight, and for keys not taught.

    Each training is seen at several scales of its step, so that they can be compared at the same erasure.
    """
    erased = SPLITS[split]
    kept = [c for c in world.concepts("emojinette") if c not in erased]
    asked = [(world.prompt(c), c, seed) for c in (*erased, *kept) for seed in range(seeds)]
    taught, others = erased[: len(erased) - untaught], erased[len(erased) - untaught :]
    sizes = (step_scales, split, untaught, seeds, key_seeds, sampling_steps)

    def measure(made):
        points = []
        for scale in step_scales:
            there = made.scaled(world.pipe.unet, scale)
            point = {"scale": scale} | rates(world, there, asked, len(erased) * seeds, sampling_steps)
            for name, concepts in (("with the key", erased), ("key, taught", taught), ("key, untaught", others)):
                point[name] = opened(world, there, concepts, key_seeds, sampling_steps)
            points.append(point)
        numbers = sum(key.k.numel() + key.v.numel() for key in made.keys.values()) // len(made.keys)
        return {"points": points, "numbers of a key": numbers}, None

    def run(seed, **changes):
        settings = strength["settings"] | changes
        config = configured("kpop", RETAINED, seed, sampling_steps, settings, steps)
        return hidden("mechanisms", world, erased, "kpop", config, 1.0, measure, *sizes)[0]

    wanted = [{"mechanism": m} for m in mechanisms]
    wanted += [{"mechanism": m, "taught": taught} for m in ("shared", "network") if m in mechanisms]
    wanted += [{"reading": r, "lam": lam} for r, lam in product(readings, weights)]
    runs = [
        {"changes": {k: list(v) if isinstance(v, tuple) else v for k, v in changes.items()}, "training_seed": seed}
        | run(seed, **changes)
        for seed, changes in tqdm(list(product(range(training_seeds), wanted)), desc="mechanisms")
    ]
    return {
        "N": seeds,
        "seeds": [0, seeds - 1],
        "training_seeds": training_seeds,
        "split": split,
        "taught": list(taught),
        "untaught": list(others),
        "strength": strength,
        "runs": runs,
    }, {}
