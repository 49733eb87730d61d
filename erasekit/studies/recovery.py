"""09: who gets a hidden concept back: the right key, wrong keys, and attackers who look for a key or for words of their own."""

from dataclasses import replace

from tqdm.auto import tqdm

from ..attacks import Attack, find_key, invert
from ..attacks import pictures as pictured
from ..attention import Prompt
from ..checkpoints import seeded
from ..worlds import RETAINED, SPLITS
from .hidden import hidden
from .reach import reached
from .strength import chosen, configured, trained

# What is hidden at once, what of it is attacked, and the study that chose the strengths.
CASES = {
    "objects": (SPLITS["S1"], SPLITS["S1"][:3], "strength"),
    "category": (("weapon",), ("weapon",), "strength"),
    "style": (("openmoji",), ("openmoji",), "style_strength"),
}
FULL = {
    "methods": ["kpop", "kpop-anchor", "esd-x", "uce"],
    "cases": list(CASES),
    "strengths": {name: chosen(name) for name in ("strength", "style_strength")},
    "budgets": [25, 100, 400],
    "pictures": [1, 5],
    "log_weights": [-8, -6, -5, -4, -3, -2, -1, 0, 1, 2],
    "seeds": 10,
    "training_seed": 0,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL
    | {
        "methods": ["kpop"],
        "cases": ["objects"],
        "budgets": [1],
        "pictures": [1],
        "log_weights": [0],
        "seeds": 1,
        "sampling_steps": 2,
        "steps": 1,
    },
    "quick": FULL | {"methods": ["kpop", "esd-x"], "cases": ["objects"], "budgets": [25, 100], "pictures": [5]},
    "full": FULL,
}


def compute(
    world, methods, cases, strengths, budgets, pictures, log_weights, seeds, training_seed, sampling_steps, steps
):
    """For each method, case and concept, the share of images that are the concept, in percent, by way of asking."""
    attack = Attack(budgets=tuple(budgets), seed=training_seed)

    def ways(made, method, config, scale, concepts, concept):
        """(way, pictures, steps, key or words) for one concept."""
        yield "no key", 0, 0, None
        if made.keys:
            again, _ = trained(world, concepts, method, replace(config, seed=config.seed + 1), scale)
            for name, key in keys(made, again, concept).items():
                yield name, 0, 0, key
            for weight in log_weights:
                yield f"log-weight {weight}", 0, 0, replace(made.key(concept), log_weight=float(weight))
        for count in pictures:
            shown = pictured(world, concept, count, training_seed)
            for name, search in (("key found", find_key), ("words found", invert)):
                for spent, found in search(world, made, concept, shown, attack).items():
                    yield name, count, spent, found

    runs = []
    for case, method in tqdm([(c, m) for c in cases for m in methods], desc="recovery"):
        concepts, attacked, study = CASES[case]
        strength = strengths[study][method]
        config = configured(method, RETAINED, training_seed, sampling_steps, strength["settings"], steps)
        how = method, config, strength["scale"], concepts

        def measure(made, how=how, attacked=attacked):
            rows = []
            for concept in attacked:
                for way, count, spent, found in ways(made, *how, concept):
                    rate = reached(world, made, concept, seeds, sampling_steps, found)
                    rows.append({"concept": concept, "way": way, "pictures": count, "steps": spent, "rate": rate})
            return {"rows": rows}, None

        sizes = list(attacked), budgets, pictures, log_weights, seeds, sampling_steps
        numbers, _ = hidden("recovery", world, concepts, method, config, strength["scale"], measure, *sizes)
        runs += [{"case": case, "method": method} | row for row in numbers["rows"]]
    return {"N": seeds, "seeds": [0, seeds - 1], "training_seeds": 1, "runs": runs}, {}


def keys(made, again, concept: str) -> dict[str, Prompt]:
    """The right key of a concept, and wrong ones: `again` is the same erasure from another training seed."""
    right, others = made.key(concept), [c for c in made.keys if c != concept]
    wrong = {"another concept's key": made.key(others[0])} if others else {}
    random = Prompt.random_like(right, seeded("random key", concept))
    return {"the right key": right} | wrong | {"a key from another seed": again.key(concept), "a random key": random}
