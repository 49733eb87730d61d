"""06: five house styles, one model for each: what changes, what stays, and how CLIP scores it."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .style_operating_points import SWEEP

NOTEBOOK, VERSION, UNIT = "06_styles", 1, "images a style"  # raise VERSION when the numbers should change
ROWS = "methods"  # the setting that erasures given to `run` are added to
GRID = ("esd-x", "spm", "kpop")  # methods shown in the image grid; bars and table have all
REFERENCE = "kpop"  # the paper's method, which the table compares the others with
SHOWN = "church"  # the object in the image grid, where the world has it


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = tuple(SWEEP)
    operating_points: dict | None = None  # method -> {"settings", "scale"}; None: those of the committed record
    erased: tuple[str, ...] = ("noto", "twemoji", "openmoji", "fluent", "contrast")
    training_seed: int = 0
    seeds: int = 3  # of each of the ten classes in each style
    kept_seeds: int = 2  # of each object that no method is given
    sampling_steps: int = 15
    training_steps: int | None = None


PRESETS = {
    "full": Settings(),
    "quick": Settings(methods=("uce", "kpop"), erased=("noto", "openmoji")),
    "smoke": Settings(("uce", "kpop"), erased=("noto",), seeds=1, kept_seeds=1, sampling_steps=2, training_steps=1),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """For each method and erased style, by style in the prompt: the judge's rates, CLIP alignment, distance from the base."""
    import torch
    from tqdm.auto import tqdm

    from ..evaluation.images import image_strip, sample_images
    from ..evaluation.metrics import clip_alignment, object_correct, perceptual_distance, style_correct
    from ..evaluation.protocol import neutral_image_metrics
    from .kit.cache import cached
    from .kit.erasures import make_config, measured, method_points
    from .kit.given import erases

    points = method_points(s.operating_points, s.methods, [[e] for e in s.erased], "erased", "style_operating_points")
    styles, objects = list(world.styles), world.concepts("classes")
    prompts = [(world.prompt(o, style), o, seed) for style in styles for o in objects for seed in range(s.seeds)]
    style_of = [style for style in styles for _ in range(len(objects) * s.seeds)]
    sizes = s.seeds, s.kept_seeds, s.sampling_steps
    # Objects that no method is given, with the styles in turn; a model's own erased style is left out.
    neutral = [
        (world.prompt(o, styles[n % len(styles)]), o, seed)
        for n, o in enumerate(world.unseen_classes("classes"))
        for seed in range(s.kept_seeds)
    ]
    texts = {
        "CLIP, whole prompt": [prompt for prompt, _, _ in prompts],
        "CLIP, name only": [f"in the style of {style}" for style in style_of],
        "CLIP, without the name": [world.prompt(o) for _, o, _ in prompts],
    }
    shown = objects.index(SHOWN) if SHOWN in objects else 0
    base_images = sample_images(world, None, prompts, s.sampling_steps)

    def measure(erasure, images, erased=None):
        scores = {
            "style top-1": 100 * style_correct(world, images, style_of).float(),
            "object top-1": 100 * object_correct(world, images, [o for _, o, _ in prompts]).float(),
            "LPIPS": perceptual_distance(world, images, base_images),
        } | {name: clip_alignment(world, images, text) for name, text in texts.items()}
        rows = {style: torch.tensor([other == style for other in style_of]) for style in styles}
        kept = [p for p in neutral if erased is None or not p[0].endswith(erased)]
        return {
            "by_style": {
                k: {style: round(v[row].mean().item(), 3) for style, row in rows.items()} for k, v in scores.items()
            },
            "kept": neutral_image_metrics(world, kept, sample_images(world, erasure, kept, s.sampling_steps)),
        }, image_strip(images[shown * s.seeds :: len(objects) * s.seeds])

    def measure_erasure(erasure, style):
        return measure(erasure, sample_images(world, erasure, prompts, s.sampling_steps), style)

    base, strip = cached("styles", VERSION, world, lambda: measure(None, base_images), "base", sizes)
    runs, images, oracles = [], {"base": strip}, {}
    for style in s.erased:
        if oracle := world.oracle([style]):
            parts = "oracle", [style], sizes, oracle.digest()
            how = "styles", VERSION, world, lambda e=oracle, k=style: measure_erasure(e, k)
            oracles[style], images[f"oracle.{style}"] = cached(*how, *parts)
    for method, style in tqdm(
        [(m, style) for m in s.methods for style in s.erased if erases(m, [style])], desc="styles"
    ):
        changes, scale = points[method]["settings"], points[method]["scale"]
        config = make_config(world, method, s.training_seed, s.sampling_steps, changes, s.training_steps)
        where = "styles", VERSION, world, [style], method, config, scale
        found, images[f"{method}.{style}"] = measured(*where, lambda e, k=style: measure_erasure(e, k), sizes)
        runs.append({"method": method, "erased": style} | found)
    return {
        "styles": styles,
        "erased": s.erased,
        "N": len(objects) * s.seeds,
        "seeds": [0, s.seeds - 1],
        "training_seeds": 1,
        "operating_points": {m: points[m] for m in s.methods},
        "base": base,
        "runs": runs,
    } | ({"oracle": oracles} if oracles else {}), images


def runs_and_oracles(record) -> list[dict]:
    oracles = record.data.get("oracle", {}).items()
    return record.data["runs"] + [{"method": f"oracle (never saw {e})", "erased": e} | run for e, run in oracles]


def style_frame(record) -> pd.DataFrame:
    """One row for each method, erased style and style in the prompt; an oracle is a method of one model."""
    rows = [
        {"method": run["method"], "erased": run["erased"], "style": style}
        | {name: values[style] for name, values in run["by_style"].items()}
        for run in runs_and_oracles(record)
        for style in record.data["styles"]
    ]
    return pd.DataFrame(rows)


def mean_rates(record, own: pd.DataFrame, measure: str) -> list[tuple[float, float, float]]:
    """One method's rate in percent and its 95 % interval, on the erased styles and on the others: see `intervals.bootstrap`."""
    from ..evaluation.intervals import bootstrap

    erased = own.erased == own["style"]
    others = [rates[measure].to_numpy() for _, rates in own[~erased].groupby("erased")]
    found = own[erased][measure].mean(), own[~erased][measure].mean()
    between = bootstrap([own[erased][measure].to_numpy()], record.data["N"]), bootstrap(others, record.data["N"])
    return [(rate, *limits) for rate, limits in zip(found, between)]


def difference(frame: pd.DataFrame, method: str, erased: bool) -> str:
    """By how many points `method` leaves more of the erased style (or keeps more of the others) than `REFERENCE`.

    Paired by model, since both fail on much the same styles; in brackets the 95 % interval of Student's t over the models.
    """
    from scipy.stats import t

    rates = frame[(frame.erased == frame["style"]) == erased].groupby(["method", "erased"])["style top-1"].mean()
    pairs = (rates[method] - rates[REFERENCE]).dropna()
    if len(pairs) < 2:
        return ""
    mean, side = pairs.mean(), t.ppf(0.975, len(pairs) - 1) * pairs.sem()
    return f"{mean:+.1f} ({mean - side:+.0f} to {mean + side:+.0f})"


def figures(record) -> dict:
    return {"styles_drop": drop_figure(record), "styles_grid": grid_figure(record)}


def grid_figure(record):
    """Rows: the style in the prompt. Columns: the model, by the style erased from it; its own style, framed, must change."""
    from .kit import plots

    data, columns = record.data, [("base", "")]
    methods = list(dict.fromkeys(run["method"] for run in data["runs"]))
    shown = ([m for m in methods if m in GRID] or methods) + ["oracle"] * ("oracle" in data)
    columns += [(m, style) for m in shown for style in data["erased"] if f"{m}.{style}" in record.images]
    strips = [plots.tiles(record, f"{method}.{style}" if style else method) for method, style in columns]
    framed = [(data["styles"].index(style), column) for column, (_, style) in enumerate(columns) if style]
    rows = {style: [strip[row] for strip in strips] for row, style in enumerate(data["styles"])}
    groups = {"base": 1} | {method: sum(m == method for m, _ in columns) for method in shown}
    figure = plots.image_grid(rows, [style for _, style in columns], groups, outlined=framed, size=0.62, title_size=7)
    note = "Rows: the style in the prompt. Columns: the style erased. Framed: the erased style, which must change."
    figure.text(0.5, -0.02, note, ha="center", va="top", fontsize=8)
    return figure


def drop_figure(record):
    """Points lost by the erased style and by the others, by the style judge, with 95 % intervals, and by CLIP."""
    import matplotlib.pyplot as plt

    from .kit import plots

    frame, base = style_frame(record), record.data["base"]["by_style"]
    left = frame[frame.erased == frame["style"]].groupby("method", sort=False)["style top-1"].mean()
    methods = list(left.sort_values(kind="stable").index)
    figure, axes = plt.subplots(1, 2, figsize=(9.4, 0.36 * len(methods) + 1.3), sharey=True, layout="constrained")
    labels = {"style top-1": "Lost: style judge's top-1, points"}
    labels["CLIP, whole prompt"] = "Lost: CLIP alignment with the prompt, points"
    for ax, (measure, label) in zip(axes, labels.items()):
        lost = frame["style"].map(base[measure]) - frame[measure]
        own = lost[frame.erased == frame["style"]].groupby(frame.method).mean()
        others = lost[frame.erased != frame["style"]].groupby(frame.method).mean()
        for y, method in enumerate(methods):
            color = plots.style(method)["color"]
            rates = mean_rates(record, frame[frame.method == method], measure) if measure == "style top-1" else [()] * 2
            for shift, value, alpha, rate in zip((-0.2, 0.2), (own[method], others[method]), (1, 0.35), rates):
                ax.barh(y + shift, value, 0.38, color=color, alpha=alpha, lw=0)
                ends = [value + rate[0] - limit for limit in rate[1:]] or [value]
                ax.plot(ends, [y + shift] * len(ends), color="black", lw=0.8)
                ax.text(max(*ends, value, 0), y + shift, f" {value:.1f}", va="center", fontsize=7)
        ax.axvline(0, color="black", lw=0.6)
        ax.set(xlabel=label)
        ax.margins(x=0.12)  # for the numbers
        plots.method_rows(ax, methods)
    handles = [plt.Rectangle((0, 0), 1, 1, color="black", lw=0, alpha=alpha) for alpha in (1, 0.35)]
    labels = ["the erased style (more is better)", "the other styles (less is better)"]
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


def table(record) -> pd.DataFrame:
    """Means over the models, one for each style: the erased style / the four others; and CLIP on captions of what is kept.

    In brackets 95 % intervals of rates, see `mean_rates`, and of paired differences, see `difference`.

    FID and KID are left out: a model's captions leave its erased style out, and the reference images have all five.
    """
    frame, data, captions = style_frame(record), record.data, "kept captions: CLIP"
    measures, paired = list(data["base"]["by_style"]), f"style top-1, more than {REFERENCE}, paired"
    rows = {"base": {name: f"{np.mean(list(v.values())):.1f}" for name, v in data["base"]["by_style"].items()}}
    rows["base"][captions] = data["base"]["kept"]["CLIP"]
    for method, own in frame.groupby("method", sort=False):
        erased = own.erased == own["style"]
        rows[method] = {m: f"{own[erased][m].mean():.1f} / {own[~erased][m].mean():.1f}" for m in measures}
        for m in ("style top-1", "object top-1"):
            rates = mean_rates(record, own, m)
            rows[method][m] = " / ".join(f"{rate:.1f} ({low:.0f} to {high:.0f})" for rate, low, high in rates)
        kept = [run["kept"]["CLIP"] for run in runs_and_oracles(record) if run["method"] == method]
        rows[method][captions] = np.mean(kept)
        if method != REFERENCE and REFERENCE in set(frame.method):
            rows[method][paired] = " / ".join(difference(frame, method, erased) for erased in (True, False)).strip(" /")
    columns = ["style top-1", paired, *measures[1:], captions]
    found = pd.DataFrame(rows).T.reindex(columns=columns).fillna({paired: ""}).astype({captions: float}).round(1)
    return found.rename_axis("erased style / the others")
