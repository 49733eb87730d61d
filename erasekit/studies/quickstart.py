"""00: hide one concept, look at it before, hidden and with its key, and at unrelated concepts before and after."""

from dataclasses import asdict

from ..artifacts import key_path
from ..kpop import kpop
from ..metrics import object_rate, percent
from ..paths import BUILD
from .common import draw, erasure, strip
from .strength import configured

QUICK = {
    "concept": "church",
    "unrelated": ["dog", "fish", "parachute"],
    "seeds": 8,
    "steps": 150,
    "batch": 8,
    "sampling_steps": 25,
}
SCALES = {
    "smoke": QUICK | {"seeds": 1, "steps": 2, "batch": 2, "sampling_steps": 3},
    "quick": QUICK,
    "full": QUICK | {"seeds": 50},
}


def compute(world, concept, unrelated, seeds, steps, batch, sampling_steps):
    """Train, save the public delta and the private key under build/, draw, judge."""
    unrelated = [c for c in unrelated if c != concept]
    world.check([concept, *unrelated])
    config = configured(world, "kpop", 0, sampling_steps, {"steps": steps, "batch": batch})
    seeds = list(range(seeds))
    concepts = [concept, *unrelated]
    base, labels = draw(world, concepts, seeds, bar="base", steps=sampling_steps)
    made, seconds = erasure(world, [concept], config, kpop, fresh=True)
    folder = BUILD / "quickstart" / concept.replace(" ", "-")
    made.save(folder)
    with made.applied(world.pipe.unet):
        hidden, _ = draw(world, concepts, seeds, bar="hidden", steps=sampling_steps)
        keyed, _ = draw(world, [concept], seeds, key=made.key(concept), bar="with the key", steps=sampling_steps)

    def rate(images, labels):
        return percent(object_rate(world, images, labels))

    n = len(seeds)
    data = {
        "concept": concept,
        "N": n,
        "seeds": [seeds[0], seeds[-1]],
        "reading": config.reading,
        "training": asdict(config),
        "training_seconds": round(seconds, 1),
        "top1": {
            c: {"base": rate(base[i : i + n], labels[i : i + n]), "hidden": rate(hidden[i : i + n], labels[i : i + n])}
            for i, c in zip(range(0, len(labels), n), concepts)
        },
        "saved": {
            "public": f"{folder.name}/delta.safetensors",
            "private": key_path(folder, concept).relative_to(folder.parent).as_posix(),
        },
    }
    data["top1"][concept]["key"] = rate(keyed, labels[:n])
    shown = [i for start in range(0, len(labels), n) for i in range(start, start + min(n, 4 if start == 0 else 2))]
    return data, {"base": strip(base[shown]), "hidden": strip(hidden[shown]), "key": strip(keyed[: min(n, 4)])}
