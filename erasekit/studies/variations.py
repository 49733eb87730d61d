"""04: what of KPOP moves the frontier. One setting varied at a time, on concepts and seeds that no table reports."""

from tqdm.auto import tqdm

from .panel import as_json, cell, opened, rates
from .strength import configured, halves, trained

# Row -> method, and what is changed of the strong setting its curve starts from.
STRONG = {"kpop": {"lr": 2e-4}, "kpop-anchor": {"lr": 2e-4}, "esd-x": {"lr": 2e-4}}
STRONG |= {"ca": {"lr": 4e-4}, "spm": {"anchor_weight": 30.0}}
VARIATIONS = {
    "kpop": ("kpop", {}),
    "transfer steps 2": ("kpop", {"transfer_steps": 2}),
    "lambda 0.3": ("kpop", {"lam": 0.3}),
    "lambda 3": ("kpop", {"lam": 3.0}),
    "m 3": ("kpop", {"m": 3}),
    "place mid": ("kpop", {"place": "mid"}),
    "place mid+up": ("kpop", {"place": "mid+up"}),
    "retain weight 3": ("kpop", {"retain_weight": 3.0}),
    "error on x0": ("kpop", {"error": "x0"}),
    "eta 2": ("kpop", {"eta": 2.0}),
    "lambda 0.3, eta 2": ("kpop", {"lam": 0.3, "eta": 2.0}),
    "keys and values": ("kpop", {"group": "kv"}),
    "twice the steps": ("kpop", {"steps": 300, "lr": 1e-4}),
    "anchor": ("kpop-anchor", {}),
    "anchor, no prompt": ("kpop-anchor", {"lam": 0.0, "transfer_steps": 0}),
    "esd-x": ("esd-x", {}),
    "esd-x, eta 2": ("esd-x", {"eta": 2.0}),
    "ca": ("ca", {}),
    "spm": ("spm", {}),
    "spm, always open": ("spm", {"transport": False}),
}

FULL = {
    "variations": list(VARIATIONS),
    "scales": [0.7, 0.85, 1.0, 1.2],
    "seeds": 10,
    "first_seed": 1000,
    "key_seeds": 4,
    "training_seed": 100,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL
    | {"variations": ["kpop", "spm"], "scales": [1.0], "seeds": 1, "key_seeds": 1, "sampling_steps": 2, "steps": 1},
    "quick": FULL | {"variations": ["kpop", "anchor"], "scales": [0.85, 1.0], "seeds": 5},
    "full": FULL,
}


def compute(world, variations, scales, seeds, first_seed, key_seeds, training_seed, sampling_steps, steps):
    """ESR-1, ESR-5 and PSR-1 in percent along theta + scale (theta' - theta), a curve from one training."""
    runs = []
    for name in tqdm(variations, desc="variations"):
        method, changes = VARIATIONS[name]
        config = configured(world, method, training_seed, sampling_steps, STRONG[method] | changes, steps)
        for gone, kept in halves(world):

            def measure(method=method, config=config, gone=gone, kept=kept):
                made, _ = trained(world, gone, method, config)
                found = {}
                if made.keys:
                    found["with the key"] = opened(world, made, gone, key_seeds, sampling_steps)
                seen = range(first_seed, first_seed + seeds)
                asked = [(world.prompt(c), c, seed) for c in gone + kept for seed in seen]
                found["curve"] = [
                    {"scale": scale}
                    | rates(world, made.scaled(world.pipe.unet, scale), asked, len(gone) * seeds, sampling_steps)
                    for scale in scales
                ]
                return found, None

            parts = method, as_json(config), gone, kept, scales, seeds, first_seed, key_seeds, sampling_steps
            found, _ = cell("variations", world, measure, __name__, *parts)
            runs.append({"variation": name, "method": method, "erased": list(gone)} | found)
    data = {"N": seeds, "seeds": [first_seed, first_seed + seeds - 1], "training_seed": training_seed, "runs": runs}
    return data, {}
