"""One table of methods by what was measured of them: the mean and 95 % interval of each, as its study's own table has it."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from ..studies import module
from ..studies.kit import plots
from ..studies.kit.probed import BASE, ORACLE
from ..studies.kit.records import Record
from ..studies.operating_points import PUBLIC

NOT_REACHED = "not reached"


def kept(record: Record) -> dict[str, str]:
    """Other objects kept where a method first erases the target, see the study `stronger`."""
    from ..studies.kit.erasures import TARGET_ESR
    from ..studies.stronger import by_class, equal_erasure, intervals

    found = {"base": f"{sum(base['others'] for base in record.data['base'].values()) / len(record.data['base']):.1f}"}
    for method in record.settings["methods"]:
        _, rates = equal_erasure(record, method)
        most = max(point["ESR-1"].mean() for point in by_class(record, method))
        low, high = intervals(record, rates)["others"]
        text = f"{rates['others'].mean():.1f} ({low:.0f} to {high:.0f})"
        found[method] = text if most >= TARGET_ESR else NOT_REACHED
    return found


def column(name: str) -> Callable[[Record], dict[str, str]]:
    """A column of the study's table, whose rows are methods."""
    return lambda record: _named(module(record.study).table(record)[name])


def row(name: str) -> Callable[[Record], dict[str, str]]:
    """A row of the study's table, whose columns are models."""
    return lambda record: _named(module(record.study).table(record).loc[name])


def _named(cells: pd.Series) -> dict[str, str]:
    return {str(name).split(" (")[0]: str(cell) for name, cell in cells.items()}


def words(record: Record) -> dict[str, str]:
    """Ten new words learned in the fewest steps of the study `attacks`."""
    from ..studies.attacks import best_attacks
    from ..studies.kit.attack_sweep import rate_table

    frame = best_attacks(record)
    own = frame[(frame.attack == "textual inversion") & (frame.steps == frame.steps[frame.steps > 0].min())]
    return _named(rate_table(own, record.data["N"], "method", "attack")["textual inversion"])


def most_at_once(rate: str) -> Callable[[Record], dict[str, str]]:
    """A rate of the study `scale` with the most concepts at once."""

    def cells(record: Record) -> dict[str, str]:
        table, end = module(record.study).table(record), f", {max(record.settings['counts'])}"
        head = {"kept": f"{record.data['kept']} other objects"}.get(rate, rate)
        return {name.removesuffix(end): str(cell) for name, cell in table[head].items() if name.endswith(end)}

    return cells


ROWS = (BASE, ORACLE, *PUBLIC)
MORE, LESS = 1, -1  # which is better
# Heading -> study, the cells that it has of each model, and which of two numbers is better.
COLUMNS: dict[str, tuple[str, Callable[[Record], dict[str, str]], int]] = {
    "kept at 95 % erased": ("stronger", kept, MORE),
    "erased by synonyms": ("objects", column("ESR-1, synonyms seen"), MORE),
    "10 new words, 10 steps": ("attacks", words, LESS),
    "2 of 15 steps by the base": ("probes", row("completion, 2 steps"), LESS),
    "100 steps of fine-tuning on other objects": ("probes_weights", row("fine-tuning, 100 steps: erased"), LESS),
    "steps to learn it again": ("probes_weights", row("LoRA, 5 pictures: steps to 50 %"), MORE),
    "100 concepts, erased": ("scale", most_at_once("ESR-1"), MORE),
    "100 concepts, kept": ("scale", most_at_once("kept"), MORE),
    "U-Net evaluations": ("cost", column("evaluations"), LESS),
}


def summary(records: dict[str, Record]) -> list[list[str]]:
    """The head, then a row for each model of `ROWS`, methods by what they keep; a study without a record has no column."""
    cells = {head: read(records[study]) for head, (study, read, _) in COLUMNS.items() if study in records}
    rows = [[name, *(own.get(name, "") for own in cells.values())] for name in ROWS]
    return [["model", *cells], *rows[:2], *sorted(rows[2:], key=_kept, reverse=True)]


def _kept(row: list[str]) -> float:
    """The first number of a row; -1 without one."""
    return next((float(cell.split(" (")[0]) for cell in row[1:2] if cell[:1].isdigit()), -1.0)


def draw_summary(rows: list[list[str]], file: Path) -> None:
    """The table of `summary` as a picture: each number over its interval, darker where it is better within its column."""
    (_, *heads), *models = rows
    texts = pd.DataFrame([cells for _, *cells in models], [name for name, *_ in models], heads)
    means = texts.map(lambda text: text.split(" (")[0]).apply(pd.to_numeric, errors="coerce")
    references = [name for name in ("base", "oracle") if name in means.index]
    better = (means * [COLUMNS[head][2] for head in heads]).drop(index=references)
    shade = ((better - better.min()) / (better.max() - better.min())).reindex(means.index)
    with plots.style_sheet():
        figure, ax = plots.plt.subplots(figsize=(9.4, 0.36 * len(models) + 1.0), layout="constrained")
        colors = plots.plt.get_cmap("Blues").with_extremes(bad="white")
        ax.imshow(np.ma.masked_invalid(shade), cmap=colors, vmin=0, vmax=1.6, aspect="auto")  # black text stays legible
        for (y, x), text in np.ndenumerate(texts.to_numpy()):
            mean, _, interval = text.rstrip(")").partition(" (")
            mean = f"{int(mean):,}" if mean.isdigit() else mean
            ax.text(x, y - 0.14 * bool(interval), mean or "–", ha="center", va="center", fontsize=8.5)
            ax.text(x, y + 0.26, interval, ha="center", va="center", fontsize=6, color="#444444")
        ax.axhline(len(references) - 0.5, color="black", lw=0.8)
        arrows = {MORE: "↑", LESS: "↓"}
        labels = [f"{textwrap.fill(head, 14)} {arrows[COLUMNS[head][2]]}" for head in heads]
        ax.set_xticks(range(len(heads)), labels, fontsize=8)
        ax.set_yticks(range(len(models)), means.index)
        for label in ax.get_yticklabels():
            label.set(color=plots.style(label.get_text())["color"], weight=plots.weight(label.get_text()))
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        figure.savefig(file)
        plots.plt.close(figure)
