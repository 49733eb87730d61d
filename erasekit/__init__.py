"""Erase a concept from a text-to-image diffusion model, and restore it with a key (KPOP, arXiv 2403.12326).

`load` a world, erase with `kpop` or any other method by name (`erase`), `sample` from the public model with or without the
`key` of the resulting `Erasure`. Notebooks `run` studies and `show` their records.
"""

import importlib
import sys
from types import ModuleType

_PLACES = {  # public name -> module; imported on first use, so that reading a record does not load torch
    "World": "world",
    "load": "worlds",
    "KPOP": "kpop",
    "METHODS": "baselines",
    "method_config": "baselines",
    "erase": "baselines",
    "kpop": "kpop",
    "Erasure": "artifacts",
    "load_key": "artifacts",
    "Prompt": "attention",
    "augment": "attention",
    "sample": "sampling",
    "unlocked": "pipelines.unlocked",
    "read": "pipelines.peers",
    "run": "studies",
    "show": "studies.kit.show",
    "key_slider": "studies.kit.show",
}
__all__ = sorted(_PLACES)


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module 'erasekit' has no attribute {name!r}: it has {', '.join(__all__)}")
    if name in ("Erasure", "load_key", "sample"):
        importlib.import_module(".baselines", __name__)  # registers adapters and guidance
    value = getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    def __setattr__(self, name, value):
        # Importing the submodule erasekit.kpop must not hide the function of the same name.
        if not (name in _PLACES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__():
    return __all__
