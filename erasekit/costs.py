"""Figures and tables of what erasing and drawing cost."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from .drawing import GREEN, GREY, ORANGE, PURPLE, labelled
from .questions import band, shade


def draw_cost(record) -> dict:
    """Left: evaluations against quality. Middle: rates by the number of sampling steps. Right: drawing with and without a key."""
    rows = pd.DataFrame(record.data["rows"])
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(9.4, 3.4), width_ratios=[1.2, 1.2, 0.6], layout="constrained"
    )
    quality = (rows["ESR-1"] + rows["PSR-1"]) / 2
    left.set_xscale("symlog", linthresh=1000)
    left.set(xlim=(-100, 2 * rows.evaluations.max()), ylim=(quality.min() - 5, 103))
    left.set(xlabel="U-Net evaluations of the training", ylabel="mean of ESR-1 and PSR-1, %", title="training")
    points = dict(zip(rows.method, zip(rows.evaluations, quality)))
    labelled(left, points, gap=(108 - quality.min()) / len(points))
    for drawn in record.data["drawn"]:
        line, method = pd.DataFrame(drawn["points"]), drawn["method"]
        for rate, ls in (("ESR-1", "-"), ("PSR-1", "--")):
            if rate == "PSR-1" or method != "base":
                middle.plot(
                    line.steps, line[rate], ls, color=shade(method), marker="o", ms=3, label=f"{method}: {rate}"
                )
    counts = [point["steps"] for point in record.data["drawn"][0]["points"]]
    middle.set(xscale="log", xlabel="sampling steps", title="the judge's answer, %")
    middle.set_xticks(counts, counts)
    middle.minorticks_off()
    middle.legend(fontsize=6)
    times = relative(record) or {"base": 100.0}
    right.bar(range(len(times)), times.values(), color=[GREY, PURPLE, GREEN], width=0.6)
    for x, value in enumerate(times.values()):
        right.text(x, value, f"{value:.1f}", ha="center", va="bottom", fontsize=8)
    right.set_xticks(range(len(times)), [name.replace(" the ", "\nthe ") for name in times], fontsize=7.5)
    right.set(ylim=(0, 1.15 * max(times.values())), title="seconds of drawing, base = 100")
    return {"cost": figure}


def relative(record) -> dict[str, float]:
    """Seconds of drawing, in percent of the base's; nothing where no model with a key was drawn."""
    seconds = next((drawn["timed"] for drawn in record.data["drawn"] if "timed" in drawn), {})
    return {name: 100 * each / seconds["base"] for name, each in seconds.items()}


def table_cost(record) -> pd.DataFrame:
    """One row a method."""
    rows = pd.DataFrame(record.data["rows"]).set_index("method")
    whole = ["evaluations", "with gradient", "numbers shipped", "peak MB"]
    rows[whole] = rows[whole].astype(int).astype(str)
    for part in ("public", "keys"):
        rows[f"MB, {part}"] = (rows.pop(f"bytes, {part}") / 1e6).map("{:.2f}".format)
    columns = ["evaluations", "with gradient", "seconds", "peak MB", "numbers shipped", "MB, public", "MB, keys"]
    return rows[[*columns, "evaluations a sampling step", "ESR-1", "PSR-1"]].rename_axis(f"{record.data['split']}")


REFERENCE = "kpop, paper's recipe"
COLOURS = {"kpop, ours": GREEN, "kpop, paper's recipe": ORANGE, "esd-x, paper's recipe": GREY}


def draw_recipes(record) -> dict:
    """Above: what is erased and what is kept, against the evaluations spent; a line for each recipe and split, the band its
    training seeds. Below: erased against kept along the step, circles the scales taken; left on the objects that they were
    chosen on, right on what is reported, means over training seeds.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10.4, 6.4), layout="constrained")
    data, lines = record.data, dict(zip(record.data["splits"], ("-", "--", ":")))
    groups = {}
    for run in data["runs"]:
        groups.setdefault((run["recipe"], run["split"]), []).append(run)
    for (name, split), own in groups.items():
        points = [pd.DataFrame(run["points"]) for run in own]
        spent = np.mean([each.evaluations for each in points], axis=0)
        for ax, rate in zip(axes[0], ("ESR-1", "PSR-1")):
            how = {"color": COLOURS[name], "ls": lines[split], "label": f"{name}, {split}"}
            band(ax, spent, [each[rate] for each in points], **how)
    for ax, title in zip(axes[0], ("erased: ESR-1, %", "kept: PSR-1, %")):
        ax.set(xscale="log", xlabel="U-Net evaluations spent (forward passes)", title=title)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.xaxis.set_minor_formatter(NullFormatter())

    def along_step(ax, rows: pd.DataFrame, kept: str, name: str, ls: str = "-"):
        ax.plot(rows["ESR-5"], rows[kept], color=COLOURS[name], marker=".", ls=ls)
        taken = rows[rows.scale == data["taken"][name]["scale"]]
        ax.plot(taken["ESR-5"], taken[kept], "o", ms=9, mfc="none", color=COLOURS[name])

    for name, taken in data["taken"].items():
        own = [p for p in data["sweep"] if (p["recipe"], p["settings"]) == (name, taken["settings"])]
        along_step(axes[1, 0], pd.DataFrame(own), "PSR-1", name)
    for (name, split), own in groups.items():
        if own[0]["curve"]:
            rows = pd.DataFrame([row for run in own for row in run["curve"]])
            along_step(axes[1, 1], rows.groupby("scale", as_index=False).mean(), "others", name, lines[split])
    axes[1, 0].set(xlabel="erased: ESR-5, %", ylabel="kept: PSR-1, %", title="strengths tried on other objects")
    title = "the reported splits along the step"
    axes[1, 1].set(
        xlabel="erased: ESR-5, %", ylabel=f"kept: all {data['sizes']['others']} other objects, %", title=title
    )
    figure.get_layout_engine().set(hspace=0.06)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, handlelength=3)
    return {"recipes": figure}


def table_recipes(record) -> pd.DataFrame:
    """At the end of each training, means over training seeds, and the cost in percent of KPOP's by the paper's recipe."""
    rows = []
    for run in record.data["runs"]:
        rows.append({"recipe": run["recipe"], "split": run["split"]} | run["points"][-1])
    frame = pd.DataFrame(rows)
    names = ["evaluations", "with gradient", "seconds", "ESR-1", "PSR-1", "others", "with the key"]
    names = [name for name in names if name in frame]
    groups = frame.groupby(["split", "recipe"], sort=False)[names]
    table, spread = groups.mean(), groups.std(ddof=0)
    for rate in [name for name in ("ESR-1", "PSR-1", "others") if name in table]:
        table[rate] = [f"{mean:.1f} ± {sd:.1f}" if mean == mean else "" for mean, sd in zip(table[rate], spread[rate])]
    for cost in ("evaluations", "seconds"):
        reference = (
            table[cost].xs(REFERENCE, level="recipe") if REFERENCE in set(frame.recipe) else pd.Series(dtype=float)
        )
        table[f"{cost}, %"] = 100 * table[cost] / reference.reindex(table.index, level="split")
    for count in ("evaluations", "with gradient"):
        if count in table:
            table[count] = table[count].round().astype(int).astype(str)
    if "with the key" in table:  # ESD-x makes none
        table["with the key"] = table["with the key"].map("{:.1f}".format).replace("nan", "")
    table.index = [f"{split}: {recipe}" for split, recipe in table.index]
    return table.rename_axis("at the end of the training; ± over training seeds")
