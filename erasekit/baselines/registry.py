"""The methods by name, and what the record of a method without training contains."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from ..artifacts import Erasure
from ..provenance import provenance

RATES = ({"lr": 2e-4}, {"lr": 4e-4}, {"lr": 8e-4})  # swept for all methods that train the weights themselves


@dataclass(frozen=True)
class Method:
    """`function(world, concepts, config)`, its config class, the defaults its name changes, and what a comparison sweeps."""

    function: Callable
    config: type
    defaults: dict
    sweep: tuple[dict, ...]


METHODS: dict[str, Method] = {}


def method(name: str, config: type, sweep=({},), **defaults):
    """Register a function as a method. `sweep`: the settings among which its operating point is chosen."""

    def register(function):
        METHODS[name] = Method(function, config, defaults, tuple(sweep))
        return function

    return register


def untrained_erasure(
    world, concepts: list[str], config, name: str, began: float, delta=None, adapters=None, **info
) -> Erasure:
    """The erasure of a method without a training loop; `info` adds to what is recorded, `began` is the time of its start."""
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
    info |= world.identity | {"method": name, "concepts": list(concepts)}
    info |= {"config": settings, "seed": config.seed, "history": []}
    info |= {"provenance": provenance(world.pipe.device, time.time() - began)}
    return Erasure(delta or {}, {}, info, adapters or {})
