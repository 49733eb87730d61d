"""Whether a public model still draws a concept: asked plainly, with a key, or with words an attacker found."""

from dataclasses import replace
from itertools import product

import torch

from ..artifacts import Erasure
from ..attacks import Attack, find_key, find_words, invert, marks, pictures, spoken
from ..attention import Prompt
from ..metrics import object_rate, percent, style_rate
from ..sampling import sample
from .hidden import hidden
from .panel import drawn
from .strength import configured

# What an attacker looks for: how, and whether it is said before the prompt.
WAYS = {"key found": (find_key, False), "new words": (invert, False), "wording": (find_words, True)}
TUNING_SEED = 100  # of what learning rates are chosen on; its images' seeds start there too


def untouched(world) -> Erasure:
    """An erasure that changes nothing: what an attack reaches on it is the most it can."""
    return Erasure({}, {}, {"method": "base", "world": world.name, "base": world.fingerprint})


def prompts(world, concept: str, seeds: int) -> tuple[list[str], list[int]]:
    """A concept asked for by its own name, once for each seed; a style with the ten objects in turn."""
    objects = world.concepts("classes")
    if concept in world.styles:
        return [world.prompt(objects[n % len(objects)], concept) for n in range(seeds)], list(range(seeds))
    return [world.prompt(concept)] * seeds, list(range(seeds))


def present(world, concept: str, images: torch.Tensor) -> torch.Tensor:
    """Boolean (N,): the judge's first object, or style, is the concept; of a category, some member has more than 0.5."""
    if concept in world.styles:
        return style_rate(world, images, [concept] * len(images))
    if concept in world.judge.objects:
        return object_rate(world, images, [concept] * len(images))
    return world.detected(images)[1].max(1).values > 0.5


def reached(
    world, erasure, concept: str, seeds: int, steps: int, way=None, before: bool = False, first_seed: int = 0
) -> float:
    """Share of a public model's images that are the concept, in percent.

    `way`: None, a key (`Prompt`), or embeddings (m, width) of new words, said in place of the concept's name or `before` the
    prompt.
    """
    asked, numbers = prompts(world, concept, seeds)
    numbers = [first_seed + n for n in numbers]
    if way is None or isinstance(way, Prompt):
        images = drawn(world, erasure, [(text, concept, n) for text, n in zip(asked, numbers)], steps, way)
    else:
        words = marks(len(way))
        asked = [f"{words} {text}" if before else text.replace(concept, words) for text in asked]
        with spoken(world.pipe, way):
            how = {"erasure": erasure, "steps": steps, "batch_size": world.batch, "autocast": world.autocast}
            images = sample(world.pipe, asked, numbers, **how)
    return percent(present(world, concept, images))


def rates_swept(
    world, methods, strengths, rates, ways, attack: Attack, count, seeds, sampling_steps, steps
) -> list[dict]:
    """An attack's success by learning rate, on concepts and seeds that no table reports, in percent by budget.

    Each method hides the tuning objects, and the first of them is attacked.
    """
    tuning, rows = world.concepts("tuning"), []
    concept = tuning[0]
    for method, way in product(methods, ways):
        search, before = WAYS[way]

        def measure(made, way=way, search=search, before=before):
            shown, found = pictures(world, concept, count, TUNING_SEED), []
            for lr in rates:
                results = search(world, made, concept, shown, replace(attack, lr=lr, seed=TUNING_SEED))
                for spent, what in results.items():
                    rate = reached(world, made, concept, seeds, sampling_steps, what, before, TUNING_SEED)
                    found.append({"way": way, "lr": lr, "steps": spent, "rate": rate})
            return {"rows": found}, None

        strength = strengths[method]
        config = configured(world, method, TUNING_SEED, sampling_steps, strength["settings"], steps)
        parts = way, rates, list(attack.budgets), count, seeds, sampling_steps
        numbers, _ = hidden("reach", world, tuning, method, config, strength["scale"], measure, *parts)
        rows += [{"method": method} | row for row in numbers["rows"]]
    return rows


def quickest(sweep: list[dict], way: str) -> float:
    """The learning rate of the largest success at the largest budget, a mean over methods; of equals, over all budgets."""
    own, last = [row for row in sweep if row["way"] == way], max(row["steps"] for row in sweep)

    def success(lr):
        mine = [row for row in own if row["lr"] == lr]
        return sum(row["rate"] for row in mine if row["steps"] == last), sum(row["rate"] for row in mine)

    return max(dict.fromkeys(row["lr"] for row in own), key=success)
