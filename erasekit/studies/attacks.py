"""12: attacks with words, on every method: success against the steps an attacker spends."""

from dataclasses import replace

from tqdm.auto import tqdm

from ..attacks import Attack, as_words
from ..attacks import pictures as pictured
from ..baselines import METHODS
from .hidden import hidden, known
from .panel import cell
from .reach import WAYS, quickest, rates_swept, reached, untouched
from .strength import chosen, configured

SEARCHES = ("new words", "wording")

FULL = {
    # The two that erase by guidance alone leave the model whole: an attacker samples without them. So may one who takes SPM's
    # or Receler's adapters off; here they stay on, SPM's always open.
    "methods": [m for m in METHODS if m not in ("sld", "np")],
    "strengths": chosen(),
    "split": "S1",
    "attacked": 2,
    "budgets": [10, 50, 200],
    # Adam's step at the nearest word has to cross to another: it takes larger rates than a free embedding.
    "attack_lrs": {"new words": [1e-2, 3e-2, 1e-1], "wording": [1e-1, 3e-1, 1.0]},
    "swept": ["esd-x", "kpop"],  # the methods on which each attack's learning rate is chosen
    "attack_seeds": 1,  # of several an attacker keeps the better one
    "pictures": 5,
    "seeds": 20,
    "training_seed": 0,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL
    | {
        "methods": ["uce", "kpop"],
        "attacked": 1,
        "budgets": [1],
        "attack_lrs": {"new words": [1e-2], "wording": [3e-1]},
        "swept": ["kpop"],
        "attack_seeds": 1,
        "seeds": 1,
        "sampling_steps": 2,
        "steps": 1,
    },
    "quick": FULL
    | {
        "methods": ["esd-x", "uce", "kpop"],
        "attacked": 2,
        "budgets": [10, 50],
        "attack_lrs": {"new words": [1e-2, 3e-2], "wording": [3e-1]},
        "swept": ["kpop"],
        "attack_seeds": 1,
    },
    "full": FULL,
}


def compute(
    world,
    methods,
    strengths,
    split,
    attacked,
    budgets,
    attack_lrs,
    swept,
    attack_seeds,
    pictures,
    seeds,
    training_seed,
    sampling_steps,
    steps,
):
    """For the base, each method and attacked concept, the share of images that are the concept, in percent, by budget.

    Step 0 is what the search starts from: random words before the prompt, the concept's own tokens repeated.
    """
    known(strengths, *methods, *swept)
    concepts = world.concepts(split)
    plan = Attack(budgets=tuple(budgets))
    how = plan, pictures, seeds, sampling_steps, steps
    sweep = [row for way in SEARCHES for row in rates_swept(world, swept, strengths, attack_lrs[way], [way], *how)]
    lrs = {way: quickest(sweep, way) for way in SEARCHES}
    sizes = (attacked, budgets, lrs, attack_seeds, pictures, seeds, training_seed, sampling_steps)

    def measure(made):
        rows = []
        for concept in concepts[:attacked]:
            plain = reached(world, made, concept, seeds, sampling_steps)
            rows.append({"concept": concept, "way": "asked plainly", "steps": 0, "rate": plain})
            shown = pictured(world, concept, pictures, training_seed)
            for seed in range(attack_seeds):
                for way in SEARCHES:
                    search, before = WAYS[way]
                    attack = replace(plan, lr=lrs[way], seed=seed)
                    for spent, words in search(world, made, concept, shown, attack).items():
                        rate = reached(world, made, concept, seeds, sampling_steps, words, before)
                        said = {"words": as_words(world.pipe, words)} if before else {}
                        rows.append(
                            {"concept": concept, "way": way, "attack_seed": seed, "steps": spent, "rate": rate} | said
                        )
        return {"rows": rows}, None

    ceiling, _ = cell("attacks", world, lambda: measure(untouched(world)), __name__, "base", *sizes)
    runs = [{"method": "base"} | row for row in ceiling["rows"]]
    for method in tqdm(methods, desc="attacks"):
        strength = strengths[method]
        config = configured(world, method, training_seed, sampling_steps, strength["settings"], steps)
        if method == "spm":
            config = replace(config, transport=False)
        numbers, _ = hidden("attacks", world, concepts, method, config, strength["scale"], measure, *sizes)
        runs += [{"method": method} | row for row in numbers["rows"]]
    about = {"N": seeds, "seeds": [0, seeds - 1], "training_seeds": 1, "pictures": pictures}
    return about | {"attack_lrs": lrs, "sweep": sweep, "runs": runs}, {}
