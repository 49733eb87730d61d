"""The oracles: the same world, its U-Net trained without some concepts, or from another seed.

What an attack reaches on a model that never saw a concept is the floor of every attack. Text encoder and VAE are the base's.
"""

import json
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

from ... import paths
from ...checks import check_number
from . import groups

COMMAND = "python -m erasekit.worlds.emojinette.train"


def run_name(without: Sequence[str], seed: int) -> str:
    """The name of a U-Net's training: "unet" is the base's, "unet-without-S1" an oracle's."""
    parts = ["unet", *(["without", *without] if without else []), *([f"seed{seed}"] if seed else [])]
    return "-".join(parts).replace(" ", "_")


def folder(without: Sequence[str], seed: int) -> Path:
    """Where the pipeline with this U-Net lies, or for an oracle its U-Net alone."""
    name = run_name(without, seed)
    return paths.MODELS / "emojinette-sd" if name == "unet" else paths.MODELS / "emojinette-oracles" / name


def names(without) -> tuple[str, ...]:
    """`without` as sorted names of groups, objects or styles. Raises ValueError for any other."""
    chosen = tuple(sorted({without} if isinstance(without, str) else {*without}))
    groups.members(chosen)
    return chosen


def without_exactly(concepts: Sequence[str]) -> tuple[str, ...] | None:
    """What `load` takes as `without` for the oracle of exactly these concepts, in any order; None where it is not trained."""
    same = [(name,) for name, of in groups.named_groups().items() if {*of} == {*concepts}]
    trained = (w for w in (*same, tuple(sorted(concepts))) if any((folder(w, 0) / "unet").glob("*.safetensors")))
    return next(trained, None)


def check(without: tuple[str, ...], seed: int) -> None:
    """Raise FileNotFoundError where this U-Net has not been trained, and warn where its training is unfinished."""
    check_number("seed", seed, 0, whole=True)
    where = folder(without, seed)
    command = f"{COMMAND} --part unet"
    command += f" --without {shlex.join(without)}" if without else ""
    command += f" --seed {seed}" if seed else ""
    if not any((where / "unet").glob("*.safetensors")):
        raise FileNotFoundError(f"there is no U-Net in {where}: train it with `{command}`")
    about = where / "training.json"
    if about.exists() and not (said := json.loads(about.read_text(encoding="utf-8")))["done"]:
        warnings.warn(
            f"the U-Net in {where} is not finished ({said['steps']} of {said['planned steps']} steps): go on with `{command}`",
            stacklevel=2,
        )
