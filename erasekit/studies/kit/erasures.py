"""Erasures of the studies: a method's config in a world, its training, and the operating point methods are compared at."""

import inspect
import time
from collections.abc import Callable
from dataclasses import fields

from ... import paths
from ...worlds.distributed import main_process_first, rank_and_count
from .cache import cached, digest, settings_dict
from .given import Given, check_given, is_given
from .records import Record

VERSION = 1  # of saved erasures: raise it when a method should train otherwise
TARGET_ESR = 95.0  # ESR-1 in percent at which methods are compared


def make_config(world, method: str, seed: int, sampling_steps: int, changes: dict, steps=None, retain=None):
    """A method's config with the settings that all methods of a study share, where the method has them.

    `retain`: by default the world's retained objects. `changes` are taken as given, see `at_lr_scale`; what is left open is at
    the world's rates.
    """
    from ...baselines import METHODS, method_config

    accepted = {field.name for field in fields(METHODS[method].config)}
    shared = {"seed": seed, "sampling_steps": sampling_steps, "steps": steps}
    shared["retain"] = world.concepts("retained") if retain is None else retain
    return method_config(method, world, **{n: value for n, value in shared.items() if n in accepted} | changes)


def at_lr_scale(world, method: str, changes: dict) -> dict:
    """Changes of a study's own, whose learning rate is for the bundled world, as this world takes them."""
    from ...baselines import METHODS
    from ...training import WeightConfig

    if "lr" not in changes or not issubclass(METHODS[method].config, WeightConfig):  # adapters keep theirs
        return changes
    return changes | {"lr": changes["lr"] * world.lr_scale}


def train_cached(world, concepts, method: str, config, scale: float = 1.0):
    """The erasure, its step from the base scaled, and the seconds of its training, or None where nobody knows.

    A world that keeps its images keeps its erasures too: a second training might differ in a bit, and so would its images.
    """
    from ...baselines import METHODS, erase

    if isinstance(config, Given):
        erasure = METHODS[method].function()
        seconds = erasure.info.get("provenance", {}).get("seconds") or None
    elif world.keeps_images:
        erasure, seconds = saved_erasure(world, list(concepts), config, METHODS[method].function)
    else:
        start = time.time()
        erasure = erase(world, list(concepts), method, config, progress=False)
        seconds = round(time.time() - start, 1)
    return (erasure if scale == 1 else erasure.scaled(world, scale)), seconds


def saved_erasure(world, concepts: list[str], config, train: Callable, recompute: bool = False):
    """The erasure that a method's function `train` makes, from the build folder if it is there, and the seconds it took.

    Saved with its keys. An interrupted training continues.
    """
    from ...artifacts import Erasure

    parts = train.__name__, world.pipeline_hash, concepts, settings_dict(config), world.precision
    folder = paths.BUILD / "erasures" / digest(VERSION, *parts)
    checkpoint = folder / "training.safetensors"
    with main_process_first():  # the other processes read what it saved
        if (folder / "delta.safetensors").exists() and not (recompute and rank_and_count()[0] == 0):
            erasure = Erasure.load(folder, world)
            return erasure, erasure.info["provenance"]["seconds"]
        start = time.time()
        resume = {"checkpoint": checkpoint} if "checkpoint" in inspect.signature(train).parameters else {}
        erasure = train(world, concepts, config, **resume)
        erasure.save(folder, replace=True)
        checkpoint.unlink(missing_ok=True)
        return erasure, time.time() - start


def measured(study: str, version: int, world, concepts, method: str, config, scale: float, measure: Callable, *parts):
    """`measure(erasure)`'s numbers, with "training_seconds", and image, cached.

    `parts`: the JSON-able settings that `measure` depends on.
    """

    def compute():
        erasure, seconds = train_cached(world, concepts, method, config, scale)
        numbers, image = measure(erasure)
        return numbers | {"training_seconds": seconds}, image

    return cached(study, version, world, compute, method, list(concepts), settings_dict(config), scale, *parts)


def tuning_splits(world) -> tuple:
    """(erased, kept), twice: the concepts operating points are chosen on, each half erased once and kept once."""
    one, other = world.concepts("tuning"), world.concepts("tuning kept")
    return (one, other), (other, one)


def choose_operating_point(runs: list[dict], target: float = TARGET_ESR) -> dict:
    """The setting that keeps most where it erases `target`, and the scale of its step there; if none does, the most it erases.

    Each setting's runs are a line along the step; between two of them rates are interpolated, so that a steep line does not
    pay for the next point of a grid. Returns settings, scale and the rates there; "reached": whether ESR-1 is `target`.
    """
    lines: dict[str, list[dict]] = {}
    for run in runs:
        lines.setdefault(str(run["settings"]), []).append(run)
    found = [point for line in lines.values() if (point := at_target(line, target))]
    best = max(found or runs, key=lambda run: (run["PSR-1"], run["ESR-1"]) if found else (run["ESR-1"], run["PSR-1"]))
    return {k: v for k, v in best.items() if k != "method"} | {"reached": bool(found)}


def at_target(line: list[dict], target: float) -> dict | None:
    """Where a line along the step first has an ESR-1 of `target`: its rates, interpolated; None where it never does."""
    line = sorted(line, key=lambda run: run["scale"])
    for n, run in enumerate(line):
        if run["ESR-1"] >= target:
            if n == 0:
                return run
            low = line[n - 1]
            part = (target - low["ESR-1"]) / (run["ESR-1"] - low["ESR-1"])
            numbers = [k for k, v in run.items() if isinstance(v, int | float) and k in low]
            return run | {k: round(low[k] + part * (run[k] - low[k]), 4) for k in numbers}
    return None


def beyond_edge(sweep: list[dict], taken: dict) -> dict | None:
    """The next setting where `taken` is the edge of its grid, as far on as the one before it is back; None inside the grid."""
    numeric = [k for k, v in taken.items() if isinstance(v, float) and len({c[k] for c in sweep}) > 1]
    for axis in numeric:
        tied = [k for k in numeric if all(c[k] == c[axis] for c in sweep)]  # what the sweep changes together
        alike = (c for c in sweep if all(c[k] == v for k, v in taken.items() if k not in tied))
        grid = sorted({c[axis] for c in alike})
        if len(grid) > 1 and taken[axis] in (grid[0], grid[-1]):
            near = grid[1] if taken[axis] == grid[0] else grid[-2]
            return taken | dict.fromkeys(tied, float(f"{taken[axis] ** 2 / near:.3g}"))
    return None


def operating_points(study: str = "operating_points") -> dict[str, dict]:
    """Method -> {"settings", "scale"} by the committed record of preset full; empty without one."""
    path = paths.RECORDS / "emojinette" / "full" / f"{study}.json"
    return Record.read(path).data["operating_points"] if path.exists() else {}


def method_points(chosen: dict | None, methods, groups=(), setting: str | None = None, study: str = "operating_points"):
    """Method -> operating point: `chosen`, or those of a study's record; a given erasure is taken as it is.

    Raises ValueError for a method without one, and for a given erasure of none of the `groups`, see `check_given`.
    """
    check_given(methods, groups, setting)
    points = (chosen or operating_points(study)) | {m: {"settings": {}, "scale": 1.0} for m in methods if is_given(m)}
    require_operating_points(points, *methods)
    return points


def require_operating_points(points: dict, *methods: str) -> None:
    """Raise ValueError naming the methods without an operating point."""
    missing = [m for m in methods if not points.get(m)]
    if missing:
        raise ValueError(
            f"there is no operating point for {', '.join(missing)}: run the study 'operating_points' (for styles "
            "'style_operating_points') at preset 'full' first"
        )


def rounded(values, digits: int = 4) -> list[float]:
    """Floats with the digits a record keeps."""
    return [round(float(v), digits) for v in values]
