"""03: how long must the prompt be, and where must it stand?"""

from itertools import product

from tqdm.auto import tqdm

from ..attention import PLACES
from .hidden import hidden, known
from .panel import opened, rates
from .strength import chosen, configured

FULL = {
    "lengths": [1, 2, 5, 10, 20, 50, 77],
    "places": list(PLACES),
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
        "lengths": [1],
        "places": ["mid"],
        "training_seeds": 1,
        "seeds": 1,
        "key_seeds": 1,
        "sampling_steps": 2,
        "steps": 1,
    },
    "quick": FULL | {"lengths": [1, 10, 77], "places": ["mid", "all"], "training_seeds": 1},
    "full": FULL,
}


def compute(world, lengths, places, strength, split, training_seeds, seeds, key_seeds, sampling_steps, steps):
    """ESR, PSR and what the keys bring back, in percent, for each length m, place and training seed."""
    known({"kpop": strength}, "kpop")
    erased = world.concepts(split)
    kept = [c for c in world.concepts("classes") if c not in erased]
    asked = [(world.prompt(c), c, seed) for c in (*erased, *kept) for seed in range(seeds)]
    sizes = (split, seeds, key_seeds, sampling_steps)

    def measure(made):
        found = rates(world, made, asked, len(erased) * seeds, sampling_steps)
        return found | {"with the key": opened(world, made, erased, key_seeds, sampling_steps)}, None

    runs = []
    for seed, place, m in tqdm(list(product(range(training_seeds), places, lengths)), desc="prompt length"):
        changes = strength["settings"] | {"m": m, "place": place}
        config = configured(world, "kpop", seed, sampling_steps, changes, steps)
        numbers, _ = hidden("prompt_length", world, erased, "kpop", config, strength["scale"], measure, *sizes)
        runs.append({"m": m, "place": place, "training_seed": seed} | numbers)
    return {
        "N": seeds,
        "seeds": [0, seeds - 1],
        "training_seeds": training_seeds,
        "reading": config.reading,
        "split": split,
        "strength": strength,
        "base": rates(world, None, asked, len(erased) * seeds, sampling_steps),
        "runs": runs,
    }, {}
