"""08: does what CLIP says of erasure depend on which CLIP? Other CLIP models score the CLIP study's images."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

NOTEBOOK, VERSION, UNIT = "08_clip_study", 1, "images a model"
VERIFY = {"others": False}
OWN = "this world's"  # the name of the CLIP model of the CLIP study


@dataclass(frozen=True)
class Settings:
    images_of: str = "full"  # preset of the CLIP study
    others: bool = True  # the bundled world trains its other CLIP models first, for minutes
    placements: int = 8  # of each picture of the art


PRESETS = {
    "smoke": Settings(images_of="smoke", others=False, placements=1),
    "quick": Settings(images_of="quick"),
    "full": Settings(),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """For each CLIP model: how well it recognizes the art, and how it ranks the CLIP study's images (`clip_study.ranks`)."""
    from . import run
    from .clip_study import WHOLE, image_rows, model_means, ranks, spearman
    from .world import zero_shot

    study = run("clip_study", world, s.images_of, exact_preset=True)
    images, labels, styles, first = world.test_images(s.placements)
    rows = []
    for name, clip in ({OWN: world.clip} | (world.other_clips() if s.others else {})).items():
        known = zero_shot(world, clip, images[:first], labels[:first], styles[:first]) if labels else {}
        runs = [rescore(world, clip, study, each) for each in study.data["runs"]]
        means = round(spearman(model_means(image_rows(runs))[[WHOLE, "has style"]]), 4)
        rows.append({"clip": name} | known | {"ranks": ranks(runs), "spearman of means": means})
    about = {name: study.data[name] for name in ("N", "seeds", "training_seeds")} | {"images made": study.made}
    return about | {"rows": rows}, {}


def rescore(world, clip, study, run: dict) -> dict:
    """A run of the CLIP study's record with the scores of another CLIP model."""
    import torch

    from .clip_study import clip_scores
    from .kit.plots import tiles

    images = torch.from_numpy(np.stack(tiles(study, f"{run['method']}.{run['erased']}"))).permute(0, 3, 1, 2)
    return run | clip_scores(world, images, study.data["objects"], run["erased"], clip)


def figures(record) -> dict:
    """Single images and means of models, by CLIP model from the weakest on.

    Bars are 95 % intervals. They need the score of each image, which only the CLIP study's record has, of this world's CLIP.
    """
    import matplotlib.pyplot as plt

    from .clip_study import TEXTS, WHOLE
    from .kit.plots import COLORS

    known_limits, bar = limits(record), {"fmt": "none", "elinewidth": 1, "capsize": 2}
    rows = sorted(record.data["rows"], key=lambda row: row.get("style_top1", 0))
    known = [f"\n{row['style_top1']:.0f} % of styles" if "style_top1" in row else "" for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 2.9), width_ratios=[1.5, 1], layout="constrained")
    beside = {"textcoords": "offset points", "fontsize": 8}
    own = next(n for n, row in enumerate(rows) if row["clip"] == OWN)
    for shift, (text, (color, marker, ls)) in zip((-0.04, 0.04, 0), TEXTS.items()):
        areas, look = [row["ranks"][text]["all"] for row in rows], {"color": COLORS[color]}
        left.plot(np.arange(len(rows)) + shift, areas, ls, marker=marker, **look)
        if text in known_limits:
            sides = np.abs(np.subtract(known_limits[text], areas[own]))[:, None]
            left.errorbar(own + shift, areas[own], sides, ecolor=COLORS[color], **bar)
        left.annotate(text, (len(rows) - 1, areas[-1]), (9, 0), va="center", annotation_clip=False, **beside, **look)
    left.axhline(0.5, color="black", lw=0.7, ls=":")
    left.annotate("chance", (0, 0.5), (0, 3), **beside)
    left.set(ylim=(0.3, 1), ylabel="area under the ROC curve", title="single images: style kept or lost")
    means = [row["spearman of means"] for row in rows]
    right.plot(means, "-s", color="black")
    if "models" in known_limits:
        sides = np.abs(np.subtract(known_limits["models"], means[own]))[:, None]
        right.errorbar(own, means[own], sides, ecolor="black", **bar)
    for n, rho in enumerate(means):
        right.annotate(f"{rho:.2f}", (n, rho), (-5, 5), ha="right", **beside)
    right.set(ylim=(0, 1), ylabel="rank correlation with the judge", title=f"models: means, {WHOLE}")
    for ax, margin in ((left, 0.75), (right, 0.4)):
        ax.set(xlim=(-0.3, len(rows) - 1 + margin))
        ax.set_xticks(range(len(rows)), [row["clip"] + share for row, share in zip(rows, known)])
    figure.supxlabel(
        "CLIP model, and the share of the art's styles that it recognizes; bars: 95 % intervals", fontsize=9
    )
    return {"clip_models": figure}


def limits(record) -> dict[str, tuple[float, float]]:
    """95 % intervals for this world's CLIP: of each text's area over all images, and under "models" of the rank correlation.

    From the record of the CLIP study whose images these are; empty where that is not there, or is another one by now.
    """
    from .clip_study import TEXTS, WHOLE, area_interval, correlation_interval, image_rows, model_means
    from .kit.records import Record

    path = record.path.parents[1] / record.settings["images_of"] / "clip_study.json"
    if not path.exists() or (study := Record.read(path)).made != record.data["images made"]:
        return {}
    frame = image_rows(study.data["runs"])
    areas = {text: area_interval(frame, text) for text in TEXTS}
    return areas | {"models": correlation_interval(model_means(frame)[[WHOLE, "has style"]])}


def table(record) -> pd.DataFrame:
    """One row a CLIP model: what it recognizes of the art, and how it ranks images and models."""
    rows = {}
    for row in record.data["rows"]:
        known = {f"{kind} recognized, %": row[f"{kind}_top1"] for kind in ("object", "style") if f"{kind}_top1" in row}
        areas = {text: f"{found['all']:.2f}, {found['drop from the base']:.2f}" for text, found in row["ranks"].items()}
        images, models = next(iter(row["ranks"].values()))["spearman"], row["spearman of means"]
        rows[row["clip"]] = known | areas | {"rho, images": f"{images:.2f}", "rho, models": f"{models:.2f}"}
    return pd.DataFrame(rows).T.rename_axis("area under the ROC curve: all images, drop; rho: whole prompt")
