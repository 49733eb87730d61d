"""07: can one network open what it was never taught? Twenty concepts are hidden at once, and it is trained on sixteen."""

from tqdm.auto import tqdm

from ..metrics import percent
from ..paths import RECORDS
from ..results import Record
from .hidden import hidden, known
from .mechanisms import choose
from .panel import drawn, hits, opened
from .strength import chosen, configured

EVERY = 5  # of the hidden concepts, in order, each fifth is not taught


def tuned() -> dict[str, float]:
    """Each mechanism's prompt learning rate, as the committed record of "mechanisms" chose it. Empty where there is none."""
    path = RECORDS / "emojinette" / "full" / "mechanisms.json"
    sweep = Record.read(path).data["sweep"] if path.exists() else []
    mechanisms = dict.fromkeys(row["mechanism"] for row in sweep)
    return {name: choose([row for row in sweep if row["mechanism"] == name]) for name in mechanisms}


FULL = {
    "mechanisms": ["shared", "network"],
    "strength": chosen().get("kpop"),
    "prompt_lrs": tuned(),
    "others": 10,  # hidden beside the ten classes
    "training_seed": 0,
    "training_steps": 300,
    "seeds": 5,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL | {"mechanisms": ["network"], "others": 0, "seeds": 1, "sampling_steps": 2, "steps": 1},
    "quick": FULL | {"mechanisms": ["network"]},
    "full": FULL,
}


def compute(
    world,
    mechanisms,
    strength,
    prompt_lrs,
    others,
    training_seed,
    training_steps,
    seeds,
    sampling_steps,
    steps,
):
    """ESR-1 over all that is hidden, what keys open of it, taught and not, and the top-1 of what stays, in percent."""
    known({"kpop": strength}, "kpop")
    rest = world.bystanders("classes")
    concepts = (*world.concepts("classes"), *rest[:: len(rest) // max(1, others)][:others])
    untaught = concepts[EVERY - 1 :: EVERY]
    taught = tuple(c for c in concepts if c not in untaught)
    kept = [c for c in rest if c not in concepts]

    def rate(made, names, count):
        asked = [(world.prompt(c), c, n) for c in names for n in range(count)]
        return percent(hits(world, drawn(world, made, asked, sampling_steps), [c for _, c, _ in asked]))

    def measure(made):
        return {
            "ESR-1": round(100 - rate(made, concepts, seeds), 1),
            "kept": rate(made, kept, 1),
            "key, taught": opened(world, made, taught, seeds, sampling_steps),
            "key, untaught": opened(world, made, untaught, seeds, sampling_steps),
        }, None

    runs = []
    for mechanism in tqdm(mechanisms, desc="crowd"):
        changes = {"mechanism": mechanism, "prompt_lr": prompt_lrs.get(mechanism, 3e-2), "taught": taught}
        settings = strength["settings"] | changes | {"steps": steps or training_steps}
        config = configured(world, "kpop", training_seed, sampling_steps, settings)
        how = "kpop", config, strength["scale"], measure, seeds, sampling_steps
        runs.append({"mechanism": mechanism} | hidden("crowd", world, list(concepts), *how)[0])
    about = {"N": seeds, "seeds": [0, seeds - 1], "training_seeds": 1, "kept": len(kept)}
    return about | {"taught": list(taught), "untaught": list(untaught), "runs": runs}, {}
