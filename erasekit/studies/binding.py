"""16: do kept images still have the background and the style that were asked for?"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from .operating_points import METHOD_NAMES

NOTEBOOK, VERSION, UNIT = "16_scale_and_interference", 1, "images of kept objects"
ROWS = "methods"  # the setting that erasures given to `run` are added to

# Training these takes longer than training all others together, and each has a relative among those.
LEFT_OUT = ("stereo", "race", "receler", "age", "esd-u", "kpop-adversarial", "spm", "ace", "ant", "eap")
RATES = ("object", "background", "style", "background and style")
BORDER = 2  # pixels, the width of the frame that shows the background
SHOWN = 6  # images of each row of the figure


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = tuple(m for m in METHOD_NAMES if m not in LEFT_OUT)
    operating_points: dict | None = None  # by method; None: of the record of "operating_points"
    split: str = "S1"  # what is erased, or classes by name
    images: int = 280  # each of seven colours in each of five styles eight times
    training_seed: int = 0
    sampling_steps: int = 15
    training_steps: int | None = None


PRESETS = {
    "full": Settings(),
    "quick": Settings(("uce", "esd-x", "kpop", "kpop-anchor"), images=140),
    "smoke": Settings(("uce", "kpop"), images=10, sampling_steps=2, training_steps=1),
}
VERIFY = {"methods": ("uce", "kpop")}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """For the base, the oracle and each method: the shares of images as asked, in percent, and their differences to the base.

    Prompts, and so images, are paired by object, style, background and seed. A world without a table of background colours is
    asked for styles alone.
    """
    from tqdm.auto import tqdm

    from ..evaluation.images import image_strip, sample_images
    from ..evaluation.metrics import in_top_k, judge_images
    from .kit.cache import cached
    from .kit.erasures import make_config, measured, method_points

    erased = world.split(s.split)
    points, asked = method_points(s.operating_points, s.methods, [erased], "split"), questions(world, erased, s.images)
    objects, styles, colours, prompts = zip(*asked)
    sizes = s.images, s.sampling_steps

    def measure(erasure):
        images = sample_images(world, erasure, list(prompts), s.sampling_steps)
        found = judge_images(world, images)
        right = {
            "object": in_top_k(found[0], world.judge.objects, objects).numpy(),
            "style": in_top_k(found[1], world.judge.styles, styles).numpy(),
        }
        if world.backgrounds:
            right["background"] = np.array(border_colours(images, world.backgrounds)) == colours
            right["background and style"] = right["background"] & right["style"]
        digits = {rate: "".join(str(int(x)) for x in right[rate]) for rate in RATES if rate in right}
        return digits, image_strip(images[: 6 * SHOWN : 6])  # the next style and the next colour each time

    base, strip = cached("binding", VERSION, world, lambda: measure(None), "base", list(erased), sizes)
    found, images = {"base": base}, {"base": strip}
    if oracle := world.oracle(erased):
        own = "oracle", list(erased), sizes, oracle.digest()
        found["oracle"], images["oracle"] = cached("binding", VERSION, world, lambda: measure(oracle), *own)
    for method in tqdm(s.methods, desc="binding"):
        config = make_config(
            world, method, s.training_seed, s.sampling_steps, points[method]["settings"], s.training_steps
        )
        how = erased, method, config, points[method]["scale"], measure
        found[method], images[method] = measured("binding", VERSION, world, *how, sizes)
    return {
        "N": len(asked),
        "training_seeds": 1,
        "erased": list(erased),
        "asked": [[o, style, colour] for o, style, colour, _ in asked[: 6 * SHOWN : 6]],
        "operating_points": {m: points[m] for m in s.methods},
        "runs": [{"method": name} | compare(base, own) for name, own in found.items()],
    }, images


def questions(world, erased, count: int) -> list[tuple[str, str, str, tuple[str, str, int]]]:
    """(object, style, colour, prompt triple) of kept objects in turn, every style in turn, and every colour in turn of these."""
    kept = [c for c in world.concepts("classes") if c not in erased] + world.unseen_classes("classes")
    colours, asked = [*world.backgrounds][1:] or ["white"], []
    for n in range(count):
        name, style = kept[n % len(kept)], world.styles[n % len(world.styles)]
        colour = colours[n // len(world.styles) % len(colours)]
        asked.append((name, style, colour, (world.format_prompt(world.template, name, style, colour), name, n)))
    return asked


def border_colours(images, table: dict[str, tuple[int, int, int]]) -> list[str]:
    """The colour of a table of RGB values that most pixels of the frame around each image (N, 3, H, W), uint8, are nearest to.

    A vote of pixels, since an object may reach the frame.
    """
    import torch

    ring = torch.ones(images.shape[-2:], dtype=torch.bool)
    ring[BORDER:-BORDER, BORDER:-BORDER] = False
    pixels = images[:, :, ring].transpose(1, 2).float()  # (N, pixels, 3)
    nearest = torch.cdist(pixels, torch.tensor([*table.values()], dtype=torch.float32).expand(len(images), -1, -1))
    votes = torch.nn.functional.one_hot(nearest.argmin(2), len(table)).sum(1)
    return [[*table][n] for n in votes.argmax(1).tolist()]


def compare(base: dict[str, str], own: dict[str, str]) -> dict:
    """Rates in percent; and the difference to the base in points, with its 95 % interval over images paired by prompt and seed.

    Outcomes are a digit an image, 1 for right.
    """
    from ..evaluation.intervals import bootstrap_mean, wilson

    found = {}
    for rate in (rate for rate in RATES if rate in own):
        right, before = (100 * np.array([*x[rate]], dtype=float) for x in (own, base))
        value, change = right.mean(), right - before
        about = {"rate": value, "interval": wilson(value, len(right)), "difference": change.mean()}
        about["difference interval"] = bootstrap_mean(change) if change.any() else (0.0, 0.0)
        found[rate] = {
            k: [round(x, 2) for x in v] if isinstance(v, tuple) else round(float(v), 2) for k, v in about.items()
        }
    return found | {k: own[k] for k in ("training_seconds",) if k in own}


def figures(record) -> dict:
    """Differences to the base with their intervals; and the same prompts drawn by the base, ours, and models that lose."""
    from matplotlib.lines import Line2D

    from .kit import plots

    base, *runs = record.data["runs"]
    names, known = [run["method"] for run in runs], [rate for rate in RATES if rate in base]
    looks = dict(zip(RATES, zip((-0.27, -0.09, 0.09, 0.27), ("grey", "orange", "green", "blue"))))
    figure, [ax] = plots.panels(1, columns=1, height=0.26 * len(runs) + 1, width=6.4)
    for rate in known:
        shift, color = looks[rate]
        values = np.array([[run[rate]["difference"], *run[rate]["difference interval"]] for run in runs])
        sides = np.abs(values[:, 1:] - values[:, :1]).T
        how = {"fmt": "o", "ms": 4, "lw": 1, "color": plots.COLORS[color]}
        ax.errorbar(values[:, 0], np.arange(len(runs)) + shift, xerr=sides, **how)
    ax.axvline(0, color="#bbbbbb", lw=0.8, zorder=0)
    plots.method_rows(ax, names)
    ax.set_xlabel("images as asked, difference to the base in points, with 95 % intervals")
    labels = {f"{rate} (base: {base[rate]['rate']:.0f} %)": looks[rate][1] for rate in known}
    handles = [Line2D([], [], marker="o", ms=4, lw=0, color=plots.COLORS[color]) for color in labels.values()]
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    titles = [f"{o}\n{style}, {colour}".replace(", white", "") for o, style, colour in record.data["asked"]]
    shown = [run["method"] for run in runs if plots.is_ours(run["method"]) or loses(run)]
    rows = {name: plots.tiles(record, name) for name in ("base", *shown)}
    return {"binding": figure, "binding_grid": plots.image_grid(rows, titles, size=0.9)}


def loses(run: dict) -> bool:
    """Whether any of a model's rates is below the base's by more than its interval."""
    return any(run[rate]["difference interval"][1] < 0 for rate in RATES if rate in run)


def table(record) -> pd.DataFrame:
    """Shares of images as asked, and in brackets the difference to the base with its 95 % interval."""
    rows = {}
    for run in record.data["runs"]:
        row = rows[run["method"]] = {}
        for rate in (rate for rate in RATES if rate in run):
            value, (low, high) = run[rate], run[rate]["difference interval"]
            row[rate] = f"{value['rate']:.1f}"
            row[rate] += f" ({value['difference']:+.1f}: {low:+.1f} to {high:+.1f})" * (run["method"] != "base")
    return pd.DataFrame(rows).T.fillna("").rename_axis(f"%, {record.settings['split']} erased")
