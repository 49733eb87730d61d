"""The rule of the study `lock`, and what its record says of its aims: rates, intervals, bounds, and whether they are reached."""

import numpy as np
import pandas as pd

SELECTED = "selected"
OPPONENTS = ("ca", "adavd")
SEARCHES = ("textual inversion", "optimized key")
KEYS = ("right key", "another concept's key", "random key", "key of another seed")
PROBES = ("first steps by the base", "fine-tuning on others")
# The rule: of the candidates that reach both, the one with the highest mean of these rates.
MIN_ESR, MIN_KEY, SCORED = 97.0, 95.0, ("PSR-1", "synonyms", "resistance")


def rate(record, model: str, factor: float | None, what: str) -> tuple[float, float, float] | None:
    """A model's mean over splits and classes and its 95 % interval: "ESR-1", "PSR-1", "others", "synonyms", or one of `KEYS`."""
    from ..evaluation.intervals import bootstrap

    s, part = record.settings, "keys" if what in KEYS else "rates"
    name = {"ESR-1": "erased", "PSR-1": "kept"}.get(what, what)
    rows = [row for row in record.data[part] if row["model"] == model and row.get("factor") in (factor, None)]
    seen = [value for row in rows for value in row.get(name, ())]
    if not seen:
        return None
    images = {"synonyms": s["word_seeds"], "others": s["other_seeds"]}.get(what, s["seeds"])
    values = np.array([100 - x for x in seen] if what in ("ESR-1", "synonyms") else seen)
    return float(values.mean()), *bootstrap([values], images)


def attack_rates(record) -> pd.DataFrame:
    """One row a model, attack and number of steps: the mean over classes, and its 95 % interval."""
    from ..evaluation.intervals import bootstrap

    rows = []
    frame = pd.DataFrame(record.data["attacks"], columns=["model", "attack", "concept", "steps", "rate"])
    for (model, attack, steps), own in frame.groupby(["model", "attack", "steps"], sort=False):
        low, high = bootstrap([own.rate.to_numpy()], record.settings["seeds"])
        about = {"model": model, "attack": attack, "steps": steps}
        rows.append(about | {"rate": own.rate.mean(), "low": low, "high": high})
    return pd.DataFrame(rows, columns=["model", "attack", "steps", "rate", "low", "high"])


def probe_rate(record, model: str, probe: str) -> tuple[float, float, float] | None:
    """A model's mean over classes under one of `PROBES`, and its 95 % interval."""
    from ..evaluation.intervals import bootstrap

    rows = [row for row in record.data.get("probes", ()) if row["model"] == model and row["probe"] == probe]
    if not rows:
        return None
    return float(np.mean(rows[0]["shown"])), *bootstrap([np.array(rows[0]["shown"])], record.settings["seeds"])


def equal_opponent(record) -> tuple[str, float, float] | None:
    """The opponent, its part of the step and its PSR-1 that is the highest of those erasing at most a point less; or None."""
    chosen, found = record.data["selected"]["factor"], []
    least = rate(record, SELECTED, chosen, "ESR-1")[0] - 1
    for model in OPPONENTS:
        for factor in record.settings["factors"]:
            erased = rate(record, model, factor, "ESR-1")
            if erased and erased[0] >= least:
                found.append((model, factor, rate(record, model, factor, "PSR-1")[0]))
    return max(found, key=lambda item: item[2], default=None)


def aims(record) -> list[tuple[str, str, tuple | None, float | None, bool]]:
    """What was aimed at, each with the selected variant's rate, the bound, and whether it is a lower one."""
    chosen, best = record.data["selected"]["factor"], equal_opponent(record)
    bounds = {"ESR-1": 99.0, "PSR-1": best and round(best[2] - 1, 1), "synonyms": 90.0, "right key": 98.0}
    rows = [(name, name, rate(record, SELECTED, chosen, name), bound, True) for name, bound in bounds.items()]
    rows += [(name, name, rate(record, SELECTED, chosen, name), 2.0, False) for name in KEYS[1:]]
    frame = attack_rates(record).set_index(["model", "attack", "steps"])
    for attack in SEARCHES:
        for steps in record.settings["budgets"]:
            own, floor = ((model, attack, steps) for model in (SELECTED, "oracle"))
            found = tuple(frame.loc[own, ["rate", "low", "high"]]) if own in frame.index else None
            bound = float(frame.loc[floor, "rate"]) if floor in frame.index else None
            rows.append((f"{attack}, {steps} steps", "attack", found, bound, False))
    for probe in PROBES:
        floor = probe_rate(record, "oracle", probe)
        rows.append((probe, "probe", probe_rate(record, SELECTED, probe), floor and floor[0], False))
    return rows


def verdict(found: tuple | None, bound: float | None, lower: bool) -> str:
    """Whether a rate reaches its bound; "within its interval" where it does not, but its 95 % interval does.

    Without a rate it is not measured. A bound is missing where the model that sets it is: no opponent erases as much.
    """
    if found is None or bound is None:
        return "not measured" if found is None else "no bound"
    value, low, high = found
    if value >= bound if lower else value <= bound:
        return "reached"
    return "within its interval" if (high >= bound if lower else low <= bound) else "not reached"


def selected_name(record) -> str:
    """The selected variant and its part of the step."""
    chosen = record.data["selected"]
    return f"{chosen['variant']}, × {chosen['factor']:g}"


def other_models(record) -> list[str]:
    """The models beside the selected variant, without the method that it is."""
    return [m for m in record.settings["models"] if m not in (SELECTED, record.data["selected"]["variant"])]
