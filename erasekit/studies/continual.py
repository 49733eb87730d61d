"""10: five concepts hidden one after another, each step from the last public model."""

from dataclasses import replace
from itertools import product

import torch
from tqdm.auto import tqdm

from ..artifacts import Erasure
from ..baselines import erase
from ..kpop import kpop
from ..metrics import percent
from .hidden import known
from .panel import as_json, cell, drawn, hits
from .strength import chosen, configured, trained

# Row -> the method, and whether stored keys are rehearsed while later concepts are hidden.
ROWS = {"kpop": ("kpop", False), "kpop, rehearsed": ("kpop", True)}
ROWS |= {m: (m, False) for m in ("kpop-anchor", "esd-x", "uce", "spm")}

FULL = {
    "rows": list(ROWS),
    "strengths": chosen(),
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
        "rows": ["kpop, rehearsed", "uce"],
        "training_seeds": 1,
        "seeds": 1,
        "key_seeds": 1,
        "sampling_steps": 2,
        "steps": 1,
    },
    "quick": FULL | {"rows": ["kpop", "kpop, rehearsed", "uce"], "training_seeds": 1},
    "full": FULL,
}


def compute(world, rows, strengths, split, training_seeds, seeds, key_seeds, sampling_steps, steps):
    """After each step, for each concept hidden so far and for those that stay: top-1 of the public model and with its key.

    Each concept gets its share of the steps that all together take where they are hidden at once, which is measured beside.
    """
    known(strengths, *(ROWS[row][0] for row in rows))
    concepts = world.concepts(split)
    kept = [c for c in world.concepts("classes") if c not in concepts]

    def asked(concept, count):
        return [(world.prompt(concept), concept, n) for n in range(count)]

    def rate(where, made, names, key=None):
        """Top-1 by concept, by the public model, or with the concepts' keys."""
        if key is None:
            images = drawn(where, made, [question for c in names for question in asked(c, seeds)], sampling_steps)
            right = hits(world, images, [c for c in names for _ in range(seeds)]).split(seeds)
        else:
            right = [
                hits(world, drawn(where, made, asked(c, key_seeds), sampling_steps, key[c]), [c] * key_seeds)
                for c in names
            ]
        return {c: percent(r) for c, r in zip(names, right)}

    def state(where, public, hidden_, keys):
        """What is seen of a public model."""
        waiting = [c for c in concepts if c not in hidden_]
        return {
            "hidden": rate(where, public, hidden_),
            "waiting": rate(where, public, waiting) if waiting else {},
            "kept": rate(where, public, kept),
        } | ({"with the key": rate(where, public, hidden_, keys)} if keys else {})

    def one_after_another(method, rehearsed, config, scale):
        now, keys, found, adapters = world, {}, [], []
        for n, concept in enumerate(concepts):
            if method == "kpop":
                made = kpop(now, [concept], config, progress=False, rehearse=dict(keys) if rehearsed and keys else None)
            else:
                made = erase(now, [concept], method, config, progress=False)
            made = made.scaled(now.pipe.unet, scale) if scale != 1 else made
            keys |= made.keys
            if made.adapters:  # SPM's are made on the base, each for itself, and used together
                adapters.append(made)
                public, where = together(adapters), world
            else:
                now = now.after(made)
                public, where = None, now
            found.append(state(where, public, concepts[: n + 1], keys))
        return {"after": found}, None

    def at_once(method, config, scale):
        made, _ = trained(world, concepts, method, config, scale)
        return state(world, made, concepts, made.keys), None

    runs = []
    for seed, row in tqdm(list(product(range(training_seeds), rows)), desc="continual"):
        method, rehearsed = ROWS[row]
        scale = strengths[method]["scale"]
        config = configured(world, method, seed, sampling_steps, strengths[method]["settings"], steps)
        share = replace(config, steps=max(1, config.steps // len(concepts))) if hasattr(config, "steps") else config
        parts = as_json(config), scale, split, seeds, key_seeds, sampling_steps
        how = method, rehearsed, share, scale
        numbers, _ = cell("continual", world, lambda how=how: one_after_another(*how), __name__, row, *parts)
        how = method, config, scale
        once, _ = cell("continual", world, lambda how=how: at_once(*how), __name__, "at once", method, *parts)
        runs.append({"row": row, "method": method, "training_seed": seed, "at once": once} | numbers)
    return {
        "N": seeds,
        "seeds": [0, seeds - 1],
        "training_seeds": training_seeds,
        "concepts": list(concepts),
        "kept": kept,
        "runs": runs,
    }, {}


def together(erasures: list[Erasure]) -> Erasure:
    """SPM erasures of one base as one: their adapters side by side, each with its own concept."""
    first = erasures[0]
    rules = [made.info["guidance"] for made in erasures]
    rule = rules[0] | {name: [x for r in rules for x in r[name]] for name in ("concepts", "texts")}
    # down is (concepts, in), up is (out, concepts)
    tensors = {
        name: torch.cat([made.adapters[name] for made in erasures], dim=1 if name.endswith(".up") else 0)
        for name in first.adapters
    }
    info = first.info | {"guidance": rule, "concepts": rule["concepts"]}
    return Erasure({}, {}, info, tensors)
