"""09: who gets a hidden concept back: the right key, wrong keys, and attackers who look for a key or for words of their own."""

from dataclasses import replace

import torch
from tqdm.auto import tqdm

from ..attacks import Attack
from ..attacks import pictures as pictured
from ..attention import Prompt, initial_prompt
from ..checkpoints import seeded
from .common import strip
from .hidden import hidden, known
from .panel import cell, drawn
from .reach import WAYS, prompts, quickest, rates_swept, reached, untouched
from .strength import chosen, configured, trained

# The study that chose the strengths.
CASES = {"objects": "strength", "category": "strength", "style": "style_strength"}
WEIGHED = "the right key, weighed"  # its rows have a log_weight
SHOWN = 5  # images a weight that the record keeps
SEARCHES = ("key found", "new words")
FULL = {
    "methods": ["kpop", "kpop-anchor", "esd-x", "uce"],
    "cases": list(CASES),
    "attacked": 2,  # of the objects hidden at once
    "style": "fluent",
    "strengths": {name: chosen(name) for name in ("strength", "style_strength")},
    "budgets": [10, 50, 200],
    "attack_lrs": [1e-2, 3e-2, 1e-1],
    "swept": ["esd-x", "kpop"],  # the methods on which each attack's learning rate is chosen
    "pictures": [1, 5],
    "log_weights": [-8, -6, -5, -4, -3, -2, -1, 0, 1, 2],
    "random_keys": 3,
    "seeds": 20,
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
        "attack_lrs": [1e-2],
        "swept": ["kpop"],
        "pictures": [1],
        "log_weights": [0],
        "random_keys": 1,
        "seeds": 1,
        "sampling_steps": 2,
        "steps": 1,
    },
    "quick": FULL
    | {
        "methods": ["kpop", "esd-x"],
        "cases": ["objects"],
        "budgets": [10, 50],
        "attack_lrs": [1e-2, 3e-2],
        "swept": ["kpop"],
        "pictures": [5],
        "seeds": 10,
    },
    "full": FULL,
}


def compute(
    world,
    methods,
    cases,
    attacked,
    style,
    strengths,
    budgets,
    attack_lrs,
    swept,
    pictures,
    log_weights,
    random_keys,
    seeds,
    training_seed,
    sampling_steps,
    steps,
):
    """For the base and each method, case and concept, the share of images that are the concept, in percent, by way of asking.

    A search's step 0 is what it starts from: the concept's own tokens, as a key that was never trained, or repeated as words.
    Images: of each method with keys, a case's first concept without its key, then with it at each log-weight.
    """
    for study in {CASES[case] for case in cases}:
        known(strengths[study], *methods)
    known(strengths["strength"], *swept)
    attack = Attack(budgets=tuple(budgets), seed=training_seed)
    sizes_swept = SEARCHES, attack, max(pictures), seeds, sampling_steps, steps
    sweep = rates_swept(world, swept, strengths["strength"], attack_lrs, *sizes_swept)
    lrs = {way: quickest(sweep, way) for way in SEARCHES}
    sizes = (budgets, lrs, pictures, log_weights, random_keys, seeds, training_seed, sampling_steps)

    def ways(made, again, concept):
        """(way, pictures, steps, key or words) for one concept; `again` is the same erasure from another training seed."""
        yield "no key", 0, 0, None
        start = initial_prompt(world.concept_tokens(concept).float(), attack.m)
        yield "the concept's tokens as a key", 0, 0, start
        if again:
            key, others = made.key(concept), [c for c in made.keys if c != concept]
            yield "the right key", 0, 0, key
            for other in others[:1]:
                yield "another concept's key", 0, 0, made.key(other)
            yield "a key from another seed", 0, 0, again.key(concept)
            for n in range(random_keys):
                yield "a random key", 0, 0, Prompt.random_like(key, seeded("random key", concept, n))
            for weight in log_weights:
                yield WEIGHED, 0, 0, replace(key, log_weight=float(weight))
        for count in pictures:
            shown = pictured(world, concept, count, training_seed)
            for name in SEARCHES:
                found = WAYS[name][0](world, made, concept, shown, replace(attack, lr=lrs[name]))
                for spent, what in found.items():
                    yield name, count, spent, what

    def rows(made, again, targets):
        found = []
        for concept in targets:
            for way, count, spent, what in ways(made, again, concept):
                rate = reached(world, made, concept, seeds, sampling_steps, what)
                row = {"concept": concept, "way": way, "pictures": count, "steps": spent, "rate": rate}
                found.append(row | ({"log_weight": what.log_weight} if way == WEIGHED else {}))
        return {"rows": found}, weighed(made, targets[0]) if again else None

    def weighed(made, concept):
        """A concept without its key, then with the key at each weight."""
        key, asked = made.key(concept), [(text, concept, n) for text, n in zip(*prompts(world, concept, SHOWN))]
        keys = [replace(key, log_weight=float(weight)) for weight in (-torch.inf, *log_weights)]
        return strip(torch.cat([drawn(world, made, asked, sampling_steps, k) for k in keys]))

    runs, images = [], {}
    for case in cases:
        # What is hidden at once, and what of it is attacked.
        concepts, targets = {
            "objects": (world.concepts("S1"), world.concepts("S1")[:attacked]),
            "category": ((world.category,),) * 2,
            "style": ((style,),) * 2,
        }[case]
        study = CASES[case]

        def ceiling(targets=targets):
            return rows(untouched(world), None, targets)

        numbers, _ = cell("recovery", world, ceiling, __name__, "base", list(targets), *sizes)
        runs += [{"case": case, "method": "base"} | row for row in numbers["rows"]]
        for method in tqdm(methods, desc=f"recovery, {case}"):
            strength = strengths[study][method]
            config = configured(world, method, training_seed, sampling_steps, strength["settings"], steps)

            def measure(
                made, method=method, config=config, scale=strength["scale"], concepts=concepts, targets=targets
            ):
                other = replace(config, seed=config.seed + 1) if made.keys else None
                again = trained(world, concepts, method, other, scale)[0] if other else None
                return rows(made, again, targets)

            how = method, config, strength["scale"], measure, list(targets)
            numbers, picture = hidden("recovery", world, concepts, *how, *sizes)
            runs += [{"case": case, "method": method} | row for row in numbers["rows"]]
            images |= {f"{case}.{method}": picture} if picture else {}
    about = {"N": seeds, "seeds": [0, seeds - 1], "training_seeds": 1, "attack_lrs": lrs, "sweep": sweep}
    return about | {"log_weights": log_weights, "runs": runs}, images
