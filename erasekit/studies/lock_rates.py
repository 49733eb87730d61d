"""What the study `lock` measures: lists over classes of how many percent of a class's images show it. `s`: its settings."""

import numpy as np

from .lock_aims import KEYS, PROBES


def rates(world, erasure, erased, kept, others, s, first: int = 0) -> dict[str, list[float]]:
    """For each class, and each unseen synonym of the erased ones, how many percent of its images show it, without a key."""
    words = [(word, c) for c in erased for word in world.synonyms(c).unseen]
    asked = {"erased": (erased, s.seeds), "kept": (kept, s.seeds), "others": (others, s.other_seeds)}
    found = {n: shown(world, erasure, own, count, s.sampling_steps, None, first) for n, (own, count) in asked.items()}
    about = s.word_seeds, s.sampling_steps, None, first
    return found | {"synonyms": shown(world, erasure, [c for _, c in words], *about, [w for w, _ in words])}


def shown(world, erasure, classes, seeds: int, steps: int, key=None, first: int = 0, words=None) -> list[float]:
    """For each class, by its name or by the words given, the percentage of its images that show it."""
    from ..evaluation.images import sample_images
    from ..evaluation.metrics import object_correct, percent

    if not classes:
        return []
    triples = [(world.prompt(w), c, first + n) for w, c in zip(words or classes, classes) for n in range(seeds)]
    found = object_correct(world, sample_images(world, erasure, triples, steps, key), [c for _, c, _ in triples])
    return [percent(own) for own in found.split(seeds)]


def opened(world, s, erasure, other, erased) -> dict[str, list[float]]:
    """For each erased class, the percentage of its images that show it with each of `KEYS`; `other`: of another seed, or None."""
    from ..checkpoints import seeded
    from ..evaluation.attacks import random_key

    found: dict[str, list[float]] = {}
    for n, concept in enumerate(erased):
        keys = erasure.key(concept), erasure.key(erased[n - 1])
        keys += random_key(keys[0], seeded("random key", concept, 0)), other.key(concept) if other else None
        for name, key in zip(KEYS, keys):
            if key is not None:
                found.setdefault(name, []).extend(shown(world, erasure, [concept], s.seeds, s.sampling_steps, key))
    return found


def attacked(world, s, erasure, concept: str, attack: str, budgets, seed: int) -> list[dict]:
    """By attack steps, the percentage of images that show a class; step 0 is the search's public start."""
    from ..evaluation.attack_success import ATTACKS, success_rate
    from ..evaluation.attacks import Attack, attack_images

    plan, (find, before) = Attack(budgets=tuple(budgets), lr=s.attack_lr, seed=seed), ATTACKS[attack]
    results = find(world, erasure, concept, attack_images(world, concept, s.attack_images, seed), plan)
    about = world, erasure, concept, s.seeds, s.sampling_steps
    rated = {steps: success_rate(*about, result, before, seed) for steps, result in results.items()}
    return [{"concept": concept, "attack": attack, "steps": steps, "rate": rate} for steps, rate in rated.items()]


def probed(world, s, erasure, erased) -> list[dict]:
    """Under each of `PROBES`, which no filter of prompts sees: for each erased class the percentage of images that show it."""
    from ..evaluation.retraining import Tuning, fine_tune
    from . import probes
    from .probes_weights import Settings, pictures_of_others

    asked = probes.Settings(seeds=s.seeds, first_steps=(s.first_steps,), sampling_steps=s.sampling_steps)
    completed, _ = probes.measure_completion(world, erasure, erased, asked)
    how = Settings(training_seed=s.training_seed)
    tuning = Tuning((s.finetune_steps,), how.finetune_lr, None, how.finetune_batch, s.training_seed)
    *_, (_, tuned) = fine_tune(world, erasure, pictures_of_others(world, how), tuning)
    return [
        {"probe": PROBES[0], "shown": [row["rate"] for row in completed]},
        {"probe": PROBES[1], "shown": shown(world, tuned, erased, s.seeds, s.sampling_steps)},
    ]


def mean(values) -> float:
    return round(float(np.mean(values)), 2)
