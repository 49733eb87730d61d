"""Figures and tables of what is asked of the prompt: its length, stability, CLIP as a measure, recovery, attacks."""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from .comparisons import panels
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
    lowest = frame[list(titles)].min().min()
    for ax, (rate, title) in zip(axes, titles.items()):
        for place, own in frame.groupby("place", sort=False):
            grid = own.pivot_table(index="training_seed", columns="m", values=rate)
            band(ax, grid.columns, grid.to_numpy(), color=PLACES[place], label=place)
        ax.set(xscale="log", xlabel="prompt length m", title=f"{title}, %", ylim=(lowest - 2, 101.5))
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
            if part != "with the key" or arm == "with transfer":  # without transfer there is no key
                band(left, grid.columns, grid.to_numpy(), color=c, ls=styles[arm], label=f"{part}, {arm}")
    for part in ("concepts", "kept"):
        left.axhline(base[part]["CLIP"], color="black", lw=0.8, ls=":")
    left.text(frame.step.max(), base["kept"]["CLIP"] + 1, "base", fontsize=6.5, va="bottom", ha="right")
    left.set(xlabel="training step", title="CLIP alignment with the prompt")
    left.legend(fontsize=6.5, loc="center right")
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
    """At the same erasure, on straight lines between the steps: what is kept, and how far the weights have moved."""
    frame, rows = pd.json_normalize(record.data["runs"]), {}
    for esr in (50, 80, 95):
        for arm, own in frame.groupby("arm", sort=False):
            found = [at_erasure(run, esr) for _, run in own.groupby("training_seed")]
            rows[f"ESR-1 {esr}, {arm}"] = {name: np.mean([f[name] for f in found]) for name in found[0]}
    return pd.DataFrame(rows).T.rename_axis(f"{record.data['split']}, means over training seeds")


def at_erasure(run: pd.DataFrame, esr: float) -> dict:
    """PSR-1 and the distance moved where a run first erases `esr` percent; NaN where it never does."""
    x = np.maximum.accumulate([0.0, *(100 - run["hidden.top-1"])])
    start = {"kept.top-1": run["kept.top-1"].iloc[0], "moved": 0.0}
    columns = {name: np.array([first, *run[name]], dtype=float) for name, first in start.items()}
    return {
        {"kept.top-1": "PSR-1, %", "moved": "distance moved"}[name]: float(np.interp(esr, x, y))
        if x[-1] >= esr
        else np.nan
        for name, y in columns.items()
    }


# ---------------------------------------------------------------------------------------------------------- CLIP study


def draw_clip_study(record) -> dict:
    """ROC curves of CLIP by form and reference, and the images where it is most wrong."""
    frame = clip_images(record)
    forms = list(record.data["ranks"])
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 3.2), layout="constrained")
    for form, c in zip(forms, (GREEN, PURPLE, GREY)):
        for ax, score, rows in ((axes[0], form, frame), (axes[1], f"{form}, drop", frame[frame["had it"]])):
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
    """One row an image, with its drop from the base's image of the same prompt and seed, and whether that had the style."""
    parts = []
    base = {run["erased"]: run for run in record.data["runs"] if run["method"] == "base"}
    for run in record.data["runs"]:
        part = pd.DataFrame(run).rename_axis("number").reset_index()
        for form in record.data["ranks"]:
            part[f"{form}, drop"] = part[form] - np.asarray(base[run["erased"]][form])
        part["had it"] = np.asarray(base[run["erased"]]["there"]) & (run["method"] != "base")
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def roc(scores, there) -> tuple[np.ndarray, np.ndarray]:
    """The false and the true positive rate at every threshold, from the strictest on."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    hit = np.asarray(there, dtype=bool)[order]
    return tuple(np.concatenate([[0.0], np.cumsum(kind) / max(1, kind.sum())]) for kind in (~hit, hit))


LARGE = 10  # points of CLIP alignment that a reader may take for erased


def table_clip_study(record) -> pd.DataFrame:
    """Areas under the curves by form of the text and by method, rank correlations with the judge, and what a large drop means."""
    frame, rows = clip_images(record), {}
    models = frame[frame.method != "base"].groupby(["method", "erased"], sort=False)
    for form, found in record.data["ranks"].items():
        areas = {"all images": "all", "one style": "within a style", "drop": "drop from the base"}
        row = {name: found[key] for name, key in areas.items()} | found["by method"]
        means = models[[form, "there"]].mean().rank().corr().iat[0, 1]
        row |= {"rho, images": found["spearman"], f"rho, {models.ngroups} models": means}
        large = frame[frame["had it"] & (frame[f"{form}, drop"] <= -LARGE)]
        rows[form] = row | {f"gone where it drops {LARGE}": 1 - large.there.mean()}
    return pd.DataFrame(rows).T.round(2).astype(str).rename_axis("area under the ROC curve; rho: rank correlation")


def draw_clip_models(record) -> dict:
    """How well each CLIP ranks single images, by form of the text, and models by their means."""
    rows = record.data["rows"]
    figure, (ax, right) = plt.subplots(1, 2, figsize=(9.4, 2.8), width_ratios=[2, 1], layout="constrained")
    for n, (form, c) in enumerate(zip(rows[0]["ranks"], (GREEN, PURPLE, GREY))):
        heights = [row["ranks"][form]["all"] for row in rows]
        bars = ax.bar(np.arange(len(rows)) + 0.27 * (n - 1), heights, 0.25, color=c, label=form)
        ax.bar_label(bars, fmt="%.2f", fontsize=7)
    ax.axhline(0.5, color="black", lw=0.5, ls=":")
    knows = [f"\n(knows {row['style_top1']:.0f} % of the art's styles)" if "style_top1" in row else "" for row in rows]
    ax.set_xticks(range(len(rows)), [row["clip"] + known for row, known in zip(rows, knows)], fontsize=7.5)
    ax.set(ylim=(0.4, 1), ylabel="area under the ROC curve", title="single images: with the style, or without")
    bars = right.bar(range(len(rows)), [row["spearman of means"] for row in rows], 0.5, color=GREEN)
    right.bar_label(bars, fmt="%.2f", fontsize=7)
    right.set_xticks(range(len(rows)), [row["clip"] for row in rows], fontsize=7.5)
    right.set(ylim=(0, 1), ylabel="rank correlation with the judge", title="models, by their means")
    ax.legend(fontsize=7, ncols=3, loc="upper right")
    return {"clip_models": figure}


def table_clip_models(record) -> pd.DataFrame:
    """A row a CLIP model: what it knows of the art, and how it ranks erased against not erased."""
    rows = {}
    for row in record.data["rows"]:
        known = {f"knows the {kind}, %": row[f"{kind}_top1"] for kind in ("object", "style") if f"{kind}_top1" in row}
        found = {form: f"{ranks['all']:.2f}, {ranks['drop from the base']:.2f}" for form, ranks in row["ranks"].items()}
        whole = next(iter(row["ranks"].values()))
        correlated = {"rho, images": whole["spearman"], "rho, models": row["spearman of means"]}
        rows[row["clip"]] = known | found | {name: f"{rho:.2f}" for name, rho in correlated.items()}
    return pd.DataFrame(rows).T.rename_axis("area under the ROC curve: all images, drop; rho: whole prompt")


# ------------------------------------------------------------------------------------------------------------ recovery


def draw_recovery(record) -> dict:
    """Who gets it back: every way of asking for every method, and success against the steps an attacker spends."""
    everything = recovery_runs(record)
    frame, weighed = everything[everything.log_weight.isna()], everything[everything.log_weight.notna()]
    grid = recovery_grid(frame)
    figure, ax = plt.subplots(figsize=(9.4, 0.3 * len(grid) + 1.1), layout="constrained")
    ax.imshow(grid, cmap="Greens", vmin=0, vmax=100, aspect="auto")
    for y, x in np.ndindex(*grid.shape):
        if not np.isnan(value := grid.iat[y, x]):
            ax.text(
                x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 60 else "black"
            )
    ax.set_xticks(range(len(grid.columns)), [textwrap.fill(c, 12) for c in grid.columns], fontsize=7.5)
    ax.set_yticks(range(len(grid)), [f"{case}: {method}" for case, method in grid.index], fontsize=8)
    ax.xaxis.tick_top()
    cases = list(dict.fromkeys(frame.case))
    curves, axes = plt.subplots(1, len(cases), figsize=(9.4, 3), sharey=True, squeeze=False, layout="constrained")
    most = frame.pictures.max()
    for ax, case in zip(axes[0], cases):
        for method, own in frame[frame.case == case].groupby("method", sort=False):
            for way, style in (("key found", "-"), ("new words", "--")):
                line = own[(own.way == way) & (own.pictures == most)].groupby("steps").rate.mean()
                at = range(len(line))
                ax.plot(at, line, style, color=shade(method), marker="o", ms=3, label=f"{method}, {way}")
                ax.set_xticks(at, line.index)
        ax.set(title=case, ylim=(-3, 103))
    axes[0, 0].set_ylabel("images that are the concept, %")
    curves.supxlabel(f"steps the attacker spends, with {most} picture{'s' if most > 1 else ''}", fontsize=9)
    curves.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=7, handlelength=3)
    return {"recovery": figure, "recovery_budget": curves, "recovery_strength": draw_weights(record, frame, weighed)}


def draw_weights(record, frame, weighed):
    """What a key opens against its log-weight, from no key on; under each weight an image of KPOP's, for each case."""
    weights = record.data["log_weights"]
    shown = [name for name in record.images if name.endswith(".kpop")]
    figure = plt.figure(figsize=(9.4, 2.4 + 0.8 * len(shown)), layout="constrained")
    grid = figure.add_gridspec(1 + len(shown), 1 + len(weights), height_ratios=[2.4] + [0.8] * len(shown))
    ax = figure.add_subplot(grid[0, :])
    for case, ls in zip(dict.fromkeys(frame.case), ("-", "--", ":")):
        for method, own in weighed[weighed.case == case].groupby("method", sort=False):
            absent = frame[(frame.case == case) & (frame.method == method) & (frame.way == "no key")].rate.mean()
            line = [absent, *own.groupby("log_weight").rate.mean().reindex(weights)]
            ax.plot(range(len(line)), line, ls, color=shade(method), marker="o", ms=3, label=f"{case}: {method}")
    ax.set_xticks(range(1 + len(weights)), ["no key", *(f"{w:+g}" if w else "0: as trained" for w in weights)])
    ax.set(
        xlim=(-0.5, len(weights) + 0.5), ylim=(-3, 103), title="log-weight of the key", ylabel="the concept again, %"
    )
    figure.legend(fontsize=7, handlelength=4, loc="outside upper center", ncols=6)
    for row, name in enumerate(shown, 1):
        for column, image in enumerate(weighed_tiles(record, name)):
            picture(cell := figure.add_subplot(grid[row, column]), image[0])
            if not column:
                cell.set_ylabel(name.split(".")[0], fontsize=8)
    return figure


def weighed_tiles(record, name: str) -> list[list[np.ndarray]]:
    """The images of a key's weights: a list for no key, then one for each log-weight."""
    images, count = tiles(record, name), 1 + len(record.data["log_weights"])
    each = len(images) // count
    return [images[n * each : (n + 1) * each] for n in range(count)]


def recovery_runs(record) -> pd.DataFrame:
    """One row a rate; `log_weight` is that of a weighed key, else NaN."""
    rows = pd.DataFrame(record.data["runs"])
    return rows if "log_weight" in rows else rows.assign(log_weight=np.nan)


def shade(method: str) -> str:
    """A colour for each method where all are told apart: ours have theirs."""
    return OURS.get(method, {"esd-x": BLUE, "uce": "black", "base": "#c9a227"}.get(method, GREY))


def blanked(table: pd.DataFrame) -> pd.DataFrame:
    """The table with nothing written where nothing was measured."""
    return table.round(1).astype(object).where(table.notna(), "")


def recovery_grid(frame: pd.DataFrame) -> pd.DataFrame:
    """Rates by case and method, and by way: for attacks the largest number of steps."""
    last = frame[(frame.steps == frame.steps.max()) | (frame.pictures == 0)].copy()
    last["how"] = [f"{way}, {n} picture{'s' * (n > 1)}" if n else way for way, n in zip(last.way, last.pictures)]
    ways = list(dict.fromkeys(last.sort_values("pictures", kind="stable").how))
    return last.pivot_table(index=["case", "method"], columns="how", values="rate", sort=False).reindex(columns=ways)


def table_recovery(record) -> pd.DataFrame:
    frame = recovery_runs(record)
    grid = recovery_grid(frame[frame.log_weight.isna()])
    grid.index = [f"{case}: {method}" for case, method in grid.index]
    steps = max(run["steps"] for run in record.data["runs"])
    return blanked(grid).rename_axis(f"images that are the concept, % (found: after {steps} steps)")


# ------------------------------------------------------------------------------------------------------------- attacks


def draw_attacks(record) -> dict:
    """A panel for each method: success against the steps an attacker spends, beside the same attack on the base."""
    frame = best_attack(record)
    methods = [m for m in frame.method.unique() if m != "base"]
    figure, axes = panels(len(methods))
    for ax, method in zip(axes, methods):
        for who, c, lw in (("base", GREY, 3), (method, colour(method) if method in OURS else "black", 1.4)):
            for way, ls in (("wording", "--"), ("new words", "-")):
                line = frame[(frame.method == who) & (frame.way == way)].groupby("steps").rate.mean()
                ax.plot(range(len(line)), line, ls, color=c, lw=lw, alpha=0.4 if who == "base" else 1, marker="o", ms=3)
                ax.set_xticks(range(len(line)), line.index, fontsize=6)
        plain = frame[(frame.method == method) & (frame.way == "asked plainly")].rate.mean()
        ax.axhline(plain, color="black", lw=0.5, ls=":")
        ax.set(ylim=(-3, 103))
        ax.set_title(method, color=colour(method), weight="bold" if method in OURS else "normal")
    figure.supxlabel(
        "steps the attacker spends (solid: new words; dashed: a wording; pale: on the base; dotted: asked plainly)",
        fontsize=8,
    )
    figure.supylabel("images that are the concept, %", fontsize=8)
    return {"attacks": figure}


def best_attack(record) -> pd.DataFrame:
    """The rates, of several attack seeds the best at each budget."""
    frame = pd.DataFrame(record.data["runs"])
    return frame.groupby(["method", "concept", "way", "steps"], sort=False).rate.max().reset_index()


def table_attacks(record) -> pd.DataFrame:
    """Means over the attacked concepts: asked plainly, at the start of each search, and at its end."""
    frame = best_attack(record)
    last = frame[(frame.steps == frame.steps.max()) | (frame.steps == 0)].copy()
    last["how"] = [way if way == "asked plainly" else f"{way}, {n} steps" for way, n in zip(last.way, last.steps)]
    ways = list(dict.fromkeys(last.how))
    table = last.pivot_table(index="method", columns="how", values="rate", sort=False).reindex(columns=ways)
    return table.rename_axis("images that are the concept, %")


# ---------------------------------------------------------------------------------------------------------- mechanisms


def draw_mechanisms(record) -> dict:
    """Left: mechanisms. Middle: the weight of the prompted term, in both readings. Right: keys that were never trained."""
    frame = mechanism_runs(record)
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 3.3), width_ratios=[1.3, 1.3, 0.9], layout="constrained")
    left, middle, right = axes
    rates = {"PSR-1": GREY, "with the key": GREEN}
    plain = frame[frame.mechanism.notna() & frame.taught.isna()].groupby("mechanism", sort=False)[list(rates)]
    mean, low, high = plain.mean(), plain.min(), plain.max()
    for n, (rate, c) in enumerate(rates.items()):
        at = np.arange(len(mean)) + 0.36 * (n - 0.5)
        left.barh(at, mean[rate], 0.34, color=c, label=rate)
        left.hlines(at, low[rate], high[rate], color="black", lw=0.8)
    left.set_yticks(range(len(mean)), mean.index)
    left.set(xlim=(0, 103), xlabel=f"%, where {ESR} % are erased", title="how the prompt enters")
    left.set_ylim(len(mean) + 0.1, -0.6)  # downwards, with room for the legend
    left.legend(fontsize=7, ncols=2, loc="lower center")
    for reading, ls in (("recoverable", "-"), ("adversarial", "--")):
        own = frame[frame.reading == reading]
        for rate, c in rates.items() if len(own) else ():
            grid = own.pivot_table(index="training_seed", columns="lam", values=rate, dropna=False)
            band(middle, range(grid.shape[1]), grid.to_numpy(), color=c, ls=ls, label=f"{rate}, {reading}")
            middle.set_xticks(range(grid.shape[1]), [f"{lam:g}" for lam in grid.columns])
    middle.set(ylim=(-3, 103), xlabel="lambda, or b", title="weight of the prompted term")
    middle.legend(fontsize=6, handlelength=4)
    taught, all_ = len(record.data["taught"]), len(record.data["taught"] + record.data["untaught"])
    key_bars(right, frame[frame.taught.notna()], f"keys, {taught} of {all_} taught, %")
    return {"mechanisms": figure}


def key_bars(ax, runs: pd.DataFrame, title: str) -> None:
    """What keys open of concepts they were trained on and of others, for each mechanism; lines span the training seeds."""
    part = runs.groupby("mechanism", sort=False)[["key, taught", "key, untaught"]]
    for n, (rate, c) in enumerate((("key, taught", GREEN), ("key, untaught", BLUE))):
        at = np.arange(part.ngroups) + 0.4 * (n - 0.5)
        ax.bar(at, part.mean()[rate], 0.36, color=c, label=rate)
        ax.vlines(at, part.min()[rate], part.max()[rate], color="black", lw=0.8)
        for x, value in zip(at, part.mean()[rate]):
            ax.text(x, value + 1, f"{value:.0f}", ha="center", fontsize=7)
    ax.set_xticks(range(part.ngroups), ["a prompt each" if name == "shared" else name for name in part.groups])
    ax.set(ylim=(0, 122), title=title)
    ax.legend(fontsize=7, ncols=2)


def draw_crowd(record) -> dict:
    """Keys of many hidden concepts, of which some were never taught."""
    figure, ax = plt.subplots(figsize=(4.2, 2.8), layout="constrained")
    taught, all_ = len(record.data["taught"]), len(record.data["taught"] + record.data["untaught"])
    key_bars(ax, pd.DataFrame(record.data["runs"]), f"keys, {taught} of {all_} hidden objects taught, %")
    return {"mechanisms_crowd": figure}


def table_crowd(record) -> pd.DataFrame:
    runs = pd.DataFrame(record.data["runs"]).set_index("mechanism")
    runs = runs.drop(columns="training_seconds").rename(columns={"kept": f"{record.data['kept']} other objects"})
    return runs.rename_axis(f"{len(record.data['taught'] + record.data['untaught'])} hidden at once, %")


ESR = 90  # percent, at which mechanisms are compared


def mechanism_runs(record) -> pd.DataFrame:
    """One row a run: what was changed, and its rates where it erases `ESR` percent, on straight lines between scales.

    A run that erases more at its gentlest has its rates there; one that never erases so much has none.
    """
    rows = []
    for run in record.data["runs"]:
        points = pd.DataFrame(run["points"]).sort_values("scale")
        x = np.maximum.accumulate(points["ESR-1"].to_numpy())
        names = ("PSR-1", "with the key", "key, taught", "key, untaught")
        there = {n: float(np.interp(ESR, x, points[n])) if x[-1] >= ESR else np.nan for n in names}
        if "taught" not in run["changes"]:
            there |= {"key, taught": np.nan, "key, untaught": np.nan}
        there |= {"read at ESR-1": max(ESR, x[0]) if x[-1] >= ESR else np.nan}
        there |= {"ESR-1, whole step": points["ESR-1"].iloc[-1], "numbers of a key": run["numbers of a key"]}
        rows.append(run["changes"] | {"training_seed": run["training_seed"]} | there)
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=list(dict.fromkeys(["mechanism", "taught", "reading", "lam", *frame.columns])))


def table_mechanisms(record) -> pd.DataFrame:
    """Means over training seeds for each change."""
    frame = mechanism_runs(record)
    whole = len(record.data["taught"] + record.data["untaught"])

    def label(changes):
        if "reading" in changes:
            return (
                f"{changes['reading']}, {'lambda' if changes['reading'] == 'recoverable' else 'b'} = {changes['lam']:g}"
            )
        some = f", {len(changes['taught'])} of {whole} taught" if "taught" in changes else ""
        return f"{changes['mechanism']}{some}"

    frame["change"] = [label(run["changes"]) for run in record.data["runs"]]
    columns = [
        "ESR-1, whole step",
        "read at ESR-1",
        "PSR-1",
        "with the key",
        "key, taught",
        "key, untaught",
        "numbers of a key",
    ]
    table = frame.groupby("change", sort=False)[columns].mean()
    table["numbers of a key"] = table["numbers of a key"].astype(int).astype(str)
    return blanked(table).rename_axis(f"{record.data['split']}, % where {ESR} % are erased")


# ----------------------------------------------------------------------------------------------------------- continual


def continual_parts(run: dict) -> pd.DataFrame:
    """Rows: steps, and last all at once. Mean top-1 of all hidden so far, of the last of them, of what stays, and with keys."""
    rows = []
    for n, after in enumerate([*run["after"], run["at once"]]):
        hidden = list(after["hidden"].values())
        once = n == len(run["after"])
        row = {"hidden so far": np.mean(hidden), "just hidden": np.nan if once else hidden[-1]}
        row["kept"] = np.mean(list(after["kept"].values()))
        if "with the key" in after:
            row["with their keys"] = np.mean(list(after["with the key"].values()))
            row["with the first key"] = next(iter(after["with the key"].values()))
        rows.append(row)
    return pd.DataFrame(rows, index=[*range(1, len(rows)), "all at once"])


def continual_means(record) -> dict[str, pd.DataFrame]:
    """Row -> its parts, means over training seeds."""
    rows: dict[str, list] = {}
    for run in record.data["runs"]:
        rows.setdefault(run["row"], []).append(continual_parts(run))
    return {row: sum(parts) / len(parts) for row, parts in rows.items()}


def draw_continual(record) -> dict:
    """A panel for each way of going on: what was hidden, what stays, and what the keys open, after each step."""
    methods = {run["row"]: run["method"] for run in record.data["runs"]}
    figure, axes = plt.subplots(2, 3, figsize=(9.4, 4.4), sharex=True, sharey=True, layout="constrained")
    colours = {"hidden so far": "black", "just hidden": PURPLE, "kept": GREY}
    colours |= {"with their keys": GREEN, "with the first key": BLUE}
    for ax in axes.flat[len(methods) :]:
        ax.axis("off")
    for ax, (row, parts) in zip(axes.flat, continual_means(record).items()):
        steps = np.arange(1, len(parts))
        for name, values in parts.items():
            ax.plot(steps, values.iloc[:-1], color=colours[name], marker="o", ms=4, label=name)
            ax.plot(len(parts), values.iloc[-1], "D", color=colours[name], mfc="white", ms=5)
        ax.set(ylim=(-3, 103))
        ax.set_title(row, color=colour(methods[row]), weight="bold" if methods[row] in OURS else "normal")
        ax.set_xticks([*steps, len(parts)], [*steps, "at once"], fontsize=7)
    axes.flat[0].legend(fontsize=6.5)
    figure.supxlabel("concepts hidden so far, one after another; open diamonds: all five at once", fontsize=9)
    figure.supylabel("judge's top-1, %", fontsize=9)
    return {"continual": figure}


def table_continual(record) -> pd.DataFrame:
    """After the last step, and all at once."""
    rows = {}
    for row, parts in continual_means(record).items():
        rows[row] = parts.iloc[-2]
        if "rehearsed" not in row:
            rows[f"{row}, all at once"] = parts.iloc[-1]
    count = len(record.data["concepts"])
    return blanked(pd.DataFrame(rows).T).rename_axis(f"judge's top-1, %, after {count} concepts")
