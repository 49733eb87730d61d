"""Hide a concept in a text-to-image diffusion model, and bring it back with its key.

Notebooks speak in three verbs: `load` a world, `run` a study on it, `show` the record. What they run is here too:
`kpop` (the method), `erase` (any method by name),
`Erasure` (what it leaves), `sample`, `augment` (the learnable prompt in cross-attention).
"""

from .artifacts import Erasure, load_key
from .attention import Prompt, augment
from .baselines import METHODS, erase, settings
from .kpop import KPOP, kpop
from .sampling import sample
from .studies import run
from .worlds import load

__all__ = [
    "KPOP",
    "METHODS",
    "Erasure",
    "Prompt",
    "augment",
    "erase",
    "kpop",
    "load",
    "load_key",
    "run",
    "sample",
    "settings",
    "show",
    "slider",
]


def show(record) -> None:
    """Draw, save and display a record's figures and table; see `erasekit.figures.show`."""
    from .figures import show as draw  # matplotlib only when something is drawn

    draw(record)


def slider(record):
    """A slider for the strength of a key, over the images of a record of the study "recovery"; see `erasekit.sliding`."""
    from .sliding import key_slider

    return key_slider(record)
