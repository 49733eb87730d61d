"""04, before the comparison: every method at several strengths, on concepts and seeds that no table reports."""

import time
from dataclasses import fields

from tqdm.auto import tqdm

from ..baselines import METHODS, erase, settings
from ..paths import RECORDS
from ..results import Record
from ..worlds import RETAINED, TUNING, TUNING_KEPT
from .panel import as_json, cell, rates

RATES = tuple({"lr": lr} for lr in (1e-4, 1.4e-4, 2e-4, 4e-4))
# From gentle to strong. Methods that train the weights themselves share one sweep of the learning rate; the others are swept
# around the setting that does something here.
SWEEP = {
    "esd-x": RATES,
    "esd-u": RATES,
    "ca": tuple({"lr": lr} for lr in (1e-4, 2e-4, 4e-4, 1e-3)),
    "uce": tuple({"lam": lam} for lam in (5000.0, 500.0, 350.0, 200.0, 50.0)),
    "rece": tuple({"lam": lam, "round_lam": lam, "rounds": 1} for lam in (5000.0, 2000.0, 1000.0, 500.0)),
    "sld": ({"level": "medium"}, {"level": "strong"}, {"level": "max"}),
    "np": ({},),
    "mace": tuple({"lam": lam} for lam in (1000.0, 300.0, 100.0, 10.0)),
    "spm": tuple({"anchor_weight": weight} for weight in (100.0, 30.0, 10.0, 1.0)),
    "receler": ({"lr": 1e-3}, {"lr": 2e-3}, {"lr": 4e-3}),
    "eap": RATES,
    "age": RATES,
    "kpop": RATES,
    "kpop-anchor": RATES,
    "kpop-adversarial": RATES,
}
ENOUGH = 95.0  # ESR-1 in percent at which methods are compared

FULL = {
    "methods": list(SWEEP),
    "seeds": 10,
    "first_seed": 1000,
    "training_seed": 100,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL | {"methods": ["uce", "kpop"], "seeds": 1, "sampling_steps": 2, "steps": 1},
    "quick": FULL | {"methods": ["uce", "kpop"]},
    "full": FULL,
}


def compute(world, methods, seeds, first_seed, training_seed, sampling_steps, steps):
    """For each method and strength: ESR-1, ESR-5, PSR-1, in percent, and the strength the comparison takes."""
    wanted = [(method, changes) for method in methods for changes in SWEEP[method]]
    asked = [(world.prompt(c), c, seed) for c in TUNING + TUNING_KEPT for seed in range(first_seed, first_seed + seeds)]
    erased = len(TUNING) * seeds
    runs = []
    for method, changes in tqdm(wanted, desc="strengths"):
        config = configured(method, RETAINED, training_seed, sampling_steps, changes, steps)

        def measure(method=method, config=config):
            began = time.time()
            made = erase(world, list(TUNING), method, config, progress=False)
            seconds = round(time.time() - began, 1)
            return rates(world, made, asked, erased, sampling_steps) | {"seconds": seconds}, None

        module = METHODS[method][0].__module__
        found, _ = cell("strength", world, measure, module, method, as_json(config), seeds, first_seed, sampling_steps)
        runs.append({"method": method, "strength": changes} | found)
    data = {
        "N": seeds,
        "seeds": [first_seed, first_seed + seeds - 1],
        "erased": list(TUNING),
        "kept": list(TUNING_KEPT),
        "runs": runs,
        "chosen": {m: choose([r for r in runs if r["method"] == m]) for m in methods},
    }
    return data, {}


def configured(
    method: str, retain: tuple[str, ...], seed: int, sampling_steps: int, changes: dict, steps: int | None = None
):
    """A method's settings, with those that all methods of a study share where the method has them."""
    shared = {"retain": retain, "seed": seed, "sampling_steps": sampling_steps} | ({"steps": steps} if steps else {})
    has = {field.name for field in fields(METHODS[method][1])}
    return settings(method, **{k: v for k, v in shared.items() if k in has} | changes)


def choose(runs: list[dict]) -> dict:
    """The gentlest strength that erases enough; where none does, the one that erases most, the gentler of two equals."""
    enough = [run for run in runs if run["ESR-1"] >= ENOUGH]
    return (enough or [max(runs, key=lambda run: run["ESR-1"])])[0]["strength"]


def chosen() -> dict[str, dict]:
    """Each method's strength by the committed sweep over all methods. Empty where there is none yet."""
    path = RECORDS / "emojinette" / "full" / "strength.json"
    return Record.read(path).data["chosen"] if path.exists() else {}
