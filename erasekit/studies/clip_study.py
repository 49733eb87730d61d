"""08: is CLIP alignment a measure of erasure? Every image has a CLIP score and the answer of a style judge."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

NOTEBOOK, VERSION, UNIT = "08_clip_study", 1, "images a model"
ROWS = "methods"  # the setting that erasures given to `run` are added to

# Texts that an image is compared with, and how figures draw them: color, marker, line style.
WHOLE = "whole prompt"
TEXTS = {WHOLE: ("black", "s", "-"), "name only": ("gold", "o", "--"), "without the name": ("grey", "^", "-.")}
DRAWS = 1000  # of the intervals
LARGE_DROP = 10  # points of CLIP alignment that a reader may take for erased
VERIFY = {"methods": ("uce", "kpop"), "erased": ("noto",)}


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = ("esd-x", "uce", "ca", "kpop", "kpop-anchor")
    erased: tuple[str, ...] = ("noto", "twemoji", "openmoji", "fluent", "contrast")  # styles, one model each
    operating_points: dict | None = None  # by method; None: of the record of "style_operating_points"
    seeds: int = 3
    training_seed: int = 0
    sampling_steps: int = 15
    training_steps: int | None = None


PRESETS = {
    "smoke": Settings(methods=("uce", "kpop"), erased=("noto",), seeds=1, sampling_steps=2, training_steps=1),
    "quick": Settings(methods=("uce", "kpop"), erased=("noto", "openmoji")),
    "full": Settings(),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Images of the base and of each method's models, prompted in the erased style; their scores, and how these rank them."""
    from tqdm.auto import tqdm

    from ..evaluation.images import image_strip, sample_images
    from ..evaluation.metrics import judge_images
    from .kit.erasures import make_config, measured, method_points, rounded
    from .kit.given import erases

    points = method_points(s.operating_points, s.methods, [[e] for e in s.erased], "erased", "style_operating_points")
    objects = list(world.concepts("classes"))

    def evaluate(erasure, style):
        prompts = [(world.prompt(c, style), c, seed) for c in objects for seed in range(s.seeds)]
        images = sample_images(world, erasure, prompts, s.sampling_steps)
        judge, own = judge_images(world, images)[1], world.judge.styles.index(style)
        scores = {"judge": rounded(judge[:, own]), "has style": (judge.argmax(1) == own).tolist()}
        return scores | clip_scores(world, images, objects, style), image_strip(images)

    images, runs = {}, []
    for style in s.erased:
        numbers, images[f"base.{style}"] = evaluate(None, style)
        runs.append({"method": "base", "erased": style} | numbers)
    for method, style in tqdm(
        [(m, style) for m in s.methods for style in s.erased if erases(m, [style])], desc="CLIP study"
    ):
        point = points[method]
        config = make_config(world, method, s.training_seed, s.sampling_steps, point["settings"], s.training_steps)
        model = "clip_study", VERSION, world, [style], method, config, point["scale"]
        sizes = s.seeds, s.sampling_steps
        numbers, images[f"{method}.{style}"] = measured(*model, lambda e, style=style: evaluate(e, style), *sizes)
        runs.append({"method": method, "erased": style} | numbers)
    about = {"N": len(objects) * s.seeds, "seeds": [0, s.seeds - 1], "training_seeds": 1, "objects": objects}
    return about | {"operating_points": {m: points[m] for m in s.methods}, "runs": runs, "ranks": ranks(runs)}, images


def clip_scores(world, images, objects: list[str], style: str, clip=None) -> dict:
    """CLIP alignment of each image with each of TEXTS, for the same number of images of each object; see `clip_alignment`."""
    from ..evaluation.metrics import clip_alignment
    from .kit.erasures import rounded

    labels = [c for c in objects for _ in range(len(images) // len(objects))]
    texts = (
        [world.prompt(c, style) for c in labels],
        [f"in the style of {style}"] * len(labels),
        [world.prompt(c) for c in labels],
    )
    return {name: rounded(clip_alignment(world, images, text, clip), 3) for name, text in zip(TEXTS, texts)}


def ranks(runs: list[dict]) -> dict:
    """How well CLIP with each of TEXTS ranks images with the style above images without: areas under ROC curves.

    "all": over all images. "within a style": mean over styles. "drop from the base": by the score minus that of the base's
    image of the same prompt and seed, over the methods' images of prompts where the base's image has the style. "by method":
    over that method's images. "spearman": rank correlation with the judge's probability, mean over styles.
    """
    from ..evaluation.metrics import roc_auc

    def mean(values) -> float:
        return round(float(np.nanmean(list(values))), 4)

    frame = image_rows(runs)
    erased, styles = frame[frame.method != "base"], [own for _, own in frame.groupby("erased", sort=False)]
    drops, found = comparable(frame), {}
    for text in TEXTS:
        found[text] = {
            "all": roc_auc(frame[text], frame["has style"]),
            "within a style": mean(roc_auc(own[text], own["has style"]) for own in styles),
            "drop from the base": roc_auc(drops[f"{text}, drop"], drops["has style"]),
            "spearman": mean(spearman(own[[text, "judge"]]) for own in styles),
            "by method": {m: roc_auc(own[text], own["has style"]) for m, own in erased.groupby("method", sort=False)},
        }
    return found


def image_rows(runs: list[dict]) -> pd.DataFrame:
    """One row an image. "drop": its score minus that of the base's image of the same prompt and seed, if "base has style"."""
    base = {run["erased"]: run for run in runs if run["method"] == "base"}
    parts = []
    for run in runs:
        part = pd.DataFrame({name: run[name] for name in ("method", "erased", "judge", "has style", *TEXTS)})
        for text in TEXTS:
            part[f"{text}, drop"] = part[text] - np.asarray(base[run["erased"]][text])
        part["base has style"] = base[run["erased"]]["has style"]
        parts.append(part.rename_axis("number").reset_index())
    return pd.concat(parts, ignore_index=True)


def spearman(pair: pd.DataFrame) -> float:
    """Rank correlation of two columns."""
    return pair.rank().corr().iat[0, 1]


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """Images of erased models by prompts whose image of the base has the style."""
    return frame[frame["base has style"] & (frame.method != "base")]


def model_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over the images of each erased model, by method and style."""
    return frame[frame.method != "base"].groupby(["method", "erased"], sort=False)[[*TEXTS, "has style"]].mean()


def figures(record) -> dict:
    frame = image_rows(record.data["runs"])
    return {"clip_roc": _draw_roc(record, frame), "clip_failures": _draw_failures(record, frame)}


def _draw_roc(record, frame: pd.DataFrame):
    """ROC curves over single images, by score and by drop; and means of models against the judge, by two of the texts."""
    import matplotlib.pyplot as plt

    from .kit.plots import COLORS, percent_axis, style

    figure, axes = plt.subplots(2, 2, figsize=(8.2, 7.2), height_ratios=[1.25, 1], layout="constrained")
    for ax, rows, title, suffix, kind in (
        (axes[0, 0], frame, "Single images, by score", "", "all"),
        (axes[0, 1], comparable(frame), "Single images, by drop from the base", ", drop", "drop from the base"),
    ):
        ax.plot([0, 100], [0, 100], color="black", lw=0.7, ls=":")
        for text, (color, _, ls) in TEXTS.items():
            label = f"{text}: area {record.data['ranks'][text][kind]:.2f}"
            ax.plot(*roc_curve(rows[text + suffix], rows["has style"]), ls, lw=1.5, color=COLORS[color], label=label)
        ax.set(title=title, aspect="equal")
        percent_axis(ax, "x", "false positives: style lost, score high, %")
        percent_axis(ax, "y", "true positives: style kept, score high, %")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    means = model_means(frame)
    for ax, text in zip(axes[1], (WHOLE, "name only")):
        for method, own in means.groupby("method", sort=False):
            ax.plot(own[text], 100 * own["has style"], ls="", ms=6, label=method, **style(method))
        rho = spearman(means[[text, "has style"]])
        ax.set(title=f"{len(means)} models, {text}: rank correlation {rho:.2f}", xlabel=f"mean CLIP score, {text}")
        percent_axis(ax, "y", "style kept (judge)", (-4, 100 * means["has style"].max() + 6))
    handles = axes[1, 0].get_legend_handles_labels()
    title = "a point for each model: method and erased style"
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[1]), title=title, title_fontsize=8)
    return figure


def roc_curve(scores, present) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates in percent at every threshold, from the highest down."""
    present = np.asarray(present, dtype=bool)[np.argsort(-np.asarray(scores), kind="stable")]
    return tuple(100 * np.append(0, np.cumsum(kind)) / max(1, kind.sum()) for kind in (~present, present))


def _draw_failures(record, frame: pd.DataFrame):
    """The images on which CLIP and the judge disagree most, one for each object and style, with what their prompt names."""
    from .kit.plots import image_grid, tiles

    objects = record.data["objects"]
    seeds = record.data["N"] // len(objects)
    strips, rows, captions = {name: tiles(record, name) for name in record.images}, {}, {}
    frame = frame[frame.method != "base"].assign(object=lambda f: [objects[n // seeds] for n in f.number])
    kinds = ("style lost (judge),\nCLIP score high", False), ("style kept (judge),\nCLIP score low", True)
    for row, (label, kept) in enumerate(kinds):
        worst = (
            frame[frame["has style"] == kept].sort_values(WHOLE, ascending=kept).drop_duplicates(["object", "erased"])
        )
        worst = worst.head(8)
        rows[label] = [strips[f"{m}.{e}"][n] for m, e, n in zip(worst.method, worst.erased, worst.number)]
        named = zip(worst.object, worst.erased, worst[WHOLE])
        captions |= {
            (row, n): f"{c.replace(' ', chr(10), 1)},\n{e}: {score:.0f}" for n, (c, e, score) in enumerate(named)
        }
    figure = image_grid(rows, captions=captions, size=0.95)
    note = "below: the object and the style that the prompt asks for, and the CLIP score with the whole prompt"
    figure.text(0.5, -0.01, note, ha="center", va="top", fontsize=8)
    return figure


def area_interval(frame: pd.DataFrame, score: str) -> tuple[float, float]:
    """95 % interval of an area under the ROC curve, over models (method and style) drawn with replacement."""
    models = [own for _, own in frame.groupby(["method", "erased"])]
    present, absent = ([own[score][own["has style"] == kind].to_numpy() for own in models] for kind in (True, False))
    pairs = np.outer([len(x) for x in present], [len(y) for y in absent])
    above = (pairs + [[np.sign(x[:, None] - y).sum() for y in absent] for x in present]) / 2  # ties count as half
    times = np.random.default_rng(0).multinomial(len(models), np.full(len(models), 1 / len(models)), size=DRAWS)
    return _limits(((times @ above) * times).sum(1), ((times @ pairs) * times).sum(1))


def correlation_interval(pair: pd.DataFrame) -> tuple[float, float]:
    """95 % interval of the rank correlation of two columns, over rows drawn with replacement."""
    from scipy.stats import rankdata

    rows = np.random.default_rng(0).integers(len(pair), size=(DRAWS, len(pair)))
    ranks = rankdata(pair.to_numpy(dtype=float)[rows], axis=1)
    x, y = np.moveaxis(ranks - ranks.mean(1, keepdims=True), -1, 0)
    return _limits((x * y).sum(1), np.sqrt((x**2).sum(1) * (y**2).sum(1)))


def _limits(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """2.5 and 97.5 % quantiles of above / below, where that is defined."""
    defined = below > 0
    return tuple(np.quantile(above[defined] / below[defined], (0.025, 0.975))) if defined.any() else (np.nan, np.nan)


def table(record) -> pd.DataFrame:
    """By text: areas under ROC curves, rank correlations with the judge, and what a large drop means.

    In brackets 95 % intervals over models, see `area_interval` and `correlation_interval`.
    """
    from ..evaluation.metrics import roc_auc

    def between(value: float, limits: tuple[float, float]) -> str:
        return "{:.2f} ({:.2f} to {:.2f})".format(value, *limits)

    frame, columns = image_rows(record.data["runs"]), {}
    means, drops = model_means(frame), comparable(frame)
    for text, found in record.data["ranks"].items():
        change = f"{text}, drop"
        rows = {
            "area, all images": between(found["all"], area_interval(frame, text)),
            "area, by drop": between(found["drop from the base"], area_interval(drops, change)),
        }
        rows |= {f"area, {method}": f"{area:.2f}" for method, area in found["by method"].items()}
        for style, own in frame.groupby("erased", sort=False):
            rows[f"area, {style}"] = f"{roc_auc(own[text], own['has style']):.2f}"
        rows["rank correlation, images"] = f"{found['spearman']:.2f}"
        pair = means[[text, "has style"]]
        rows[f"rank correlation, {len(means)} models"] = between(spearman(pair), correlation_interval(pair))
        pair = drops.groupby(["method", "erased"], sort=False)[[change, "has style"]].mean()
        rows[f"rank correlation, {len(means)} models, by drop"] = between(spearman(pair), correlation_interval(pair))
        dropped = drops[drops[change] <= -LARGE_DROP]
        lost = f"{100 * (1 - dropped['has style'].mean()):.0f} %" if len(dropped) else "none"
        rows[f"style lost where it drops by {LARGE_DROP}"] = f"{lost} of {len(dropped)} images"
        share = 100 * (~dropped["has style"]).sum() / max(1, (~drops["has style"]).sum())
        rows[f"share of lost styles that drop by {LARGE_DROP}"] = f"{share:.0f} %"
        columns[text] = rows
    return pd.DataFrame(columns).rename_axis("CLIP with ...")
