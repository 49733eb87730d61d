"""The experiments behind the notebooks: one file a study, with its settings, `compute`, `figures` and `table`."""

import copy
import importlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path

from .. import worlds
from ..provenance import bundled_hash
from .kit.records import Record, Request, load_or_compute
from .overrides import overrides

PRESETS = ("smoke", "quick", "full")
BUNDLED = "emojinette"  # whose records are committed
# Preset smoke checks that everything runs: sampling latents is most of what it would take otherwise.
SHORT_POOL = {"num_trajectories": 2, "trajectory_steps": 4}


def _discover() -> dict[str, str]:
    """Study -> notebook, in the notebooks' order, from the line in each file that says so. Imports no study."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")}
    found = {name: re.search(r'^NOTEBOOK\b.*?"(\w+)"', text, re.MULTILINE) for name, text in texts.items()}
    return dict(sorted(((name, match[1]) for name, match in found.items() if match), key=lambda item: item[::-1]))


STUDIES = _discover()


def module(study: str):
    """A study's module. Raises ValueError for an unknown study."""
    if study not in STUDIES:
        raise ValueError(f"unknown study {study!r}: accepted are {', '.join(STUDIES)}")
    return importlib.import_module(f".{study}", __name__)


def run(
    study: str,
    world="emojinette",
    preset: str = "quick",
    recompute: bool = False,
    exact_preset: bool = False,
    erasures: dict | None = None,
    **settings,
) -> Record:
    """Load a study's record if its settings, world and version are the same, else compute it.

    `world`: a benchmark, or a name, folder or hub id, which is loaded only when something must be computed. At preset quick a
    valid record of preset full is preferred, which has more seeds, unless `exact_preset`. `settings` replace the preset's.
    `erasures`: name -> erasure, from a training or `ek.read`: further rows, measured where the study erases their concepts.
    Such a record stays in the build folder. Raises ValueError for an unknown study, preset or setting, a world that is not a
    benchmark, and erasures that the study or the world has no place for.
    """
    world, load_world = _identify(world)
    if preset == "quick" and not (recompute or exact_preset or erasures or settings):
        larger, _ = _request(study, world, load_world, "full", {})
        preset = "full" if larger.find()[0] else preset
    request, chosen = _request(study, world, load_world, preset, settings, erasures)

    def compute(world):
        if preset == "smoke":
            world = copy.copy(world)
            world.pool_defaults = SHORT_POOL
        from .kit.given import given_methods

        with given_methods(world, erasures or {}):
            return module(study).compute(world, chosen)

    return load_or_compute(request, load_world, compute, recompute)


def find(study: str, world="emojinette", preset: str = "quick") -> tuple[Record | None, str]:
    """The valid record of a study at exactly this preset. Without one: None, and the reason."""
    return _request(study, *_identify(world), preset, {})[0].find()


def _identify(world) -> tuple[dict, Callable]:
    """A world's name and hash, and a function that returns it loaded. A bundled world need not be loaded for its hash."""
    load_world = cache(lambda: _load(world))
    if isinstance(world, str) and world in worlds.BUNDLED:
        return {"name": world, "hash": bundled_hash(world)}, load_world
    loaded = load_world()
    bundled = loaded.name in worlds.BUNDLED and getattr(loaded, "as_loaded", None) == loaded.pipeline_hash
    return {"name": loaded.name, "hash": bundled_hash(loaded.name) if bundled else loaded.version[:16]}, load_world


def _request(
    study: str, identity: dict, load_world: Callable, preset: str, changes: dict, erasures: dict | None = None
) -> tuple[Request, object]:
    """What a valid record must agree with, and the study's settings."""
    source = module(study)
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: accepted are {', '.join(PRESETS)}")
    own = source.PRESETS[preset]
    for name in set(changes) - (known := {field.name for field in fields(own)}):
        raise ValueError(f"unknown setting {name!r} of {study}: accepted are {', '.join(sorted(known))}")
    if identity["name"] not in worlds.BUNDLED:
        own = overrides(load_world(), study, preset, own)
    chosen = replace(own, **{n: tuple(v) if isinstance(v, list) else v for n, v in changes.items()})
    given = {}
    if erasures:
        from .kit.given import given_configs

        given = {"erasures": {name: config.digest for name, config in given_configs(erasures).items()}}
        chosen = _with_rows(study, chosen, erasures)
    settings = json.loads(json.dumps(asdict(chosen) | given))
    return Request(study, source.VERSION, preset, identity, settings, custom=chosen != own), chosen


def _with_rows(study: str, settings, names):
    """A study's settings with given erasures after its methods. Raises ValueError for a study without a place for them."""
    if not hasattr(source := module(study), "ROWS"):
        accepted = ", ".join(name for name in STUDIES if hasattr(module(name), "ROWS"))
        raise ValueError(f"{study!r} measures its own trainings alone: erasures are taken by {accepted}")
    if taken := [name for name in names if name in (rows := getattr(settings, source.ROWS))]:
        raise ValueError(f"an erasure cannot be named {taken[0]!r}, as a row of {study!r} is")
    return replace(settings, **{source.ROWS: (*rows, *names)})


def _load(world):
    if isinstance(world, str):
        from ..worlds import load

        world = load(world)
    if not hasattr(world, "groups"):
        raise ValueError(
            f"studies need a Benchmark, with concept groups and a judge, and {world.name!r} is a plain World"
        )
    return world
