"""Figures and tables of the comparisons: strength, variations, objects, unsafe content, styles."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from .drawing import BLUE, GREY, OURS, colour, front, labelled, picture, tiles


def panels(count: int):
    """A figure of small panels on shared axes, five in a row, and its axes in reading order."""
    columns = min(5, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(9, 2.0 * rows + 0.2), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, axes.flat


# ------------------------------------------------------------------------------------------------------------ strength


def draw_strength(record) -> dict:
    """A panel a method: each setting a curve along its step from the base; what the comparison takes is filled."""
    name, erased, kept = {
        "strength": ("objects_strength", "ESR-1", "PSR-1"),
        "style_strength": ("styles_strength", "the erased style is not seen", "other styles, style and object right"),
    }[record.path.stem]
    runs, chosen = pd.DataFrame(record.data["runs"]), record.data["chosen"]
    figure, axes = panels(len(chosen))
    for ax, (method, strength) in zip(axes, chosen.items()):
        own = runs[runs.method == method]
        ax.axvspan(record.data.get("enough", 95), 103, color=BLUE, alpha=0.08, lw=0)
        for _, line in own.groupby(own.settings.map(str), sort=False):
            ax.plot(line["ESR-1"], line["PSR-1"], color=colour(method), lw=1, marker="o", mfc="white", ms=4)
        taken = own[[run == strength for run in own[["settings", "scale"]].to_dict("records")]]
        ax.plot(taken["ESR-1"], taken["PSR-1"], "o", color=colour(method), ms=6)
        ax.set(xlim=(-5, 103), ylim=(-5, 103))
        ax.set_title(method, color=colour(method), weight="bold" if method in OURS else "normal")
    figure.supxlabel(f"erased: {erased}, % (shaded: enough)", fontsize=9)
    figure.supylabel(f"kept: {kept}, %", fontsize=9)
    return {name: figure}


def table_strength(record) -> pd.DataFrame:
    """What the comparison takes of each method."""
    chosen, rows = record.data["chosen"], {}
    runs = pd.DataFrame(record.data["runs"])
    for run in record.data["runs"]:
        if {"settings": run["settings"], "scale": run["scale"]} == chosen[run["method"]]:
            how = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in run["settings"].items())
            rates = {k: run.get(k, np.nan) for k in ("ESR-1", "ESR-5", "PSR-1", "object", "with the key") if k in runs}
            rows[run["method"]] = {"setting": how, "scale of the step": run["scale"]} | rates
    return pd.DataFrame(rows).T.fillna("").rename_axis("taken")


# ---------------------------------------------------------------------------------------------------------- variations


def curves(record) -> pd.DataFrame:
    """Each variation's rates at each scale of its step from the base, means over the halves, gentlest first."""
    rows = [{"variation": run["variation"]} | point for run in record.data["runs"] for point in run["curve"]]
    return pd.DataFrame(rows).groupby(["variation", "scale"], sort=False).mean().reset_index()


def draw_variations(record) -> dict:
    """A panel for each variation: its curve, over that of KPOP as it is."""
    frame = curves(record)
    names = [name for name in frame.variation.unique() if name != "kpop"]
    figure, axes = panels(len(names))
    ours, methods = frame[frame.variation == "kpop"], {r["variation"]: r["method"] for r in record.data["runs"]}
    for ax, name in zip(axes, names):
        own, line = frame[frame.variation == name], BLUE if methods[name].startswith("kpop") else "black"
        ax.plot(ours["ESR-1"], ours["PSR-1"], color=OURS["kpop"], lw=4, alpha=0.3)
        ax.plot(own["ESR-1"], own["PSR-1"], color=line, lw=1, marker="o", mfc="white", ms=4)
        ax.set(xlim=(48, 102), ylim=(48, 102))
        ax.set_title(name, color=line)
    figure.supxlabel("erased: ESR-1, % (band: KPOP as it is; black: baselines)", fontsize=9)
    figure.supylabel("kept: PSR-1, %", fontsize=9)
    return {"objects_variations": figure}


def table_variations(record) -> pd.DataFrame:
    """What each curve keeps where 95 % are erased, on straight lines between its points, and as trained.

    A curve that begins above 95 keeps at least what it keeps where it begins; one that ends below has no value.
    """
    frame, rows = curves(record), {}
    keys = pd.DataFrame(record.data["runs"]).groupby("variation")
    for name, own in frame.groupby("variation", sort=False):
        x, y = np.maximum.accumulate(own["ESR-1"].to_numpy()), own["PSR-1"].to_numpy()
        trained = own[own.scale == 1.0].iloc[0]
        rows[name] = {
            "PSR-1 at ESR-1 95": float(np.interp(95, x, y)) if x[-1] >= 95 else np.nan,
            "ESR-1, scale 1": trained["ESR-1"],
            "ESR-5, scale 1": trained["ESR-5"],
            "PSR-1, scale 1": trained["PSR-1"],
        }
        if "with the key" in (group := keys.get_group(name)):
            rows[name]["with the key"] = group["with the key"].mean()
    return pd.DataFrame(rows).T.rename_axis("%, means over two halves")


# ------------------------------------------------------------------------------------------------------------- objects

RATES = ["ESR-1", "ESR-5", "PSR-1", "PSR-5", "others", "neighbours", "other wordings"]


def object_runs(record) -> pd.DataFrame:
    """The runs, with the rate over wordings no method was told."""
    frame = pd.DataFrame(record.data["runs"])
    frame["other wordings"] = [np.mean(list(forms.values())) for forms in frame.forms]
    return frame


def draw_objects(record) -> dict:
    """Erased against kept with the frontier, and the same prompts and seed under every method."""
    frame = object_runs(record)
    frame = frame[frame.retain == record.config["retain"][0]]
    by_split = frame.groupby(["method", "split"], sort=False)[["ESR-1", "PSR-1", "others", "other wordings"]].mean()
    mean, spread = by_split.groupby("method", sort=False).mean(), by_split.groupby("method", sort=False).std()
    scatter, axes = plt.subplots(1, 2, figsize=(9.4, 3.8), layout="constrained")
    for ax, (x, y), (xlabel, ylabel) in zip(
        axes,
        (("ESR-1", "PSR-1"), ("other wordings", "others")),
        (
            ("erased: ESR-1, %", "kept: PSR-1 over the split's other five, %"),
            ("erased under wordings not trained on, %", f"kept: all {record.data['sizes']['others']} other objects, %"),
        ),
    ):
        points = {m: (mean[x][m], mean[y][m]) for m in mean.index}
        # Most lie close together on the right; what erases less than half is named, not drawn.
        far = {m: p for m, p in points.items() if p[0] < 50}
        points = {m: p for m, p in points.items() if m not in far}
        inside = list(points.values()) or [(50, 50)]
        ax.set(
            xlim=(min(x for x, _ in inside) - 2, 101),
            ylim=(min(y for _, y in inside) - 4, 102),
            xlabel=xlabel,
            ylabel=ylabel,
        )
        ax.plot(*zip(*front(inside)), color=BLUE, lw=4, alpha=0.25, zorder=1)
        if far:
            said = ", ".join(f"{m} ({x:.0f}, {y:.0f})" for m, (x, y) in far.items())
            ax.set_title(f"off to the left: {said}", fontsize=7.5, color=GREY, loc="left")
        ax.errorbar(mean[x], mean[y], spread[y], spread[x], fmt="none", ecolor=GREY, elinewidth=0.5, alpha=0.6)
        labelled(ax, points, gap=(ax.get_ylim()[1] - ax.get_ylim()[0]) / 17)
    names = list(record.images)
    split = record.data["splits"][0]
    ten = list(record.data["base"][split]["by_class"])
    grid, axes = plt.subplots(
        len(names), 11, figsize=(8.2, 0.72 * len(names) + 0.5), width_ratios=[1] * 5 + [0.3] + [1] * 5, squeeze=False
    )
    grid.subplots_adjust(left=0.14, right=1, top=0.93, bottom=0, wspace=0.03, hspace=0.05)
    for row, name in enumerate(names):
        axes[row, 5].axis("off")
        for column, image in enumerate(tiles(record, name)):
            ax = axes[row, column + (column > 4)]
            picture(ax, image)
            if row == 0:
                ax.set_title(ten[column].replace(" ", "\n", 1), fontsize=7)
        bold = "bold" if name in OURS else "normal"
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8, color=colour(name), weight=bold)
    grid.text(0.34, 0.985, f"erased ({split})", ha="center", weight="bold")
    grid.text(0.79, 0.985, "kept", ha="center", weight="bold")
    return {"objects_frontier": scatter, "objects_grid": grid} | draw_retain(record)


def draw_retain(record) -> dict:
    """What retaining ten named objects changes against retaining the empty text, where a record holds both."""
    frame = object_runs(record)
    frame = frame[(frame.training_seed == 0) & frame.split.isin(record.data["repeated"])]
    means = frame.groupby(["retain", "method"], sort=False)[["ESR-1", "PSR-1", "others"]].mean()
    options = list(record.config["retain"])
    if len(options) < 2:
        return {}
    named, empty = (means.loc[option] for option in options)
    methods = [m for m in named.index if m in empty.index]
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 0.26 * len(methods) + 0.9), sharey=True, layout="constrained")
    titles = {"ESR-1": "erased: ESR-1, %", "PSR-1": "kept: PSR-1, %", "others": "kept: all other objects, %"}
    for ax, (rate, title) in zip(axes, titles.items()):
        for y, m in enumerate(methods):
            ax.plot([empty[rate][m], named[rate][m]], [y, y], color=colour(m), lw=1)
            ax.scatter([empty[rate][m]], [y], s=26, facecolor="white", edgecolor=colour(m), zorder=3)
            ax.scatter([named[rate][m]], [y], s=26, color=colour(m), zorder=3)
        ax.set(title=title)
        ax.title.set_fontsize(8)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    where = ", ".join(record.data["repeated"])
    figure.supxlabel(
        f"open: the empty text is retained; filled: ten named objects ({where}, one training seed)", fontsize=8
    )
    return {"objects_retain": figure}


def table_objects(record) -> pd.DataFrame:
    """Means over splits; after ± the standard deviation over splits, in brackets that over training seeds where repeated."""
    frame, several = object_runs(record), record.data["training_seeds"] > 1
    if "with the key" not in frame:
        frame["with the key"] = np.nan
    columns = [*RATES, "with the key"]
    base = pd.DataFrame(record.data["base"]).T
    base["other wordings"] = [np.mean(list(forms.values())) for forms in base.forms]
    rows = {"base": {c: f"{base[c].astype(float).mean():.1f}" for c in RATES}}
    for (option, method), own in frame.groupby(["retain", "method"], sort=False):
        by_split = own.groupby("split")[columns].mean()
        over_seeds = own.groupby("split")[columns].std().mean()
        name = method if option == "named" else f"{method}, retain “” ({', '.join(own.split.unique())})"
        rows[name] = {
            c: f"{by_split[c].mean():.1f}"
            + (f" ± {by_split[c].std():.1f}" if len(by_split) > 1 and c in ("ESR-1", "PSR-1", "others") else "")
            + (
                f" ({over_seeds[c]:.1f})"
                if several and c in ("ESR-1", "PSR-1", "others") and over_seeds[c] >= 0
                else ""
            )
            for c in columns
            if by_split[c].notna().all()
        } | {"training, s": f"{own.training_seconds.mean():.0f}"}
    titles = {"others": f"{record.data['sizes']['others']} other objects", "neighbours": "near neighbours"}
    titles["other wordings"] = "ESR-1, other wordings"
    splits = ", ".join(record.data["splits"])
    return pd.DataFrame(rows).T.fillna("").rename(columns=titles).rename_axis(f"%, means over {splits}")


# -------------------------------------------------------------------------------------------------------------- unsafe


def draw_unsafe(record) -> dict:
    """Detections by class, the rate over thresholds, and the images."""
    data = record.data
    runs = [run for run in data["runs"] if run["training_seed"] == 0]
    thresholds, members = data["thresholds"], data["members"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.8), width_ratios=[1.2, 1], layout="constrained")
    rows = [{"method": "base"} | data["base"], *runs]
    counts = pd.DataFrame([run["detections"] for run in rows], index=[run["method"] for run in rows])
    share = counts / max(1, counts.to_numpy().max())
    left.imshow(share, cmap="Reds", vmin=0, vmax=1, aspect="auto")
    for y, x in np.ndindex(*counts.shape):
        dark = share.iat[y, x] > 0.6
        left.text(x, y, counts.iat[y, x], ha="center", va="center", fontsize=7, color="white" if dark else "black")
    left.set_xticks(range(len(members)), members, rotation=35, ha="right", fontsize=7.5)
    left.set_yticks(range(len(rows)), counts.index, fontsize=8)
    left.set_title(f"of {data['N']} images, those with a detection above 0.5")
    right.plot(thresholds, data["base"]["rate"], color="black", lw=1.5)
    ends = {"base": (thresholds[-1], data["base"]["rate"][-1])}
    for run in runs:
        style = "--" if run["method"].endswith("-u") else "-"
        right.plot(thresholds, run["rate"], color=colour(run["method"]), ls=style, lw=1.2)
        ends[run["method"]] = (thresholds[-1], run["rate"][-1])
    right.set(
        xlim=(0, 0.96), ylim=(0, 102), xlabel="threshold", ylabel=f"images with {data['category']} detected above it, %"
    )
    right.set_title("dashed: u, all but cross-attention")
    labelled(right, ends, gap=5.6)
    names, shown = list(record.images), data["shown"]
    grid, axes = plt.subplots(len(names), len(shown), figsize=(6.6, 0.72 * len(names) + 0.4), squeeze=False)
    grid.subplots_adjust(left=0.2, right=1, top=0.93, bottom=0, wspace=0.03, hspace=0.05)
    for row, name in enumerate(names):
        for ax, image, asked in zip(axes[row], tiles(record, name), shown):
            picture(ax, image, asked.replace(" ", "\n", 1) if row == 0 else None)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8, color=colour(name))
    return {"unsafe_detections": figure, "unsafe_grid": grid}


def measured(kept: dict) -> list[str]:
    """What was measured of kept captions, in the tables' order: not every world has real pictures, or captions of objects."""
    return [k for k in ("top-1", "CLIP", "FID", "KID x 1000") if k in kept]


def table_unsafe(record) -> pd.DataFrame:
    """Share of images with a detection at four thresholds, and what the paper has in its COCO columns."""
    data = record.data
    shown = [0.3, 0.5, 0.7, 0.8]
    index = [min(range(len(data["thresholds"])), key=lambda n: abs(data["thresholds"][n] - t)) for t in shown]
    groups = {"base": [data["base"]]}
    for run in data["runs"]:
        groups.setdefault(run["method"], []).append(run)
    rows = {
        name: {f"rate at {t}, %": np.mean([run["rate"][n] for run in own]) for t, n in zip(shown, index)}
        | {f"kept: {k}": np.mean([run["kept"][k] for run in own]) for k in measured(data["base"]["kept"])}
        for name, own in groups.items()
    }
    return pd.DataFrame(rows).T.rename_axis(f"“{data['category']}” hidden")


# -------------------------------------------------------------------------------------------------------------- styles


GRID = ("esd-x", "spm", "kpop")  # what the grid of styles has room for; bars and table have every method


def style_runs(record) -> pd.DataFrame:
    """One row for each method, erased style and style asked for, training seeds averaged."""
    rows = [
        {"method": run["method"], "erased": run["erased"], "style": style}
        | {name: values[style] for name, values in run["by_style"].items()}
        for run in record.data["runs"]
        for style in record.data["styles"]
    ]
    return pd.DataFrame(rows).groupby(["method", "erased", "style"], sort=False).mean().reset_index()


def draw_styles(record) -> dict:
    """For each method a grid whose diagonal must change, and erased against kept by the style judge and by CLIP."""
    data, frame = record.data, style_runs(record)
    methods, styles, erased = list(dict.fromkeys(frame.method)), data["styles"], data["erased"]
    shown = [m for m in methods if m in GRID] or methods
    columns = ["base"] + [name for method in shown for name in ("", *(f"{method}.{gone}" for gone in erased))]
    grid, axes = plt.subplots(
        len(styles),
        len(columns),
        figsize=(0.5 * len(columns) + 0.9, 0.52 * len(styles) + 0.7),
        squeeze=False,
        width_ratios=[1 if name else 0.35 for name in columns],
    )
    grid.subplots_adjust(left=0.07, right=1, top=0.82, bottom=0, wspace=0.04, hspace=0.04)
    for column, name in zip(axes.T, columns):
        if not name:
            for ax in column:
                ax.axis("off")
            continue
        method, _, gone = name.partition(".")
        for ax, image, style in zip(column, tiles(record, name), styles):
            picture(ax, image)
            if style == gone:
                ax.spines[:].set(visible=True, color="#d1603d", linewidth=1.6)
        if gone:
            column[0].set_title(gone, fontsize=6, rotation=30, ha="left", x=0.2)
        if gone in ("", erased[0]):
            column[0].text(0, 1.75, method, transform=column[0].transAxes, weight="bold", color=colour(method))
    for ax, style in zip(axes[:, 0], styles):
        ax.set_ylabel(style, rotation=0, ha="right", va="center", fontsize=7)

    figure, axes = plt.subplots(1, 2, figsize=(9.4, 0.34 * len(methods) + 1), layout="constrained")
    for ax, measure in zip(axes, ("style top-1", "CLIP, whole prompt")):
        before = data["base"]["by_style"][measure]
        frame["drop"] = [before[style] - value for style, value in zip(frame["style"], frame[measure])]
        own = frame[frame.erased == frame["style"]].groupby("method", sort=False)["drop"].mean()
        rest = frame[frame.erased != frame["style"]].groupby("method", sort=False)["drop"].mean()
        y = np.arange(len(methods))
        ax.barh(y - 0.2, own, 0.38, color=[colour(m) for m in own.index])
        ax.barh(y + 0.2, rest, 0.38, color="#d8d8d8")
        ax.set_yticks(y, own.index)
        ax.invert_yaxis()
        ax.axvline(0, color="black", lw=0.6)
        ax.set(xlabel=f"{measure}: lost, points", title="coloured: the erased style; light: the four others")
        ax.title.set_fontsize(8)
    return {"styles_grid": grid, "styles_drop": figure}


def table_styles(record) -> pd.DataFrame:
    """Means over the models, one for each style: the erased style / the four others; and CLIP on captions of what is kept.

    FID and KID are left out: a model's captions leave its erased style out, and the real pictures have all five.
    """
    frame, data, captions = style_runs(record), record.data, "kept captions: CLIP"
    rows = {"base": {name: f"{np.mean(list(v.values())):.1f}" for name, v in data["base"]["by_style"].items()}}
    rows["base"][captions] = data["base"]["kept"]["CLIP"]
    for method, own in frame.groupby("method", sort=False):
        gone = own.erased == own["style"]
        rows[method] = {n: f"{own[gone][n].mean():.1f} / {own[~gone][n].mean():.1f}" for n in data["base"]["by_style"]}
        rows[method][captions] = np.mean([run["kept"]["CLIP"] for run in data["runs"] if run["method"] == method])
    return pd.DataFrame(rows).T.astype({captions: float}).rename_axis("erased style / the others")
