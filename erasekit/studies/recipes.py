"""13: our recipe against the paper's, which rolls a trajectory for every step: what each spends, and what it does."""

from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm.auto import tqdm

from ..baselines import erase
from ..counting import counted, spending
from ..metrics import percent
from .panel import as_json, cell, drawn, hits, opened, rates
from .strength import choose, configured, halves

# Recipe -> method, its settings, and the numbers of steps after which it is looked at. The paper's: 1,000 steps of batch 1,
# each on a trajectory of its own; ESD-x retains nothing, as published. Ours: both stages at once, on about as many samples as the
# paper's, from many short trajectories of what is erased, and a few of what is retained. Everything else, from the prompt's
# place to the retained objects, sampler and judges, is the same for all.
OURS = {"stages": "joint", "rolled": 40, "rolled_retained": 8, "roll_steps": 4, "batch": 8}
PAPER = {"recipe": "paper", "batch": 1}
RECIPES = {
    "kpop, ours": ("kpop", OURS, [20, 60, 140]),
    "kpop, paper's recipe": ("kpop", PAPER, [100, 300, 1000]),
    "esd-x, paper's recipe": ("esd-x", PAPER | {"retain": ()}, [100, 300, 1000]),
}
REFERENCE = "kpop, paper's recipe"
TUNING_SEED = 100  # of the trainings that choose rates and scales
TUNING_IMAGES = 1000  # the first seed of their images

FULL = {
    "recipes": list(RECIPES),
    "lrs": {name: [4e-4, 8e-4, 1.6e-3] if "ours" in name else [3e-5, 1e-4, 3e-4] for name in RECIPES},
    # Coarser for the reference, of which a training takes half an hour of a core.
    "step_scales": {
        name: [0.6, 0.7, 0.8, 0.9, 1.0] if name == REFERENCE else [0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
        for name in RECIPES
    },
    # ESR-5 in percent asked of each recipe while tuning, so that costs are of the same erasure. ESR-1 is 100 for too many
    # settings to tell them apart.
    "enough": 94.0,
    "splits": ["S1", "S3"],
    "curves": {name: [0.6, 0.7, 0.8, 0.9, 1.0] for name in ("kpop, ours", "esd-x, paper's recipe")},
    "training_seeds": 3,
    "seeds": 10,
    "key_seeds": 4,
    "sampling_steps": 8,
    "at": {name: at for name, (_, _, at) in RECIPES.items()},
}
SCALES = {
    "smoke": FULL
    | {
        "recipes": ["kpop, ours", REFERENCE],
        "lrs": {name: [1e-3] for name in RECIPES},
        "step_scales": {name: [1.0] for name in RECIPES},
        "splits": ["S1"],
        "training_seeds": 1,
        "seeds": 1,
        "key_seeds": 1,
        "sampling_steps": 2,
        "curves": {"kpop, ours": [0.5]},
        "at": {name: [1] for name in RECIPES},
    },
    "quick": FULL | {"recipes": ["kpop, ours"], "splits": ["S1"], "training_seeds": 1},
    "full": FULL,
}


def compute(
    world, recipes, lrs, step_scales, enough, splits, curves, training_seeds, seeds, key_seeds, sampling_steps, at
):
    """Along each training: evaluations of the U-Net and seconds so far, ESR and PSR in percent, and what the keys open.

    The ends of `curves`' recipes are also seen at other scales of the step, with how many of the objects that no recipe is told
    about are still recognised, one image each: who keeps more at the same erasure does not hang on the scale that was chosen.

    Learning rate and scale of the step are chosen for each recipe at its full length, on one half of the tuning objects: of those
    with an ESR-5 of `enough`, the one that keeps most (`strength.choose`). They are then the same for every split, training seed
    and number of steps: what is seen along the way is that training stopped earlier, not the best of that length.
    """

    def trained(name, concepts, seed, lr, stops):
        """(steps, what was spent so far, erasure) at each number of steps of one training; it pays for its own pool."""
        method, changes, _ = RECIPES[name]
        world.trajectories.clear()
        spent = {"evaluations": 0, "with gradient": 0, "seconds": 0.0}
        with TemporaryDirectory() as folder:
            for steps in stops:
                config = configured(world, method, seed, sampling_steps, changes | {"lr": lr, "steps": steps})
                with spending(world.pipe.device) as now, counted(world.pipe.unet) as count:
                    how = {"checkpoint": Path(folder) / "training.safetensors", "progress": False}
                    made = erase(world, list(concepts), method, config, **how)
                spent = {
                    "evaluations": spent["evaluations"] + count.evaluations,
                    "with gradient": spent["with gradient"] + count.with_gradient,
                    "seconds": round(spent["seconds"] + now.seconds, 1),
                }
                yield steps, spent, made

    def seen(made, erased, kept, first_seed):
        asked = [(world.prompt(c), c, first_seed + n) for c in (*erased, *kept) for n in range(seeds)]
        found = rates(world, made, asked, len(erased) * seeds, sampling_steps)
        if not made.keys:
            return found
        return found | {"with the key": opened(world, made, erased, key_seeds, sampling_steps, first_seed)}

    others = world.bystanders("classes")
    sizes = seeds, key_seeds, sampling_steps
    sweep, taken = [], {}
    for name, lr in tqdm([(recipe, lr) for recipe in recipes for lr in lrs[recipe]], desc="learning rates"):

        def tune(name=name, lr=lr, scales=step_scales[name]):
            gone, kept = halves(world)[0]
            *_, (_, spent, made) = trained(name, gone, TUNING_SEED, lr, at[name][-1:])
            scaled = {scale: made.scaled(world.pipe.unet, scale) for scale in scales}
            return [
                {"scale": scale} | seen(made, gone, kept, TUNING_IMAGES) | spent for scale, made in scaled.items()
            ], None

        parts = name, as_json(config_of(world, name, lr, at[name][-1])), step_scales[name], *sizes
        points, _ = cell("recipes", world, tune, __name__, "tuning", *parts)
        sweep += [{"recipe": name, "settings": {"lr": lr}} | point for point in points]
    for name in recipes:
        rows = [row for row in sweep if row["recipe"] == name]
        taken[name] = choose([row for row in rows if row["ESR-5"] >= enough] or rows)

    runs = []
    for seed, name, split in tqdm(list(product(range(training_seeds), recipes, splits)), desc="recipes"):
        lr, scale = taken[name]["settings"]["lr"], taken[name]["scale"]
        erased = world.concepts(split)
        kept = [c for c in world.concepts("classes") if c not in erased]
        seen_at = sorted({*curves[name], scale}) if name in curves else []

        def along(name=name, seed=seed, lr=lr, scale=scale, erased=erased, kept=kept, seen_at=seen_at):
            points, curve = [], []
            for steps, spent, made in trained(name, erased, seed, lr, at[name]):
                points.append({"steps": steps} | spent | seen(made.scaled(world.pipe.unet, scale), erased, kept, 0))
            for each in seen_at:
                there = made.scaled(world.pipe.unet, each)
                images = drawn(world, there, [(world.prompt(c), c, 0) for c in others], sampling_steps)
                curve.append(
                    {"scale": each} | seen(there, erased, kept, 0) | {"others": percent(hits(world, images, others))}
                )
                if each == scale:
                    points[-1]["others"] = curve[-1]["others"]
            return {"points": points, "curve": curve}, None

        parts = name, as_json(config_of(world, name, lr, at[name][-1])), at[name], seed, split, scale, *sizes
        parts += (seen_at,)
        found, _ = cell("recipes", world, along, __name__, *parts)
        runs.append({"recipe": name, "split": split, "training_seed": seed} | found)
    about = {"N": seeds, "seeds": [0, seeds - 1], "training_seeds": training_seeds, "splits": splits}
    about["sizes"] = {"others": len(others)}
    return about | {"sweep": sweep, "taken": taken, "runs": runs}, {}


def config_of(world, name: str, lr: float, steps: int):
    """The settings a recipe's cells are told apart by."""
    method, changes, _ = RECIPES[name]
    return configured(world, method, 0, 0, changes | {"lr": lr, "steps": steps})
