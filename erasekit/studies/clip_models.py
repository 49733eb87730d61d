"""08: does what CLIP says of erasure depend on which CLIP? The images of the CLIP study, scored by others."""

import numpy as np
import pandas as pd
import torch

from ..metrics import clip_alignment
from .clip_study import FORMS, ranks
from .common import rounded
from .world import zero_shot

# Other CLIPs of the bundled world train first, for minutes: at scale smoke there are none.
SCALES = {
    "smoke": {"images_of": "smoke", "others": False, "placements": 1},
    "quick": {"images_of": "quick", "others": True, "placements": 8},
    "full": {"images_of": "full", "others": True, "placements": 8},
}


def compute(world, images_of, others, placements):
    """For each CLIP model: how well it knows real pictures, and how it ranks the CLIP study's images (`clip_study.ranks`)."""
    from .. import run  # the package imports its studies

    study = run("clip_study", world, images_of, exact=True)
    pictures, labels, styles, once = world.known_pictures(placements)
    rows = []
    for name, clip in ({"this world's": world.clip} | (world.other_clips() if others else {})).items():
        known = zero_shot(world, clip, pictures[:once], labels[:once], styles[:once]) if labels else {}
        runs = [scored(world, clip, study, each) for each in study.data["runs"]]
        rows.append({"clip": name} | known | {"ranks": ranks(runs)} | {"spearman of means": ordered(runs)})
    about = {name: study.data[name] for name in ("N", "seeds", "training_seeds")} | {"images made": study.made}
    return about | {"rows": rows}, {}


def ordered(runs: list[dict]) -> float:
    """Rank correlation over erased models: mean alignment with the whole prompt, and how many images have the style."""
    means = [(np.mean(run[FORMS[0]]), np.mean(run["there"])) for run in runs if run["method"] != "base"]
    return round(pd.DataFrame(means).rank().corr().iat[0, 1], 4)


def scored(world, clip, study, run: dict) -> dict:
    """A run of the CLIP study with another model's scores."""
    style, objects = run["erased"], study.data["objects"]
    pixels = np.asarray(study.images[f"{run['method']}.{style}"])
    images = torch.from_numpy(np.stack(np.split(pixels, pixels.shape[1] // pixels.shape[0], axis=1))).permute(
        0, 3, 1, 2
    )
    asked = [c for c in objects for _ in range(len(images) // len(objects))]
    texts = (
        [world.prompt(c, style) for c in asked],
        [f"in the style of {style}"] * len(asked),
        [world.prompt(c) for c in asked],
    )
    return run | {form: rounded(clip_alignment(world, images, text, clip), 3) for form, text in zip(FORMS, texts)}
