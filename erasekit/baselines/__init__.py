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

from ..artifacts import Erasure, check_unet
from ..kpop import KPOP, kpop
from ..training import check_choice
from .registry import METHODS, RATES, Method, method

ORDER = ("esd", "uce", "ca", "sld", "mace", "rece", "spm", "receler", "eap", "age")  # of tables; new modules come last
_modules = sorted((m.name for m in pkgutil.iter_modules(__path__)), key=lambda m: (*ORDER, m).index(m))
for _name in _modules:
    importlib.import_module(f".{_name}", __name__)

method("kpop", KPOP, sweep=RATES)(kpop)
method("kpop-anchor", KPOP, sweep=RATES, target="anchor", eta=0.0)(kpop)
method("kpop-adversarial", KPOP, sweep=RATES, prompted_target="neutral", lam=0.1)(kpop)

__all__ = ["METHODS", "Method", "erase", "method", "method_config"]


def method_config(name: str, **changes):
    """A method's config with some settings changed. Raises ValueError for an unknown method or setting."""
    check_choice("method", name, METHODS)
    entry = METHODS[name]
    for setting in changes:
        check_choice(f"setting of {name}", setting, [f.name for f in fields(entry.config)])
    return entry.config(**entry.defaults | changes)


def erase(
    world, concepts: list[str], method: str = "kpop", config=None, checkpoint: Path | None = None, progress: bool = True
) -> Erasure:
    """Erase concepts with any method; the world's model is unchanged afterwards.

    `config`: the method's own config, see `method_config`; None for its defaults. Trained methods resume from `checkpoint`
    if they were interrupted. Raises ValueError for an unknown method, another method's config, or an empty concept.
    """
    check_choice("method", method, METHODS)
    check_unet(world.pipe.unet)
    entry = METHODS[method]
    config = method_config(method) if config is None else config
    if not isinstance(config, entry.config):
        raise ValueError(
            f"the config of {method!r} is a {entry.config.__name__}, not {config!r}: use method_config({method!r}, ...)"
        )
    accepted = inspect.signature(entry.function).parameters
    options = {"checkpoint": checkpoint, "progress": progress}
    return entry.function(world, concepts, config, **{k: v for k, v in options.items() if k in accepted})
