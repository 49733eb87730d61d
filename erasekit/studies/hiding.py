"""00: the quickstart's erasure, measured: right key, wrong keys, no key, and what else the public model still draws."""

import torch

from ..attention import Prompt
from ..checkpoints import seeded
from ..kpop import kpop
from ..metrics import object_rate, percent
from .common import draw, erasure
from .strength import configured

QUICK = {
    "concept": "church",
    "other": "dog",
    "seeds": 50,
    "steps": 150,
    "batch": 8,
    "training_seeds": 1,
    "sampling_steps": 25,
}
SCALES = {
    "smoke": QUICK | {"seeds": 1, "steps": 2, "batch": 2, "sampling_steps": 2},
    "quick": QUICK,
    "full": QUICK | {"training_seeds": 3},
}


def compute(world, concept, other, seeds, steps, batch, training_seeds, sampling_steps):
    """Top-1 of the object judge, in percent, for each way of drawing the concept and for the classes that stay."""
    world.check([concept, other])
    seeds = list(range(seeds))
    kept = [c for c in world.concepts("classes") if c != concept]
    how = {"steps": sampling_steps}

    def rates(images, labels):
        hits = object_rate(world, images, labels)
        return {c: percent(hits[[label == c for label in labels]]) for c in dict.fromkeys(labels)}

    before = rates(*draw(world, [concept, *kept], seeds, bar="base", **how))
    runs = []
    for training_seed in range(training_seeds):
        config = configured(world, "kpop", training_seed, sampling_steps, {"steps": steps, "batch": batch})
        ours, seconds = erasure(world, [concept], config, kpop)
        theirs, _ = erasure(world, [other], config, kpop)
        key = ours.key(concept)
        keys = {
            "with the key": (key, "conditional"),
            "with the key on both halves": (key, "both"),
            f"with the key of {other}": (theirs.key(other), "conditional"),
            "with a random key": (Prompt.random_like(key, seeded("random key", training_seed)), "conditional"),
        }
        with ours.applied(world.pipe.unet):
            hidden = rates(*draw(world, [concept, *kept], seeds, bar="hidden", **how))
            drawn = {
                name: rates(*draw(world, [concept], seeds, key=k, key_half=half, bar=name, **how))[concept]
                for name, (k, half) in keys.items()
            }
        moved = torch.cat([(t - p.data.cpu()).flatten() for t, p in _pairs(world, ours)])
        runs.append(
            {
                "training_seed": training_seed,
                "training_seconds": round(seconds, 1),
                "concept": {"base": before[concept], "hidden": hidden[concept]} | drawn,
                "kept": {c: {"base": before[c], "hidden": hidden[c]} for c in kept},
                "weights_moved": round(moved.norm().item(), 3),
            }
        )
    return {
        "concept": concept,
        "N": len(seeds),
        "seeds": [seeds[0], seeds[-1]],
        "reading": config.reading,
        "runs": runs,
    }, {}


def _pairs(world, erasure):
    parameters = dict(world.pipe.unet.named_parameters())
    return [(tensor, parameters[name]) for name, tensor in erasure.delta.items()]
