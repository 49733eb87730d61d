"""Figures and tables of what is asked of the prompt: its length, stability, CLIP as a measure, recovery, attacks."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from .drawing import BLUE, GREEN, GREY, OURS, PURPLE, colour, picture, tiles


def band(ax, x, rows, **how) -> None:
    """A line through the means of `rows` (one a training seed, over x), with the range they span."""
    rows = np.asarray(rows, dtype=float)
    ax.plot(x, rows.mean(0), marker="o", ms=4, **how)
    if len(rows) > 1:
        ax.fill_between(x, rows.min(0), rows.max(0), color=how["color"], alpha=0.15, lw=0)


# ------------------------------------------------------------------------------------------------------- prompt length

PLACES = {"mid": GREY, "mid+up": BLUE, "all": GREEN}


def draw_prompt_length(record) -> dict:
    """ESR, PSR and recovery against the prompt's length; a line for each place, the band its training seeds."""
    frame = pd.DataFrame(record.data["runs"])
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 2.9), sharey=True, layout="constrained")
    titles = {"ESR-1": "erased: ESR-1", "PSR-1": "kept: PSR-1", "with the key": "brought back by the keys"}
    for ax, (rate, title) in zip(axes, titles.items()):
        for place, own in frame.groupby("place", sort=False):
            grid = own.pivot_table(index="training_seed", columns="m", values=rate)
            band(ax, grid.columns, grid.to_numpy(), color=PLACES[place], label=place)
        ax.set(xscale="log", xlabel="prompt length m", title=f"{title}, %", ylim=(-3, 103))
        ax.set_xticks(lengths := sorted(frame.m.unique()), lengths)
        ax.minorticks_off()
    axes[2].legend(title="prompted layers", fontsize=8, title_fontsize=8)
    return {"prompt_length": figure}


def table_prompt_length(record) -> pd.DataFrame:
    """Means over training seeds, for each place and length."""
    frame = pd.DataFrame(record.data["runs"])
    rates = frame.groupby(["place", "m"], sort=False)[["ESR-1", "ESR-5", "PSR-1", "PSR-5", "with the key"]].mean()
    rates.index = [f"{place}, m = {m}" for place, m in rates.index]
    return rates.rename_axis(f"{record.data['split']}, %")


# ----------------------------------------------------------------------------------------------------------- stability


def draw_stability(record) -> dict:
    """Left: CLIP along the training. Right: what is kept, and how far the weights moved, at the same erasure."""
    runs, base = record.data["runs"], record.data["base"]
    frame = pd.json_normalize(runs)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.4, 3.1), layout="constrained")
    styles = {"with transfer": "-", "removal alone": "--"}
    for part, c in (("hidden", PURPLE), ("with the key", GREEN), ("kept", GREY)):
        for arm, own in frame.groupby("arm", sort=False):
            grid = own.pivot_table(index="training_seed", columns="step", values=f"{part}.CLIP")
            if part != "with the key" or arm == "with transfer":
                band(left, grid.columns, grid.to_numpy(), color=c, ls=styles[arm], label=f"{part}, {arm}")
    left.axhline(base["concepts"]["CLIP"], color="black", lw=0.8, ls=":")
    left.text(frame.step.max(), base["concepts"]["CLIP"], "base ", fontsize=7, va="bottom", ha="right")
    left.set(xlabel="training step", title="CLIP alignment with the prompt")
    left.legend(fontsize=6.5)
    for arm, own in frame.groupby("arm", sort=False):
        c = GREEN if arm == "with transfer" else GREY
        mean = own.groupby("step")[["hidden.top-1", "kept.top-1", "moved"]].mean()
        for ax, y in ((middle, "kept.top-1"), (right, "moved")):
            ax.scatter(100 - own["hidden.top-1"], own[y], color=c, s=10, alpha=0.4)
            ax.plot(100 - mean["hidden.top-1"], mean[y], color=c, ls=styles[arm], marker="o", ms=4, label=arm)
    middle.set(xlabel="erased: ESR-1, %", title="kept: PSR-1, %")
    right.set(xlabel="erased: ESR-1, %", title="distance the weights moved")
    right.legend(fontsize=8)
    return {"stability": figure}


def table_stability(record) -> pd.DataFrame:
    """Means over training seeds at each step."""
    frame = pd.json_normalize(record.data["runs"])
    table = frame.groupby(["arm", "step"], sort=False)[
        ["hidden.top-1", "hidden.CLIP", "with the key.top-1", "with the key.CLIP", "kept.top-1", "kept.CLIP", "moved"]
    ].mean()
    table.index = [f"{arm}, step {step}" for arm, step in table.index]
    return table.rename_axis(record.data["split"])


# ---------------------------------------------------------------------------------------------------------- CLIP study


def draw_clip_study(record) -> dict:
    """ROC curves of CLIP by form and reference, and the images where it is most wrong."""
    frame = clip_images(record)
    forms = list(record.data["ranks"])
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 3.2), layout="constrained")
    for form, c in zip(forms, (GREEN, PURPLE, GREY)):
        for ax, score, rows in ((axes[0], form, frame), (axes[1], f"{form}, drop", frame[frame.method != "base"])):
            ax.plot(*roc(rows[score], rows.there), color=c, lw=1.4, label=form)
        axes[2].scatter(frame[form], frame.judge, s=4, alpha=0.4, color=c)
    for ax, title in ((axes[0], "CLIP as it is"), (axes[1], "drop from the base's own image")):
        ax.plot([0, 1], [0, 1], color="black", lw=0.5, ls=":")
        ax.set(xlabel="without the style, passed", ylabel="with the style, passed", title=title)
    axes[0].legend(fontsize=7.5, loc="lower right")
    axes[2].set(xlabel="CLIP alignment", ylabel="judge's probability of the style", title="every image")
    wrong, rows = plt.subplots(2, 10, figsize=(9.4, 2.3), squeeze=False)
    wrong.subplots_adjust(left=0.13, right=1, top=0.86, bottom=0, wspace=0.05, hspace=0.35)
    shown = {name: tiles(record, name) for name in record.images}
    form = forms[0]
    gone, there = frame[~frame.there & (frame.method != "base")], frame[frame.there & (frame.method != "base")]
    for axes, picked, label in (
        (rows[0], gone.nlargest(10, form), "CLIP highest,\nstyle gone"),
        (rows[1], there.nsmallest(10, form), "CLIP lowest,\nstyle there"),
    ):
        for ax in axes:
            ax.axis("off")
        for ax, (_, image) in zip(axes, picked.iterrows()):
            picture(ax, shown[f"{image.method}.{image.erased}"][image.number], f"{image[form]:.0f} · {image.erased}")
            ax.title.set_fontsize(6.5)
        axes[0].text(-0.15, 0.5, label, transform=axes[0].transAxes, ha="right", va="center", fontsize=8)
    return {"clip_roc": figure, "clip_failures": wrong}


def clip_images(record) -> pd.DataFrame:
    """One row an image, with its drop from the base's image of the same prompt and seed."""
    parts = []
    base = {run["erased"]: run for run in record.data["runs"] if run["method"] == "base"}
    for run in record.data["runs"]:
        part = pd.DataFrame(run).rename_axis("number").reset_index()
        for form in record.data["ranks"]:
            part[f"{form}, drop"] = part[form] - np.asarray(base[run["erased"]][form])
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def roc(scores, there) -> tuple[np.ndarray, np.ndarray]:
    """The false and the true positive rate at every threshold, from the strictest on."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    hit = np.asarray(there, dtype=bool)[order]
    return tuple(np.concatenate([[0.0], np.cumsum(kind) / max(1, kind.sum())]) for kind in (~hit, hit))


def table_clip_study(record) -> pd.DataFrame:
    """Areas under the curves by form of the text, and by method."""
    rows = {}
    for form, found in record.data["ranks"].items():
        rows[form] = {k: v for k, v in found.items() if k != "by method"} | found["by method"]
    return pd.DataFrame(rows).T.round(3).astype(str).rename_axis("area under the ROC curve")


# ------------------------------------------------------------------------------------------------------------ recovery


def draw_recovery(record) -> dict:
    """Who gets it back: every way of asking for every method, and success against the steps an attacker spends."""
    everything = pd.DataFrame(record.data["runs"])
    weighed = everything[everything.way.str.startswith("log-weight")]
    frame = everything.drop(weighed.index)
    grid = recovery_grid(frame)
    figure, ax = plt.subplots(figsize=(9.4, 0.3 * len(grid) + 1.1), layout="constrained")
    ax.imshow(grid, cmap="Greens", vmin=0, vmax=100, aspect="auto")
    for y, x in np.ndindex(*grid.shape):
        if not np.isnan(value := grid.iat[y, x]):
            ax.text(
                x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 60 else "black"
            )
    ax.set_xticks(range(len(grid.columns)), [c.replace(", ", ",\n", 1) for c in grid.columns], fontsize=7.5)
    ax.set_yticks(range(len(grid)), [f"{case}: {method}" for case, method in grid.index], fontsize=8)
    ax.xaxis.tick_top()
    cases = list(dict.fromkeys(frame.case))
    curves, axes = plt.subplots(1, len(cases), figsize=(9.4, 3), sharey=True, squeeze=False, layout="constrained")
    most = frame.pictures.max()
    for ax, case in zip(axes[0], cases):
        for method, own in frame[frame.case == case].groupby("method", sort=False):
            start = own[own.way == "no key"].rate.mean()
            for way, style in (("key found", "-"), ("words found", "--")):
                line = own[(own.way == way) & (own.pictures == most)].groupby("steps").rate.mean()
                ax.plot(
                    [0, *line.index],
                    [start, *line],
                    style,
                    color=shade(method),
                    marker="o",
                    ms=3,
                    label=f"{method}, {way}",
                )
        ax.set(xlabel="steps the attacker spends", title=case, ylim=(-3, 103))
    axes[0, 0].set_ylabel("images that are the concept, %")
    axes[0, -1].legend(fontsize=6.5)
    strength, ax = plt.subplots(figsize=(5.2, 2.8), layout="constrained")
    for (case, method), own in weighed.groupby(["case", "method"], sort=False):
        line = own.assign(weight=own.way.str.split().str[-1].astype(float)).groupby("weight").rate.mean()
        ls = dict(zip(cases, ("-", "--", ":")))[case]
        ax.plot(line.index, line, ls, color=shade(method), marker="o", ms=3, label=f"{method}: {case}")
    ax.set(
        xlabel="log-weight of the key (none: minus infinity)", ylabel="images that are the concept, %", ylim=(-3, 103)
    )
    ax.legend(fontsize=7)
    return {"recovery": figure, "recovery_budget": curves, "recovery_strength": strength}


def shade(method: str) -> str:
    """A colour for each method where all are told apart: ours have theirs."""
    return OURS.get(method, {"esd-x": BLUE, "uce": "black"}.get(method, GREY))


def recovery_grid(frame: pd.DataFrame) -> pd.DataFrame:
    """Rates by case and method, and by way: for attacks the largest number of steps."""
    last = frame[frame.steps.isin([0, frame.steps.max()])].copy()
    last["how"] = [f"{way}, {n} picture{'s' * (n > 1)}" if n else way for way, n in zip(last.way, last.pictures)]
    ways = list(dict.fromkeys(last.sort_values("pictures", kind="stable").how))
    return last.pivot_table(index=["case", "method"], columns="how", values="rate", sort=False).reindex(columns=ways)


def table_recovery(record) -> pd.DataFrame:
    frame = pd.DataFrame(record.data["runs"])
    grid = recovery_grid(frame[~frame.way.str.startswith("log-weight")])
    grid.index = [f"{case}: {method}" for case, method in grid.index]
    steps = max(run["steps"] for run in record.data["runs"])
    return grid.rename_axis(f"images that are the concept, % (found: after {steps} steps)")


# ------------------------------------------------------------------------------------------------------------- attacks


def draw_attacks(record) -> dict:
    """Success against the steps an attacker spends, for each method: a wording before the prompt, and new words."""
    frame = pd.DataFrame(record.data["runs"])
    ways = list(dict.fromkeys(frame.way))
    figure, axes = plt.subplots(1, len(ways), figsize=(9.4, 3.2), sharey=True, squeeze=False, layout="constrained")
    for ax, way in zip(axes[0], ways):
        for method, own in frame[frame.way == way].groupby("method", sort=False):
            line = own.groupby("steps").rate.mean()
            ax.plot(line.index, line, color=colour(method), marker="o", ms=3, lw=1.8 if method in OURS else 0.9)
            ax.text(line.index[-1], line.iloc[-1], f" {method}", fontsize=7, va="center", color=colour(method))
        ax.set(xlabel="steps the attacker spends", title=way, ylim=(-3, 103), xlim=(0, 1.2 * frame.steps.max()))
    axes[0, 0].set_ylabel("images that are the concept, %")
    return {"attacks": figure}


def table_attacks(record) -> pd.DataFrame:
    """Means over the attacked concepts."""
    frame = pd.DataFrame(record.data["runs"])
    frame["how"] = [f"{way}, {steps} steps" if steps else "asked plainly" for way, steps in zip(frame.way, frame.steps)]
    ways = list(dict.fromkeys(frame.sort_values(["steps"], kind="stable").sort_values("way", kind="stable").how))
    table = frame.pivot_table(index="method", columns="how", values="rate", sort=False).reindex(columns=ways)
    return table.rename_axis("images that are the concept, %")


# ---------------------------------------------------------------------------------------------------------- mechanisms


def draw_mechanisms(record) -> dict:
    """Left: mechanisms. Middle: the weight of the prompted term, in both readings. Right: keys that were never trained."""
    frame = mechanism_runs(record)
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 3.3), width_ratios=[1.3, 1.3, 0.9], layout="constrained")
    left, middle, right = axes
    rates = {"ESR-1": PURPLE, "PSR-1": GREY, "with the key": GREEN}
    plain = frame[frame.mechanism.notna() & frame.taught.isna()].groupby("mechanism", sort=False)[list(rates)]
    mean, low, high = plain.mean(), plain.min(), plain.max()
    for n, (rate, c) in enumerate(rates.items()):
        at = np.arange(len(mean)) + 0.26 * (n - 1)
        left.barh(at, mean[rate], 0.24, color=c, label=rate)
        left.hlines(at, low[rate], high[rate], color="black", lw=0.8)
    left.set_yticks(range(len(mean)), mean.index)
    left.invert_yaxis()
    left.set(xlim=(0, 103), xlabel="%", title="how the prompt enters")
    for reading, ls in (("recoverable", "-"), ("adversarial", "--")):
        own = frame[frame.reading == reading]
        for rate, c in rates.items() if len(own) else ():
            grid = own.pivot_table(index="training_seed", columns="lam", values=rate)
            band(middle, range(grid.shape[1]), grid.to_numpy(), color=c, ls=ls, label=f"{rate}, {reading}")
            middle.set_xticks(range(grid.shape[1]), [f"{lam:g}" for lam in grid.columns])
    middle.set(ylim=(-3, 103), xlabel="lambda, or b", title="weight of the prompted term")
    middle.legend(fontsize=6)
    part = frame[frame.taught.notna()].groupby("mechanism", sort=False)[["key, taught", "key, untaught"]].mean()
    for n, (rate, c) in enumerate((("key, taught", GREEN), ("key, untaught", BLUE))):
        right.bar(np.arange(len(part)) + 0.4 * (n - 0.5), part[rate], 0.36, color=c, label=rate)
    right.set_xticks(range(len(part)), ["a prompt each" if name == "shared" else name for name in part.index])
    right.set(ylim=(0, 118), title="keys of concepts not taught, %")
    right.legend(fontsize=7, ncols=2)
    return {"mechanisms": figure}


def mechanism_runs(record) -> pd.DataFrame:
    """The runs with what was changed as columns, missing where it was not."""
    rows = [run["changes"] | {k: v for k, v in run.items() if k != "changes"} for run in record.data["runs"]]
    return pd.DataFrame(rows).reindex(
        columns=list(dict.fromkeys(["mechanism", "taught", "reading", "lam", *(k for r in rows for k in r)]))
    )


def table_mechanisms(record) -> pd.DataFrame:
    """Means over training seeds for each change."""
    frame = pd.DataFrame(record.data["runs"])
    frame["change"] = [
        ", ".join(f"{k} {'+'.join(v) if isinstance(v, list) else v}" for k, v in changes.items())
        for changes in frame.changes
    ]
    columns = ["ESR-1", "PSR-1", "with the key", "key, taught", "key, untaught", "training_seconds"]
    return frame.groupby("change", sort=False)[columns].mean().rename_axis(f"{record.data['split']}, %")


# ----------------------------------------------------------------------------------------------------------- continual


def continual_parts(run: dict) -> pd.DataFrame:
    """Rows: steps. Mean top-1 of what was just hidden, of what was hidden earlier, of what stays, and with the keys."""
    rows = []
    for n, after in enumerate(run["after"]):
        hidden = list(after["hidden"].values())
        row = {"just hidden": hidden[-1], "hidden earlier": np.mean(hidden[:-1]) if n else np.nan}
        row["kept"] = np.mean(list(after["kept"].values()))
        if "with the key" in after:
            row["with their keys"] = np.mean(list(after["with the key"].values()))
            row["with the first key"] = next(iter(after["with the key"].values()))
        rows.append(row)
    return pd.DataFrame(rows, index=range(1, len(rows) + 1))


def draw_continual(record) -> dict:
    """A panel for each way of going on: what was hidden, what stays, and what the keys open, after each step."""
    runs = record.data["runs"]
    figure, axes = plt.subplots(2, 3, figsize=(9.4, 4.4), sharex=True, sharey=True, layout="constrained")
    colours = {
        "just hidden": PURPLE,
        "hidden earlier": "black",
        "kept": GREY,
        "with their keys": GREEN,
        "with the first key": BLUE,
    }
    for ax in axes.flat[len(runs) :]:
        ax.axis("off")
    for ax, run in zip(axes.flat, runs):
        for name, values in continual_parts(run).items():
            ax.plot(values.index, values, color=colours[name], marker="o", ms=4, label=name)
        ax.set(ylim=(-3, 103))
        ax.set_title(run["row"], color=colour(run["method"]), weight="bold" if run["method"] in OURS else "normal")
        ax.set_xticks(range(1, len(run["after"]) + 1))
    axes.flat[0].legend(fontsize=6.5)
    figure.supxlabel("concepts hidden so far, one after another", fontsize=9)
    figure.supylabel("judge's top-1, %", fontsize=9)
    return {"continual": figure}


def table_continual(record) -> pd.DataFrame:
    """After the last step."""
    rows = {run["row"]: continual_parts(run).iloc[-1] for run in record.data["runs"]}
    count = len(record.data["concepts"])
    return pd.DataFrame(rows).T.rename_axis(f"judge's top-1, %, after {count} concepts")
