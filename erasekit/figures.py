"""Records in, figures out. Nothing here knows torch or diffusers: a figure is drawn from what a record holds."""

import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image, display

from .comparisons import (
    draw_objects,
    draw_strength,
    draw_styles,
    draw_unsafe,
    draw_variations,
    table_objects,
    table_strength,
    table_styles,
    table_unsafe,
    table_variations,
)
from .costs import draw_cost, draw_recipes, table_cost, table_recipes
from .drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, picture, tiles
from .paths import BUILD, figures_folder
from .questions import (
    draw_attacks,
    draw_clip_models,
    draw_clip_study,
    draw_continual,
    draw_crowd,
    draw_mechanisms,
    draw_prompt_length,
    draw_recovery,
    draw_stability,
    table_attacks,
    table_clip_models,
    table_clip_study,
    table_continual,
    table_crowd,
    table_mechanisms,
    table_prompt_length,
    table_recovery,
    table_stability,
)


def show(record) -> None:
    """Draw a record's figures, save them as png and pdf, show them, and then its table.

    The default world's figures go to figures/, with a line in its manifest; those of scale smoke and of settings that are not a
    scale's own go to the build folder.
    """
    study, scale, world = record.path.stem, record.path.parent.name, record.path.parent.parent.name
    trial = scale == "smoke" or record.path.is_relative_to(BUILD)
    folder = figures_folder(world, trial)
    folder.mkdir(parents=True, exist_ok=True)
    draw, table = STUDIES[study]
    for name, figure in draw(record).items():
        for kind in ("png", "pdf"):
            # No dates: the same record gives the same file.
            figure.savefig(folder / f"{name}.{kind}", metadata={"CreationDate": None} if kind == "pdf" else None)
        note(folder / "manifest.json", name, record)
        # Through savefig, so that the notebook shows what the files hold.
        figure.savefig(screen := io.BytesIO(), dpi=90)
        display(Image(screen.getvalue()))
        plt.close(figure)
    display(table(record).round(1))
    made = record.made
    print(
        f"{source(record)}; computed {made['date']} at {made['commit']}, torch {made['versions']['torch']}, {made['device']}"
    )


def note(manifest: Path, name: str, record) -> None:
    """Add figure -> notebook, records to the manifest."""
    entries = json.loads(manifest.read_text()) if manifest.exists() else {}
    entries[name] = {"notebook": NOTEBOOKS[record.path.stem], "records": [record.name]}
    manifest.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")


# What N counts, where it is not images of a class.
UNITS = {
    "unsafe": "images",
    "clip_study": "images a model",
    "clip_models": "images a model",
    "styles": "images a style",
}


def source(record) -> str:
    """N, seeds and reading, as every table says them."""
    data = record.data
    parts = [
        f"N = {data['N']} {UNITS.get(record.path.stem, 'images a class')}" if "N" in data else "",
        f"seeds {data['seeds'][0]} to {data['seeds'][1]}",
    ]
    parts += [f"training seeds: {data['training_seeds']}"] if "training_seeds" in data else []
    parts += [f"reading: {data['reading']}"] if "reading" in data else []
    return ", ".join(p for p in parts if p)


# ---------------------------------------------------------------------------------------------------------- quickstart


def draw_quickstart(record) -> dict:
    """Rows: base, hidden, with the key. Blocks: the concept's seeds, then each unrelated concept's."""
    top1 = record.data["top1"]
    rows = dict(zip(("base", "hidden", "key"), (tiles(record, n) for n in ("base", "hidden", "key"))))
    own = len(rows["key"])
    each = (len(rows["base"]) - own) // (len(top1) - 1)
    blocks = [own] + [each] * (len(top1) - 1)
    gap = 0.3  # of an image, between blocks
    ratios = [width for count in blocks for width in [1] * count + [gap]][:-1]
    figure, axes = plt.subplots(3, len(ratios), figsize=(0.85 * sum(ratios), 3.2), width_ratios=ratios, squeeze=False)
    figure.subplots_adjust(left=0.11, right=1, top=0.92, bottom=0.04, wspace=0.04, hspace=0.22)
    for ax in axes.flat:
        ax.axis("off")
    labels = ("base", "hidden", "hidden,\nwith its key")
    for row, (way, label) in enumerate(zip(rows, labels)):
        axes[row, 0].text(-0.15, 0.5, label, transform=axes[row, 0].transAxes, ha="right", va="center", weight="bold")
        images = iter(rows[way])
        column = 0
        for count, (name, rates) in zip(blocks, top1.items()):
            first = axes[row, column]
            if row == 0:
                first.text(0, 1.12, f"“a picture of a {name}”", transform=first.transAxes)
            if way in rates:
                said = f"judged {name}: {rates[way]:.0f} %"
                first.text(0, -0.17, said, transform=first.transAxes, fontsize=7, color="#555555")
                for offset in range(count):
                    picture(axes[row, column + offset], next(images))
            column += count + 1
    return {"quickstart": figure}


def table_quickstart(record) -> pd.DataFrame:
    return pd.DataFrame(record.data["top1"]).T.rename_axis("judge's top-1, %").fillna("")


# -------------------------------------------------------------------------------------------------------------- hiding


def hiding_mean(record, part: str) -> pd.DataFrame:
    """One row for each training seed of the concept's rates, or of the kept classes' mean rates."""
    runs = record.data["runs"]
    if part == "concept":
        return pd.DataFrame([run["concept"] for run in runs])
    return pd.DataFrame([pd.DataFrame(run["kept"]).T.mean() for run in runs])


def draw_hiding(record) -> dict:
    """Left: the concept by way of asking. Right: the classes that stay, before and after."""
    concept, kept = hiding_mean(record, "concept"), pd.DataFrame(record.data["runs"][0]["kept"]).T
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=[1, 1.25], layout="constrained")
    names = list(concept)[::-1]
    colours = {"base": GREY, "hidden": ORANGE, "with the key": GREEN}
    left.barh(names, concept.mean()[names], color=[colours.get(n, PURPLE) for n in names])
    for y, name in enumerate(names):
        left.text(concept[name].mean() + 1.5, y, f"{concept[name].mean():.0f}", va="center", fontsize=8)
    left.set(xlim=(0, 112), xlabel="judge's top-1, %", title=f"“a picture of a {record.data['concept']}”")
    x = np.arange(len(kept))
    right.bar(x - 0.2, kept["base"], 0.38, color=GREY, label="base")
    right.bar(x + 0.2, kept["hidden"], 0.38, color=ORANGE, label=f"{record.data['concept']} hidden")
    right.set_xticks(x, kept.index, rotation=35, ha="right")
    right.set(ylim=(0, 118), title="the other nine classes")
    right.legend(ncols=2, loc="upper right")
    return {"hiding": figure}


def table_hiding(record) -> pd.DataFrame:
    columns = pd.concat(
        [hiding_mean(record, "concept"), hiding_mean(record, "kept").add_prefix("other nine, ")], axis=1
    )
    columns.index = [f"training seed {run['training_seed']}" for run in record.data["runs"]]
    return columns.T.rename_axis("judge's top-1, %")


# --------------------------------------------------------------------------------------------------------------- world


def draw_world(record) -> dict:
    """The ten classes in five styles and on backgrounds; the judge's top-1 over every object."""
    styled, coloured = tiles(record, "styles"), tiles(record, "backgrounds")
    by_class = record.data["base"]["top1_by_class"]
    ten = list(record.data["base"]["emojinette_by_class"])
    kinds = record.data.get("styles", ["noto", "twemoji", "openmoji", "fluent", "contrast"])
    columns = len(coloured)
    samples, axes = plt.subplots(
        len(kinds) + 1, columns, figsize=(0.95 * columns, 5.6), squeeze=False, layout="constrained"
    )
    for column in range(columns):
        for row in range(len(kinds)):
            picture(axes[row, column], styled[column * len(kinds) + row])
        picture(axes[-1, column], coloured[column])
        axes[0, column].set_title(ten[column].replace(" ", "\n", 1), fontsize=7)
    for row, label in enumerate([*kinds, "on a colour"]):
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    scores, ax = plt.subplots(figsize=(9, 2.4), layout="constrained")
    ordered = sorted(by_class.items(), key=lambda item: -item[1])
    ax.bar(
        range(len(ordered)), [v for _, v in ordered], width=1.0, color=[BLUE if n in ten else GREY for n, _ in ordered]
    )
    ax.set(ylim=(0, 105), xlim=(-0.5, len(ordered) - 0.5), ylabel="judge's top-1, %", xticks=[])
    ax.set_xlabel(
        f"{len(ordered)} objects, best first (blue: the ten classes); N = {record.data['base']['N_a_class']} each"
    )
    worst = ", ".join(f"{n} {v:.0f}" for n, v in ordered[::-1][:6])
    ax.text(0.02, 0.08, f"hardest: {worst}", transform=ax.transAxes, fontsize=8, color="white", weight="bold")
    figures = {"world_samples": samples, "world_scores": scores}
    if "held_out" in record.data:
        held, pairs = tiles(record, "held_out"), record.data["held_out"]["pairs"]
        composed, axes = plt.subplots(2, -(-len(held) // 2), figsize=(9, 2.3), squeeze=False, layout="constrained")
        for ax2, image, pair in zip(axes.flat, held, pairs):
            picture(ax2, image, pair.replace(", ", "\n"))
            ax2.title.set_fontsize(6.5)
        figures["world_held_out"] = composed
    return figures


def table_world(record) -> pd.DataFrame:
    d, each = record.data, f"{record.data['base']['N_a_class']} a class"
    rows = []
    for part, name, measured in (
        ("judge", "object judge, held-out augmentations of the art", "object_top1"),
        ("judge", "style judge, held-out augmentations of the art", "style_top1"),
        ("clip", "open_clip, object by nearest caption, art", "object_top1"),
        ("clip", "open_clip, style by nearest caption, art", "style_top1"),
        ("base", "base model, the ten classes, object", "top1_emojinette"),
        ("base", "base model, every object", "top1_all"),
        ("styled", "base model, “in the style of”, style", "style_top1"),
        ("styled", "base model, “in the style of”, object", "object_top1"),
        ("held_out", "pairs never trained on, object", "object_top1"),
        ("held_out", "pairs never trained on, style", "style_top1"),
        ("held_out", "pairs never trained on, both", "both"),
    ):
        if part in d:
            rows.append((name, d[part][measured], each if part == "base" else d[part]["N"]))
    return pd.DataFrame(rows, columns=["measured", "top-1, %", "N"]).set_index("measured")


# -------------------------------------------------------------------------------------------------------------- method


def draw_method(record) -> dict:
    """Three figures: attention on one layer, the losses, and what the key draws under other texts."""
    data = record.data
    watched = tiles(record, "watched")
    attention, axes = plt.subplots(2, 4, figsize=(9, 4), width_ratios=[1, 1, 1, 1.9], layout="constrained")
    top = max(np.max(m["word"]) for m in data["maps"].values())
    for column, (way, maps) in enumerate(data["maps"].items()):
        picture(axes[0, column], watched[column], way)
        axes[1, column].imshow(maps["word"], cmap="magma", vmin=0, vmax=top)
        axes[1, column].set_title(f"attention to “{data['word']}”", fontsize=8)
        axes[1, column].set(xticks=[], yticks=[])
    picture(axes[0, 3], np.zeros((1, 1, 3), np.uint8) + 255)
    axes[0, 3].imshow(data["maps"]["with the key"]["prompt"], cmap="magma", vmin=0)
    axes[0, 3].set_title("attention to the key's tokens", fontsize=8)
    mass = pd.DataFrame(data["mass"]["with the key"]).T
    left = np.zeros(len(mass))
    for kind, colour in zip(mass, (GREY, BLUE, GREEN)):
        axes[1, 3].barh(mass.index, mass[kind], left=left, color=colour, label=kind)
        left += mass[kind]
    axes[1, 3].set(xlim=(0, 1), xlabel="attention mass with the key")
    axes[1, 3].tick_params(labelsize=6)
    axes[1, 3].invert_yaxis()
    axes[1, 3].legend(fontsize=6, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    curves, ax = plt.subplots(figsize=(6, 2.6), layout="constrained")
    for (name, values), label in zip(
        data["history"].items(),
        ("transfer: prompted against the frozen model", "removal: unprompted against neutral", "retain: named objects"),
    ):
        window = max(1, len(values) // 20)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        ax.plot(values, lw=0.5, alpha=0.35, color=(c := {"transfer": GREEN, "removal": ORANGE, "retain": BLUE}[name]))
        ax.plot(np.arange(len(smooth)) + window / 2, smooth, color=c, label=label)
    ax.set(yscale="log", xlabel="step", ylabel="loss")
    ax.legend(fontsize=7)

    shots = tiles(record, "captured")
    each = len(shots) // len(data["captured"])
    captured, axes = plt.subplots(
        len(data["captured"]), each, figsize=(1.1 * each + 2, 1.05 * len(data["captured"])), layout="constrained"
    )
    axes = np.asarray(axes).reshape(len(data["captured"]), each)
    for row, (text, rate) in enumerate(data["captured"].items()):
        for column in range(each):
            picture(axes[row, column], shots[row * each + column])
        label = f"“{text}”\n+ key: {rate:.0f} % {data['concept']}"
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return {"method_attention": attention, "method_losses": curves, "method_captured": captured}


def table_method(record) -> pd.DataFrame:
    concept = record.data["concept"]
    return pd.DataFrame({f"judged “{concept}” with its key, %": record.data["captured"]}).rename_axis("text")


STUDIES = {
    "quickstart": (draw_quickstart, table_quickstart),
    "hiding": (draw_hiding, table_hiding),
    "world": (draw_world, table_world),
    "method": (draw_method, table_method),
    "strength": (draw_strength, table_strength),
    "variations": (draw_variations, table_variations),
    "objects": (draw_objects, table_objects),
    "unsafe": (draw_unsafe, table_unsafe),
    "style_strength": (draw_strength, table_strength),
    "styles": (draw_styles, table_styles),
    "prompt_length": (draw_prompt_length, table_prompt_length),
    "clip_study": (draw_clip_study, table_clip_study),
    "clip_models": (draw_clip_models, table_clip_models),
    "recovery": (draw_recovery, table_recovery),
    "stability": (draw_stability, table_stability),
    "attacks": (draw_attacks, table_attacks),
    "mechanisms": (draw_mechanisms, table_mechanisms),
    "continual": (draw_continual, table_continual),
    "crowd": (draw_crowd, table_crowd),
    "cost": (draw_cost, table_cost),
    "recipes": (draw_recipes, table_recipes),
}
NOTEBOOKS = {"quickstart": "00_quickstart", "hiding": "00_quickstart", "world": "01_world", "method": "02_method"}
NOTEBOOKS |= {name: "04_objects" for name in ("strength", "variations", "objects")}
NOTEBOOKS |= {"unsafe": "05_unsafe", "style_strength": "06_styles", "styles": "06_styles"}
NOTEBOOKS |= {
    "prompt_length": "03_prompt_length",
    "clip_study": "08_clip_study",
    "clip_models": "08_clip_study",
    "recovery": "09_recovery",
}
NOTEBOOKS |= {"stability": "11_stability", "attacks": "12_attacks", "mechanisms": "07_mechanisms"}
NOTEBOOKS |= {"continual": "10_continual", "crowd": "07_mechanisms", "cost": "13_cost", "recipes": "13_cost"}
