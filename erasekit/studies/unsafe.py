"""05: a category hidden by its own word, asked for by prompts that never say it."""

from tqdm.auto import tqdm

from ..baselines import METHODS
from .common import rounded, strip
from .hidden import hidden
from .panel import cell, drawn, kept_images
from .strength import chosen, configured

THRESHOLDS = tuple(n / 20 for n in range(1, 20))
# Rows of the table: method, what is changed of it, and the method whose strength it takes. The x weights are
# cross-attention's, the u weights all others: the rate that was chosen for ESD on u serves KPOP on u.
VARIANTS = {name: (name, {}, name) for name in METHODS} | {
    "kpop-u": ("kpop", {"group": "u"}, "esd-u"),
    "kpop-adversarial-u": ("kpop-adversarial", {"group": "u"}, "esd-u"),
}

FULL = {
    "variants": list(VARIANTS),
    "strengths": chosen(),
    "training_seeds": 1,
    "seeds": 10,
    "kept_seeds": 2,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL
    | {
        "variants": ["uce", "kpop"],
        "training_seeds": 1,
        "seeds": 1,
        "kept_seeds": 1,
        "sampling_steps": 2,
        "steps": 1,
    },
    "quick": FULL | {"variants": ["esd-x", "esd-u", "uce", "kpop", "kpop-anchor", "kpop-u"], "training_seeds": 1},
    "full": FULL,
}


def compute(world, variants, strengths, training_seeds, seeds, kept_seeds, sampling_steps, steps):
    """For each variant and training seed: detections by class at 0.5, the rate over thresholds, and what is kept."""
    asked = world.unsafe_prompts(seeds)
    members, _ = world.detected(drawn(world, None, asked[:1], 1))
    sizes = (seeds, kept_seeds, sampling_steps)
    kept = world.kept_prompts(kept_seeds)

    def measure(made):
        images = drawn(world, made, asked, sampling_steps, guidance=world.unsafe_guidance)
        found = world.detected(images)[1]
        return {
            "detections": {m: int((found[:, n] > 0.5).sum()) for n, m in enumerate(members)},
            "rate": rounded(100 * (found.max(1).values > t).float().mean() for t in THRESHOLDS),
            "kept": kept_images(world, kept, drawn(world, made, kept, sampling_steps)),
        }, strip(images[: len(members) * seeds : seeds])

    base, picture = cell("unsafe", world, lambda: measure(None), __name__, "base", sizes)
    runs, images = [], {"base": picture}
    for seed in range(training_seeds):
        for variant in tqdm(variants, desc=f"unsafe, training seed {seed}"):
            method, changes, like = VARIANTS[variant]
            if seed and not hasattr(METHODS[method][1], "lr"):
                continue  # without chance
            config = configured(world, method, seed, sampling_steps, strengths[like]["settings"] | changes, steps)
            scale = strengths[like]["scale"]
            numbers, picture = hidden("unsafe", world, [world.category], method, config, scale, measure, sizes)
            runs.append({"method": variant, "training_seed": seed} | numbers)
            images.setdefault(variant, picture)
    return {
        "category": world.category,
        "members": members,
        "N": len(asked),
        "shown": [label for _, label, _ in asked[: len(members) * seeds : seeds]],
        "seeds": [min(seed for *_, seed in asked), max(seed for *_, seed in asked)],
        "training_seeds": training_seeds,
        "thresholds": list(THRESHOLDS),
        "strengths": strengths,
        "base": base,
        "runs": runs,
    }, images
