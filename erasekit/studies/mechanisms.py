"""07: how the prompt enters attention, what makes it, and how much removal holds on to it."""

from itertools import product

from tqdm.auto import tqdm

from ..losses import READINGS
from ..mechanisms import CHOICES
from .hidden import hidden, known
from .panel import opened, rates
from .strength import chosen, configured

TUNING_SEED = (
    100  # of the trainings that choose learning rates; images without a key start at that seed too, with one at 0
)

FULL = {
    "mechanisms": list(CHOICES),
    "prompt_lrs": [1e-2, 3e-2, 1e-1],  # each mechanism's own is chosen on concepts that no table reports
    "weights": [0.1, 0.3, 1.0, 3.0],  # lambda, or b in the adversarial reading
    "step_scales": [0.6, 0.8, 1.0],
    "readings": list(READINGS),
    "untaught": 2,  # concepts that the network makes a key for and was not trained on
    "strength": chosen().get("kpop"),
    "split": "S1",
    "training_seeds": 1,
    "seeds": 10,
    "key_seeds": 10,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL
    | {
        "mechanisms": ["network"],
        "prompt_lrs": [3e-2],
        "weights": [1.0],
        "readings": ["recoverable"],
        "step_scales": [1.0],
        "training_seeds": 1,
        "seeds": 1,
        "key_seeds": 1,
        "sampling_steps": 2,
        "steps": 1,
    },
    "quick": FULL
    | {
        "mechanisms": ["shared", "added", "network"],
        "prompt_lrs": [3e-2],
        "weights": [0.1, 1.0],
        "training_seeds": 1,
    },
    "full": FULL,
}


def compute(
    world,
    mechanisms,
    prompt_lrs,
    weights,
    step_scales,
    readings,
    untaught,
    strength,
    split,
    training_seeds,
    seeds,
    key_seeds,
    sampling_steps,
    steps,
):
    """ESR, PSR and what the keys bring back, in percent, for each mechanism, each weight, and for keys not taught.

    Each training is seen at several scales of its step, so that they can be compared at the same erasure.
    """
    known({"kpop": strength}, "kpop")
    erased = world.concepts(split)
    kept = [c for c in world.concepts("classes") if c not in erased]
    asked = [(world.prompt(c), c, seed) for c in (*erased, *kept) for seed in range(seeds)]
    taught, others = erased[: len(erased) - untaught], erased[len(erased) - untaught :]
    sizes = (step_scales, split, untaught, seeds, key_seeds, sampling_steps)

    def measure(made):
        points = []
        for scale in step_scales:
            there = made.scaled(world.pipe.unet, scale)
            point = {"scale": scale} | rates(world, there, asked, len(erased) * seeds, sampling_steps)
            open_ = {c: opened(world, there, [c], key_seeds, sampling_steps) for c in erased}
            for name, concepts in (("with the key", erased), ("key, taught", taught), ("key, untaught", others)):
                point[name] = round(sum(open_[c] for c in concepts) / max(1, len(concepts)), 1)
            points.append(point)
        numbers = sum(key.k.numel() + key.v.numel() for key in made.keys.values()) // len(made.keys)
        return {"points": points, "numbers of a key": numbers}, None

    def run(seed, **changes):
        settings = strength["settings"] | changes
        config = configured(world, "kpop", seed, sampling_steps, settings, steps)
        return hidden("mechanisms", world, erased, "kpop", config, 1.0, measure, *sizes)[0]

    tuning = world.concepts("tuning")
    tuned = [
        (world.prompt(c), c, TUNING_SEED + n) for c in tuning + world.concepts("tuning kept") for n in range(seeds)
    ]

    def tune(made):
        found = rates(world, made, tuned, len(tuning) * seeds, sampling_steps)
        return found | {"with the key": opened(world, made, tuning, key_seeds, sampling_steps)}, None

    sweep = []
    for mechanism, lr in tqdm(list(product(mechanisms, prompt_lrs)), desc="prompt learning rates"):
        changes = {"mechanism": mechanism, "prompt_lr": lr}
        config = configured(world, "kpop", TUNING_SEED, sampling_steps, strength["settings"] | changes, steps)
        how = "mechanisms", world, tuning, "kpop", config, 1.0, tune
        sweep.append(changes | hidden(*how, "tuning", seeds, key_seeds, sampling_steps)[0])
    best = {m: choose([row for row in sweep if row["mechanism"] == m]) for m in mechanisms}

    wanted = [{"mechanism": m, "prompt_lr": best[m]} for m in mechanisms]
    wanted += [
        {"mechanism": m, "prompt_lr": best[m], "taught": taught} for m in ("shared", "network") if m in mechanisms
    ]
    wanted += [{"reading": r, "lam": lam} for r, lam in product(readings, weights)]
    runs = [
        {"changes": {k: list(v) if isinstance(v, tuple) else v for k, v in changes.items()}, "training_seed": seed}
        | run(seed, **changes)
        for seed, changes in tqdm(list(product(range(training_seeds), wanted)), desc="mechanisms")
    ]
    return {
        "N": seeds,
        "seeds": [0, seeds - 1],
        "training_seeds": training_seeds,
        "split": split,
        "taught": list(taught),
        "untaught": list(others),
        "strength": strength,
        "sweep": sweep,
        "runs": runs,
    }, {}


def choose(sweep: list[dict]) -> float:
    """The learning rate whose keys bring back most; of equals, the one whose model erases and keeps more."""
    return max(sweep, key=lambda row: (row["with the key"], row["ESR-1"] + row["PSR-1"]))["prompt_lr"]
