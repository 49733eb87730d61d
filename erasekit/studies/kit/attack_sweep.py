"""Learning rates of attacks, chosen on concepts and seeds that no table reports; and tables of success rates."""

from dataclasses import replace
from itertools import product

from .erasures import make_config, measured

VERSION = 1  # raise when the numbers should change
TUNING_SEED = 100  # of training and attack; the seeds of the images start there too


def sweep_learning_rates(
    world,
    methods: list[str],
    operating_points: dict,
    lrs: list[float],
    attacks: list[str],
    attack,
    count: int,
    seeds: int,
    sampling_steps: int,
    training_steps: int | None = None,
) -> list[dict]:
    """Success rate in percent by method, attack, learning rate and budget.

    Each method erases the tuning objects, and the first of them is attacked with `count` images.
    """
    from ...evaluation.attack_success import ATTACKS, success_rate
    from ...evaluation.attacks import attack_images

    tuning, rows = world.concepts("tuning"), []
    concept = tuning[0]
    for method, name in product(methods, attacks):
        search, before = ATTACKS[name]

        def measure(erasure, name=name, search=search, before=before):
            images, found = attack_images(world, concept, count, TUNING_SEED), []
            for lr in lrs:
                results = search(world, erasure, concept, images, replace(attack, lr=lr, seed=TUNING_SEED))
                for steps, result in results.items():
                    rate = success_rate(world, erasure, concept, seeds, sampling_steps, result, before, TUNING_SEED)
                    found.append({"attack": name, "lr": lr, "steps": steps, "rate": rate})
            return {"rows": found}, None

        point = operating_points[method]
        config = make_config(world, method, TUNING_SEED, sampling_steps, point["settings"], training_steps)
        parts = name, lrs, list(attack.budgets), count, seeds, sampling_steps
        numbers, _ = measured("attack_sweep", VERSION, world, tuning, method, config, point["scale"], measure, *parts)
        rows += [{"method": method} | row for row in numbers["rows"]]
    return rows


def best_lr(sweep: list[dict], attack: str) -> float:
    """The learning rate with the highest success at the largest budget, over methods; of equals, over all budgets."""
    own, largest = [row for row in sweep if row["attack"] == attack], max(row["steps"] for row in sweep)

    def success(lr):
        rates = [(row["steps"], row["rate"]) for row in own if row["lr"] == lr]
        return sum(rate for steps, rate in rates if steps == largest), sum(rate for _, rate in rates)

    return max(dict.fromkeys(row["lr"] for row in own), key=success)


def rate_table(frame, images: int, index, columns: str):
    """Mean of the column "rate" in each cell; in brackets its 95 % interval over rows and their images, see `bootstrap`."""
    from ...evaluation.intervals import bootstrap

    def cell(rates) -> str:
        low, high = bootstrap([rates.to_numpy()], images)
        return f"{rates.mean():.1f} ({low:.0f} to {high:.0f})"

    return frame.pivot_table(index=index, columns=columns, values="rate", aggfunc=cell, sort=False)
