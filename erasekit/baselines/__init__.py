"""Every method behind one call: `erase(world, concepts, method, config) -> Erasure`.

Each module here is one method, written from its paper's equations on `training.Trainer`; importing it registers the method,
so a new one needs its file alone. Defaults are the published ones scaled to the bundled world: fewer, larger and faster
steps, on latents from a pool sampled by the frozen model. Other deviations from the publication are named in the file.
"""

import importlib
import inspect
import pkgutil
from dataclasses import fields
from pathlib import Path

from ..artifacts import Erasure
from ..checks import check_choice, check_numbers, check_unet
from ..kpop import KPOP, kpop
from ..training import at_world_rates
from ..world import as_world
from .registry import METHODS, RATES, Method, method

# Of tables; new modules come last.
ORDER = ("esd", "uce", "ca", "sld", "mace", "rece", "spm", "receler", "eap", "age")
ORDER += ("speed", "oce", "adavd", "ace", "ant", "stereo", "race")
_modules = sorted((m.name for m in pkgutil.iter_modules(__path__)), key=lambda m: (*ORDER, m).index(m))
for _name in _modules:
    importlib.import_module(f".{_name}", __name__)

method("kpop", KPOP, sweep=RATES)(kpop)
method("kpop-anchor", KPOP, sweep=RATES, target="anchor", eta=0.0)(kpop)
method("kpop-adversarial", KPOP, sweep=RATES, prompted_target="neutral", lam=0.1)(kpop)

__all__ = ["METHODS", "Method", "erase", "method", "method_config"]


def method_config(name: str, world=None, **changes):
    """A method's config with some settings changed; its rates are None, for the world's own, or where a world is given, those.

    Raises ValueError for an unknown method or setting, and an impossible number.
    """
    check_choice("method", name, METHODS)
    entry = METHODS[name]
    for setting in changes:
        check_choice(f"setting of {name}", setting, [f.name for f in fields(entry.config)])
    config = entry.config(**entry.defaults | changes)
    config = config if world is None else at_world_rates(config, as_world(world))
    check_numbers(config)
    return config


def erase(
    world, concepts: list[str], method: str = "kpop", config=None, checkpoint: Path | None = None, progress: bool = True
) -> Erasure:
    """Erase concepts with any method from a world or a diffusers pipeline, whose model is unchanged afterwards.

    `config`: the method's own config, see `method_config`; None for its defaults. Trained methods resume from
    `checkpoint` if they were interrupted. Raises ValueError for an impossible model, method, config or concept.
    """
    check_choice("method", method, METHODS)
    world, entry = as_world(world), METHODS[method]
    check_unet(world.pipe.unet)
    config = method_config(method) if config is None else config
    if not isinstance(config, entry.config):
        raise ValueError(
            f"the config of {method!r} is a {entry.config.__name__}, not {config!r}: use method_config({method!r}, ...)"
        )
    check_numbers(config)
    for name, value in entry.defaults.items():  # a choice that makes the method what it is called
        if isinstance(value, str) and (given := getattr(config, name)) != value:
            raise ValueError(
                f"{name}={given!r} is not {method!r}, which has {value!r}: use method_config({method!r}, ...)"
            )
    concepts = world.check_request(concepts, getattr(config, "retain", ()))
    accepted = inspect.signature(entry.function).parameters
    options = {"checkpoint": checkpoint, "progress": progress}
    erasure = entry.function(world, concepts, config, **{k: v for k, v in options.items() if k in accepted})
    erasure.info["moved"] = erasure.moved(world)
    return erasure
