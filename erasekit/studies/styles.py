"""06: five house styles, one model for each: what goes, what stays, and what CLIP says of it."""

import torch
from tqdm.auto import tqdm

from ..metrics import clip_alignment, in_top, judged, perceptual_distance
from .common import strip
from .hidden import hidden
from .panel import cell, drawn, hits, kept_images
from .strength import chosen, configured
from .style_strength import SWEEP

FULL = {
    "methods": list(SWEEP),
    "strengths": chosen("style_strength"),
    "erased": ["noto", "twemoji", "openmoji", "fluent", "contrast"],
    "training_seed": 0,
    "seeds": 2,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL
    | {
        "methods": ["uce", "kpop"],
        "erased": ["noto"],
        "seeds": 1,
        "sampling_steps": 2,
        "steps": 1,
    },
    "quick": FULL | {"methods": ["uce", "kpop"], "erased": ["noto", "openmoji"]},
    "full": FULL,
}


def compute(world, methods, strengths, erased, training_seed, seeds, sampling_steps, steps):
    """For each method and erased style, each style asked for: judge, CLIP by form of the text, distance from the base."""
    styles, ten = list(world.styles), world.concepts("classes")
    asked = [(world.prompt(c, s), c, seed) for s in styles for c in ten for seed in range(seeds)]
    of = [s for s in styles for _ in ten for _ in range(seeds)]
    sizes = (seeds, sampling_steps)
    # Kept captions: objects no method is told about, each in the styles in turn; a model's own erased style is left out.
    others = [
        (world.prompt(c, styles[n % len(styles)]), c, seed)
        for n, c in enumerate(world.bystanders("classes"))
        for seed in (0, 1)
    ]
    base = drawn(world, None, asked, sampling_steps)
    texts = {
        "CLIP, whole prompt": [prompt for prompt, _, _ in asked],
        "CLIP, name only": [f"in the style of {s}" for s in of],
        "CLIP, without the name": [world.prompt(c) for _, c, _ in asked],
    }

    def measure(images, made, gone):
        scores = {
            "style top-1": 100 * in_top(judged(world, images)[1], world.judge.styles, of).float(),
            "object top-1": 100 * hits(world, images, [c for _, c, _ in asked]).float(),
            "LPIPS": perceptual_distance(world, images, base),
        } | {name: clip_alignment(world, images, text) for name, text in texts.items()}
        rows = {s: torch.tensor([o == s for o in of]) for s in styles}
        kept = [q for q in others if gone is None or not q[0].endswith(gone)]
        return {
            "by_style": {
                name: {s: round(v[row].mean().item(), 3) for s, row in rows.items()} for name, v in scores.items()
            },
            "kept": kept_images(world, kept, drawn(world, made, kept, sampling_steps)),
        }, strip(images[1 * seeds :: len(ten) * seeds])

    numbers, picture = cell("styles", world, lambda: measure(base, None, None), __name__, "base", sizes)
    runs, images = [], {"base": picture}
    for method, style in tqdm([(m, s) for m in methods for s in erased], desc="styles"):
        config = configured(world, method, training_seed, sampling_steps, strengths[method]["settings"], steps)

        def measured(made, style=style):
            return measure(drawn(world, made, asked, sampling_steps), made, style)

        scale = strengths[method]["scale"]
        found, picture = hidden("styles", world, [style], method, config, scale, measured, sizes)
        runs.append({"method": method, "erased": style} | found)
        images[f"{method}.{style}"] = picture
    return {
        "styles": styles,
        "erased": erased,
        "N": len(ten) * seeds,
        "seeds": [0, seeds - 1],
        "training_seeds": 1,
        "strengths": {m: strengths[m] for m in methods},
        "base": numbers,
        "runs": runs,
    }, images
