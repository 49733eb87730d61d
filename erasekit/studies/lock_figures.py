"""The tables and figures of the study `lock`, from its record."""

import numpy as np
import pandas as pd

from .lock_aims import (
    MIN_ESR,
    MIN_KEY,
    SCORED,
    SEARCHES,
    SELECTED,
    aims,
    attack_rates,
    other_models,
    probe_rate,
    rate,
    selected_name,
    verdict,
)
from .lock_rates import mean

NAMES = {"synonyms": "unseen synonyms erased"}  # of rates


def table(record) -> pd.DataFrame:
    """The aim, figure by figure: the selected variant's rate, whether it is reached, and the other models' rates.

    Each model's part of its operating point's step stands beside its name. Of attacks and probes the bound is the oracle's rate.
    """
    attacks, names = attack_rates(record).set_index(["model", "attack", "steps"]), model_names(record)
    models = [model for model in names if model != SELECTED]

    def text(found) -> str:
        return "" if found is None else f"{found[0]:.1f} ({found[1]:.0f} to {found[2]:.0f})"

    rows = {}
    for label, what, found, bound, lower in aims(record):
        sign = "at least" if lower else "at most"
        row = {SELECTED: text(found), "aim": "" if bound is None else f"{sign} {bound:g}"}
        row["reached?"] = verdict(found, bound, lower)
        for model in models:
            if what == "attack":
                attack, steps = label.removesuffix(" steps").rsplit(", ", 1)
                at = model, attack, int(steps)
                own = tuple(attacks.loc[at, ["rate", "low", "high"]]) if at in attacks.index else None
            elif what == "probe":
                own = probe_rate(record, model, label)
            else:
                own = rate(record, model, record.settings["compared"], what)
            row[names[model]] = text(own)
        rows[NAMES.get(label, label)] = row
    factors = {SELECTED: record.data["selected"]["factor"]} | dict.fromkeys(models, record.settings["compared"])
    others = {model: text(rate(record, model, factor, "others")) for model, factor in factors.items()}
    rows["other objects kept"] = {SELECTED if m == SELECTED else names[m]: own for m, own in others.items()}
    return pd.DataFrame(rows).T.fillna("").rename_axis(f"rate, % (95 % interval); selected: {selected_name(record)}")


def model_names(record) -> dict[str, str]:
    """Model -> its name with the part of its step at which it is compared; base and oracle have none."""
    found = {SELECTED: f"selected: {selected_name(record)}"}
    for model in other_models(record):
        found[model] = model if model in ("base", "oracle") else f"{model}, × {record.settings['compared']:g}"
    return found


def search_table(record) -> pd.DataFrame:
    """Every candidate of the search on the tuning concepts, with the score that the rule compares; the selected one is marked."""
    chosen, rows = record.data["selected"], {}
    for row in record.data["search"]:
        score = mean([row[n] for n in SCORED])
        mark = " (selected)" if all(row[n] == chosen[n] for n in ("variant", "factor")) else ""
        names = ("ESR-1", "PSR-1", "synonyms", "right key", "resistance")
        rows[f"{row['variant']}, × {row['factor']:g}{mark}"] = {n: row[n] for n in names} | {"score": score}
    return pd.DataFrame(rows).T.round(1).rename_axis("tuning concepts, %")


def figures(record) -> dict:
    """Candidates of the search; what the selected one reaches; and the attacks on each model against their steps."""
    return {
        "lock_search": search_figure(record),
        "lock_aims": aims_figure(record),
        "lock_attacks": attack_figure(record),
    }


def search_figure(record):
    """Left: a row for each candidate, what the rule accepts first, then by score. Right: erasing against resisting."""
    import matplotlib.pyplot as plt

    from .kit.plots import COLORS, heatmap

    frame = search_table(record)
    accepted = (frame["ESR-1"] >= MIN_ESR) & (frame["right key"] >= MIN_KEY)
    frame = frame.assign(accepted=accepted).sort_values(["accepted", "score"], ascending=False)
    accepted = frame.pop("accepted")
    size = {"figsize": (9.4, 0.26 * len(frame) + 1.4), "width_ratios": (1.5, 1)}
    figure, (ax, trade) = plt.subplots(1, 2, layout="constrained", **size)
    demands = {"ESR-1": f"ESR-1\n≥ {MIN_ESR:g}", "right key": f"right key\n≥ {MIN_KEY:g}", "synonyms": "syno-\nnyms"}
    demands["resistance"] = "resist-\nance"
    heatmap(ax, frame.rename(columns=demands), "", "{:.1f}", cmap="cividis", colorbar=False, vmin=0, vmax=100)
    for label in ax.get_yticklabels():
        label.set_weight("bold" if label.get_text().endswith("(selected)") else "normal")
    ax.axhline(accepted.sum() - 0.5, color="white", lw=5)
    ax.xaxis.tick_top()
    ax.set_xlabel("above the gap: what the rule accepts")
    selected = frame.index.str.endswith("(selected)")
    trade.axvspan(MIN_ESR, 102, color=COLORS["green"], alpha=0.15, lw=0)
    trade.scatter(frame["ESR-1"], frame.resistance, s=28, c=np.where(selected, COLORS["red"], COLORS["grey"]), zorder=3)
    for name in (frame.index[selected][0], frame.resistance[~selected].idxmax()):
        below = name in frame.index[selected]
        text = {"textcoords": "offset points", "ha": "right", "va": "top" if below else "bottom", "fontsize": 7.5}
        point = frame.loc[name, ["ESR-1", "resistance"]]
        trade.annotate(name.replace(", ", ",\n", 1).replace(" (", "\n("), point, (-5, -5 if below else 5), **text)
    trade.set(xlim=(frame["ESR-1"].min() - 5, 102), ylim=(-3, 103))
    trade.set(xlabel="erased: ESR-1, %", ylabel="attacks resisted, %")
    trade.set_title("a lock would be in the green, at the top")
    return figure


def aims_figure(record):
    """A row for each aim: the selected variant's rate with its interval, and the range that was aimed at."""
    from .kit import plots

    rows = [(NAMES.get(label, label), *rest) for label, _, *rest in aims(record)]
    figure, [ax] = plots.panels(1, columns=1, height=0.25 * len(rows) + 0.6, width=6.4)
    looks = {"reached": plots.COLORS["green"], "not reached": plots.COLORS["red"]}
    for y, (_, found, bound, lower) in enumerate(rows):
        said = verdict(found, bound, lower)
        color = looks.get(said, plots.COLORS["grey"])
        if bound is not None:
            left, right = (bound, 100) if lower else (0, max(bound, 0.5))
            ax.barh(y, right - left, left=left, height=0.8, color=plots.COLORS["green"], alpha=0.25, lw=0)
        if found is not None:
            value, low, high = found
            sides = [[max(value - low, 0)], [max(high - value, 0)]]
            ax.errorbar([value], [y], xerr=sides, fmt="o", ms=5, lw=1, color=color)
        ax.text(104, y, said, va="center", fontsize=8, color=color)
    ax.set_yticks(range(len(rows)), [label for label, *_ in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    plots.percent_axis(ax, "x", f"{selected_name(record)}, with 95 % intervals; green bars: the aim, %")
    return figure


def attack_figure(record):
    """Success against attack steps, a panel for each attack; the oracle's is the floor."""
    import matplotlib.pyplot as plt

    from .kit.plots import COLORS, percent_axis, style

    frame, names = attack_rates(record), model_names(record)
    variant = record.data["selected"]["variant"]
    known = variant in record.settings["models"]
    own = {SELECTED: style(variant) if known else {"color": COLORS["purple"], "marker": "o"}}
    own |= {
        "oracle": {"color": COLORS["black"], "marker": "*", "ls": "--"},
        "base": {"color": "#999999", "marker": "."},
    }
    figure, axes = plt.subplots(1, len(SEARCHES), figsize=(9.4, 3.2), sharey=True, layout="constrained")
    for ax, attack in zip(axes, SEARCHES):
        part = frame[(frame.attack == attack) & frame.model.isin([*names])]
        steps = sorted(part.steps.unique())
        for n, (model, rows) in enumerate(part.groupby("model", sort=False)):
            x = [steps.index(step) + 0.06 * (n - 2.5) for step in rows.steps]
            spread = np.clip([rows.rate - rows.low, rows.high - rows.rate], 0, None)
            look = own.get(model) or style(model)
            width = 2.2 if model == SELECTED else 1.2
            ax.errorbar(x, rows.rate, yerr=spread, ms=5, lw=width, elinewidth=0.8, label=names[model], **look)
        ax.set_xticks(range(len(steps)), steps)
        ax.set(title=attack, xlabel=f"attack steps, on {record.settings['attack_images']} pictures of the class")
    percent_axis(axes[0], "y", "images that show the class, %")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, loc="outside upper center")
    return figure
