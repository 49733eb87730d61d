"""12: attacks with words, on every method: success against the steps an attacker spends."""

from tqdm.auto import tqdm

from ..attacks import Attack, find_words, invert
from ..attacks import pictures as pictured
from ..baselines import METHODS
from ..worlds import RETAINED, SPLITS
from .hidden import hidden
from .reach import reached
from .strength import chosen, configured

WAYS = {"wording": (find_words, True), "new words": (invert, False)}  # and whether they stand before the prompt

FULL = {
    # The two that erase by guidance alone leave the model whole: an attacker samples without them.
    "methods": [m for m in METHODS if m not in ("sld", "np")],
    "strengths": chosen(),
    "split": "S1",
    "attacked": 3,
    "budgets": [25, 100, 400],
    "pictures": 5,
    "seeds": 10,
    "training_seed": 0,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL
    | {"methods": ["uce", "kpop"], "attacked": 1, "budgets": [1], "seeds": 1, "sampling_steps": 2, "steps": 1},
    "quick": FULL | {"methods": ["esd-x", "uce", "kpop"], "attacked": 2, "budgets": [25, 100]},
    "full": FULL,
}


def compute(world, methods, strengths, split, attacked, budgets, pictures, seeds, training_seed, sampling_steps, steps):
    """For each method and attacked concept, the share of images that are the concept, in percent, after each budget."""
    attack, concepts = Attack(budgets=tuple(budgets), seed=training_seed), SPLITS[split]
    sizes = (attacked, budgets, pictures, seeds, sampling_steps)

    def measure(made):
        rows = []
        for concept in concepts[:attacked]:
            shown = pictured(world, concept, pictures, training_seed)
            plain = reached(world, made, concept, seeds, sampling_steps)
            for way, (search, before) in WAYS.items():
                rows.append({"concept": concept, "way": way, "steps": 0, "rate": plain})
                for spent, words in search(world, made, concept, shown, attack).items():
                    rate = reached(world, made, concept, seeds, sampling_steps, words, before)
                    rows.append({"concept": concept, "way": way, "steps": spent, "rate": rate})
        return {"rows": rows}, None

    runs = []
    for method in tqdm(methods, desc="attacks"):
        strength = strengths[method]
        config = configured(method, RETAINED, training_seed, sampling_steps, strength["settings"], steps)
        numbers, _ = hidden("attacks", world, concepts, method, config, strength["scale"], measure, *sizes)
        runs += [{"method": method} | row for row in numbers["rows"]]
    return {"N": seeds, "seeds": [0, seeds - 1], "training_seeds": 1, "pictures": pictures, "runs": runs}, {}
