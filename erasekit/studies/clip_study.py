"""08: is CLIP alignment a measure of erasure? Every image has it, and a style judge says whether the style is there."""

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..metrics import clip_alignment, judged
from .common import rounded, strip
from .hidden import hidden, known
from .panel import drawn
from .strength import chosen, configured

FULL = {
    "methods": ["esd-x", "uce", "ca", "kpop", "kpop-anchor"],
    "strengths": chosen("style_strength"),
    "erased": ["noto", "twemoji", "openmoji", "fluent", "contrast"],
    "seeds": 3,
    "training_seed": 0,
    "sampling_steps": 8,
    "steps": None,
}
SCALES = {
    "smoke": FULL | {"methods": ["uce", "kpop"], "erased": ["noto"], "seeds": 1, "sampling_steps": 2, "steps": 1},
    "quick": FULL | {"methods": ["uce", "kpop"], "erased": ["noto", "openmoji"]},
    "full": FULL,
}
FORMS = ("whole prompt", "name only", "without the name")


def compute(world, methods, strengths, erased, seeds, training_seed, sampling_steps, steps):
    """For images asked for in the erased style, by the base and by each method: CLIP by form of the text, and the judge.

    How well a score ranks is the area under its ROC curve: the chance that an image with the style has more of it than one
    without. `drop` is the image's score less the base's on the same prompt and seed. The bundled world's judge was trained apart
    from its CLIP.
    """
    known(strengths, *methods)
    ten = world.concepts("classes")

    def scored(made, style):
        asked = [(world.prompt(c, style), c, seed) for c in ten for seed in range(seeds)]
        images = drawn(world, made, asked, sampling_steps)
        texts = (
            [prompt for prompt, _, _ in asked],
            [f"in the style of {style}"] * len(asked),
            [world.prompt(c) for _, c, _ in asked],
        )
        styles = judged(world, images)[1]
        own = world.judge.styles.index(style)
        return {
            "judge": rounded(styles[:, own]),
            "there": (styles.argmax(1) == own).tolist(),
        } | {form: rounded(clip_alignment(world, images, text), 3) for form, text in zip(FORMS, texts)}, strip(images)

    images, runs = {}, []
    for style in erased:
        numbers, images[f"base.{style}"] = scored(None, style)
        runs.append({"method": "base", "erased": style} | numbers)
    for method, style in tqdm([(m, s) for m in methods for s in erased], desc="CLIP study"):
        strength = strengths[method]
        config = configured(world, method, training_seed, sampling_steps, strength["settings"], steps)
        how = "clip_study", world, [style], method, config, strength["scale"]
        numbers, images[f"{method}.{style}"] = hidden(
            *how, lambda made, s=style: scored(made, s), seeds, sampling_steps
        )
        runs.append({"method": method, "erased": style} | numbers)
    return {
        "N": len(ten) * seeds,
        "seeds": [0, seeds - 1],
        "training_seeds": 1,
        "objects": list(ten),
        "runs": runs,
        "ranks": ranks(runs),
    }, images


def ranks(runs: list[dict]) -> dict:
    """How well each form of CLIP tells images with the style from those without, as areas under ROC curves.

    "all": over every image. "within a style": the mean over styles. "drop from the base": over the methods' images of prompts
    where the base has the style. "by method": within that method's own images. "spearman": rank correlation with the judge's
    probability, the mean over styles.
    """
    names = ("method", "erased", "judge", "there", *FORMS)
    frame = pd.concat([pd.DataFrame({k: run[k] for k in names}) for run in runs])
    # The base's images of a style stand in the same order of prompts and seeds as every method's.
    base = {style: own for style, own in frame[frame.method == "base"].groupby("erased")}
    ours = {where: own for where, own in frame[frame.method != "base"].groupby(["method", "erased"], sort=False)}
    styles = [own for _, own in frame.groupby("erased", sort=False)]
    found = {}
    for form in FORMS:
        drops = [(own[form] - base[style][form])[base[style].there] for (_, style), own in ours.items()]
        order = [own.there[base[style].there] for (_, style), own in ours.items()]
        found[form] = {
            "all": auc(frame[form], frame.there),
            "within a style": mean(auc(own[form], own.there) for own in styles),
            "drop from the base": auc(pd.concat(drops), pd.concat(order)),
            "spearman": mean(own[[form, "judge"]].rank().corr().iat[0, 1] for own in styles),
            "by method": {
                m: auc(own[form], own.there) for m, own in frame[frame.method != "base"].groupby("method", sort=False)
            },
        }
    return found


def mean(values) -> float:
    """The mean of what is a number."""
    return round(float(np.nanmean(list(values))), 4)


def auc(scores, there) -> float:
    """The chance that an image with the style scores higher than one without; ties count half. NaN if there is only one kind."""
    scores, there = np.asarray(scores, dtype=float), np.asarray(there, dtype=bool)
    difference = scores[there][:, None] - scores[~there][None]
    return round(float(((difference > 0) + 0.5 * (difference == 0)).mean()), 4) if difference.size else float("nan")
