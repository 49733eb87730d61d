"""11: what happens along the training: the paper's claim that transfer makes removal gentler, tested directly."""

from itertools import product

import torch
from tqdm.auto import tqdm

from ..metrics import clip_alignment, percent
from .hidden import hidden, known
from .panel import drawn, hits
from .strength import chosen, configured

# The second is removal alone, with the same latents, target and retained objects.
ARMS = {"with transfer": {}, "removal alone": {"transfer_steps": 0, "lam": 0.0}}

FULL = {
    "arms": list(ARMS),
    "strength": chosen().get("kpop"),
    "split": "S1",
    "at": [5, 10, 20, 40, 80, 150],  # nothing in training depends on its length: each is the same run, stopped earlier
    "training_seeds": 3,
    "seeds": 10,
    "key_seeds": 4,
    "sampling_steps": 8,
}
SCALES = {
    "smoke": FULL | {"at": [1], "training_seeds": 1, "seeds": 1, "key_seeds": 1, "sampling_steps": 2},
    "quick": FULL | {"at": [10, 40, 150], "training_seeds": 1},
    "full": FULL,
}


def compute(world, arms, strength, split, at, training_seeds, seeds, key_seeds, sampling_steps):
    """After each number of steps: rates in percent, CLIP alignment with the prompt, and how far the weights have moved."""
    known({"kpop": strength}, "kpop")
    erased = world.concepts(split)
    kept = [c for c in world.concepts("classes") if c not in erased]
    theta = {name: p.detach().clone() for name, p in world.pipe.unet.named_parameters()}

    def seen(images, concepts, count):
        labels = [c for c in concepts for _ in range(count)]
        aligned = clip_alignment(world, images, [world.prompt(c) for c in labels]).mean().item()
        return {"top-1": percent(hits(world, images, labels)), "CLIP": round(aligned, 3)}

    def draw(made, concepts, count=seeds, key=None):
        return drawn(
            world, made, [(world.prompt(c), c, n) for c in concepts for n in range(count)], sampling_steps, key
        )

    def with_keys(made):
        return torch.cat([draw(made, [c], key_seeds, made.key(c)) for c in erased])

    def measure(made):
        moved = sum((tensor - theta[name].to(tensor)).square().sum() for name, tensor in made.delta.items())
        return {
            "hidden": seen(draw(made, erased), erased, seeds),
            "with the key": seen(with_keys(made), erased, key_seeds),
            "kept": seen(draw(made, kept), kept, seeds),
            "moved": round(moved.sqrt().item(), 4),
        }, None

    runs = []
    for seed, arm, steps in tqdm(list(product(range(training_seeds), arms, at)), desc="stability"):
        config = configured(world, "kpop", seed, sampling_steps, strength["settings"] | ARMS[arm], steps)
        numbers, _ = hidden(
            "stability", world, erased, "kpop", config, 1.0, measure, split, seeds, key_seeds, sampling_steps
        )
        runs.append({"arm": arm, "training_seed": seed, "step": steps} | numbers)
    base = {"concepts": seen(draw(None, erased), erased, seeds), "kept": seen(draw(None, kept), kept, seeds)}
    return {
        "N": seeds,
        "seeds": [0, seeds - 1],
        "training_seeds": training_seeds,
        "reading": config.reading,
        "split": split,
        "base": base,
        "runs": runs,
    }, {}
