"""One table of methods by what was measured of them: the mean and 95 % interval of each, as its study's own table has it."""

from collections.abc import Callable

import pandas as pd

from ..studies import module
from ..studies.kit.probed import MODELS
from ..studies.kit.records import Record

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


def hundred(record: Record) -> dict[str, str]:
    """Erased and kept with the most concepts at once."""
    table, most = module(record.study).table(record), max(record.settings["counts"])
    rows = {name[: -len(f", {most}")]: cells for name, cells in table.iterrows() if name.endswith(f", {most}")}
    return {name: f"{_mean(cells.iloc[0])} / {_mean(cells.iloc[1])}" for name, cells in rows.items()}


def _mean(cell) -> str:
    return str(cell).split(" (")[0]


# Heading -> study, and the cells that it has of each model.
COLUMNS: dict[str, tuple[str, Callable[[Record], dict[str, str]]]] = {
    "kept at 95 % erased": ("stronger", kept),
    "erased by synonyms": ("objects", column("ESR-1, synonyms seen")),
    "10 new words, 10 steps": ("attacks", words),
    "2 of 15 steps by the base": ("probes", row("completion, 2 steps")),
    "100 steps of fine-tuning on other objects": ("probes_weights", row("fine-tuning, 100 steps: erased")),
    "relearning, of the oracle's steps": ("probes_weights", row("LoRA, 5 pictures: relative to the oracle")),
    "100 concepts, erased / kept": ("scale", hundred),
    "U-Net evaluations": ("cost", column("evaluations")),
}


def summary(records: dict[str, Record]) -> list[list[str]]:
    """The head, then a row for each model that the probes were measured on; a study without a record has no column."""
    cells = {head: read(records[study]) for head, (study, read) in COLUMNS.items() if study in records}
    rows = [[name, *(own.get(name, "") for own in cells.values())] for name in MODELS]
    return [["model", *cells], *rows]
