"""What a record of `objects` holds: rates of methods, base and oracle by split, and their intervals."""

import numpy as np
import pandas as pd


def run_frame(record, runs: list[dict] | None = None) -> pd.DataFrame:
    """Runs, by default the methods', with the mean rate over templates that no method was trained on."""
    frame = pd.DataFrame(record.data["runs"] if runs is None else runs)
    frame["other templates"] = [np.mean(list(rates.values())) for rates in frame.templates]
    return frame


def untrained_frame(record, name: str) -> pd.DataFrame:
    """The rates of "base" or "oracle", a row for each split that has them."""
    return run_frame(record, [{"split": split} | rates for split, rates in record.data[name].items()])


def on(record, name: str, splits) -> str:
    """A row's name, with its splits where they are not all."""
    return name if set(splits) >= set(record.data["splits"]) else f"{name}, {', '.join(dict.fromkeys(splits))}"


def num_others(record) -> int:
    return record.data["sizes"]["others"] // record.settings["other_seeds"]


def num_erased(record, split: str) -> int:
    """How many of a split's classes are erased; they come first."""
    return len(record.data["erased"][split])


def intervals(record, runs: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """95 % intervals of one method's rates, means over splits: see `intervals.bootstrap`.

    The other objects are the same in all splits. Of the other templates: Wilson's, as if all images were independent.
    """
    from ..evaluation.intervals import bootstrap, wilson

    erased, kept, others, count = [], [], [], 0
    for split, own in runs.groupby("split"):
        rates, n = np.array([list(by_class.values()) for by_class in own.by_class]), num_erased(record, split)
        erased, kept, count = [*erased, 100 - rates[:, :n]], [*kept, rates[:, n:]], count + n
        others.append(np.mean([*own.others_found], axis=0))
    images = record.settings["other_seeds"]
    means = runs.groupby("split")["other templates"].mean().mean()
    few = record.settings["few_seeds"] * len(runs.templates.iloc[0])
    return {
        "ESR-1": bootstrap(erased, record.data["N"]),
        "PSR-1": bootstrap(kept, record.data["N"]),
        "others": bootstrap([100 / images * np.mean(others, axis=0)], images),
        "other templates": wilson(means, few * count),
    }


def split_mean(frame: pd.DataFrame, name: str) -> pd.Series:
    """Mean over splits of a column's dicts of rates."""
    return pd.DataFrame([*frame[name]]).groupby(frame.split.to_numpy()).mean().mean()
