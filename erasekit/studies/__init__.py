"""The experiments behind the notebooks. Each module has SCALES (settings by scale) and `compute`."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ..results import Record, compute_or_load, recorded
from ..trajectories import ROLL

STUDIES = ("quickstart", "hiding", "world", "method", "strength", "variations", "objects", "unsafe")
STUDIES += ("style_strength", "styles", "prompt_length", "clip_study", "recovery", "stability", "attacks")
STUDIES += ("mechanisms", "continual", "crowd", "cost", "recipes", "clip_models")
SCALE_NAMES = ("smoke", "quick", "full")


def run(study: str, world, scale: str = "quick", fresh: bool = False, exact: bool = False, **changes) -> Record:
    """Run a study on a loaded world, or load its committed record when config, code and models are the same.

    At scale quick a valid record of scale full is preferred, since it says the same of more seeds, unless `exact`. `changes`
    replace settings of the scale; what they give is kept in the build folder, not over the committed record. Raises ValueError
    for an unknown study, scale or setting.
    """
    if study not in STUDIES:
        raise ValueError(f"unknown study {study!r}: accepted are {', '.join(STUDIES)}")
    if scale not in SCALE_NAMES:
        raise ValueError(f"unknown scale {scale!r}: accepted are {', '.join(SCALE_NAMES)}")
    module = importlib.import_module(f".{study}", __name__)

    def at(scale):
        own = world.settings(study, scale)
        return module.SCALES[scale] | {name: value for name, value in own.items() if name in module.SCALES[scale]}

    settings = at(scale)
    unknown = set(changes) - set(settings)
    if unknown:
        raise ValueError(f"unknown setting {sorted(unknown)[0]!r} of {study}: accepted are {', '.join(settings)}")
    trial = any(settings[name] != value for name, value in changes.items())
    settings |= changes
    if scale == "quick" and not fresh and not exact and not trial:
        larger, _ = recorded(world, "full", study, at("full"))
        if larger:
            print("there is a record of scale full, which serves quick too")
            scale, settings = "full", at("full")
    with short_pool() if scale == "smoke" else nullcontext():
        return compute_or_load(world, scale, study, settings, lambda: module.compute(world, **settings), fresh, trial)


@contextmanager
def short_pool() -> Iterator[None]:
    """A pool of few latents, for the scale whose numbers mean nothing: rolling it is most of what such a run would take."""
    before = dict(ROLL)
    ROLL.update(seeds=2, steps=4)
    try:
        yield
    finally:
        ROLL.update(before)
