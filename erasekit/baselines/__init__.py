"""Every method behind one call: `erase(world, concepts, method, config) -> Erasure`.

Each is written from its paper's equations on the shared kit (`erasekit.training.Bench`), one short file a method. Defaults
are the published ones scaled to the bundled world: fewer, larger and faster steps, latents from a pool rolled by the frozen
model. What differs from the publication beyond that is said in the file.
"""

import dataclasses
import inspect
from pathlib import Path

from ..artifacts import Erasure, check_plain
from ..kpop import KPOP, kpop
from ..training import accept
from .age import AGE, age
from .ca import CA, ca
from .eap import EAP, eap
from .esd import ESD, esd
from .mace import MACE, mace
from .receler import Receler, receler
from .sld import SLD, NegativePrompting, negative_prompting, sld
from .spm import SPM, spm
from .uce import RECE, UCE, rece, uce

# name -> function, its config class, and what the name changes of the class's defaults
METHODS = {
    "esd-x": (esd, ESD, {}),
    "esd-u": (esd, ESD, {"group": "u"}),
    "uce": (uce, UCE, {}),
    "ca": (ca, CA, {}),
    "sld": (sld, SLD, {}),
    "np": (negative_prompting, NegativePrompting, {}),
    "mace": (mace, MACE, {}),
    "rece": (rece, RECE, {}),
    "spm": (spm, SPM, {}),
    "receler": (receler, Receler, {}),
    "eap": (eap, EAP, {}),
    "age": (age, AGE, {}),
    "kpop": (kpop, KPOP, {}),
    "kpop-anchor": (kpop, KPOP, {"target": "anchor", "eta": 0.0}),
    "kpop-adversarial": (kpop, KPOP, {"reading": "adversarial", "lam": 0.1}),
}


def settings(method: str, **changes):
    """A method's config with some settings changed. Raises ValueError for an unknown method or setting."""
    accept("method", method, METHODS)
    _, cls, own = METHODS[method]
    for name in changes:
        accept(f"setting of {method}", name, [f.name for f in dataclasses.fields(cls)])
    return cls(**own | changes)


def erase(
    world, concepts: list[str], method: str = "kpop", config=None, checkpoint: Path | None = None, progress: bool = True
) -> Erasure:
    """Erase concepts with any method; the world's model is unchanged afterwards.

    `config` is the method's own config object, or None for its defaults; `settings(method, lr=...)` makes one. Trained
    methods go on from `checkpoint` if they were interrupted. Raises ValueError for an unknown method, a config of another
    method, or an empty concept.
    """
    accept("method", method, METHODS)
    check_plain(world.pipe.unet)
    function, cls, _ = METHODS[method]
    config = settings(method) if config is None else config
    if not isinstance(config, cls):
        raise ValueError(
            f"the config of {method!r} is a {cls.__name__}, not {config!r}: settings({method!r}, ...) makes one"
        )
    resumes = {"checkpoint": checkpoint, "progress": progress}
    accepted = inspect.signature(function).parameters
    return function(world, concepts, config, **{k: v for k, v in resumes.items() if k in accepted})
