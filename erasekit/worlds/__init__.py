"""Worlds to erase concepts in: the bundled one, and Stable Diffusion."""

import re
from importlib import import_module
from os import PathLike
from pathlib import Path

BUNDLED = ("emojinette",)
WORLDS = (*BUNDLED, "sd14", "sd15", "sd21", "sdxl")
ACCEPTED = f"{', '.join(WORLDS)}, or a pipeline in diffusers' format, by its folder or as owner/name on the hub"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def load(world: str = "emojinette", device: str | None = None, precision: str = "auto", **options):
    """Load a world onto a device (default: the GPU if there is one).

    `world`: a name of `WORLDS`, or a Stable Diffusion in diffusers' format, as a hub id or a local folder. `precision`: of
    training and sampling; "auto" is bf16 where the processor multiplies it natively, else fp16 on a GPU and fp32 on a CPU.
    `options`: for Stable Diffusion see `stable_diffusion.load`, for an oracle of emojinette its `world.load`. Raises
    ValueError for an unknown world, precision or option, and FileNotFoundError where weights are missing.
    """
    if not isinstance(world, (str, PathLike)) or not is_world_name(world := str(world)):
        named = repr(world) if isinstance(world, str) else f"of type {type(world).__name__}"
        raise ValueError(f"unknown world {named}: accepted are {ACCEPTED}")
    from .device import choose_device, choose_precision

    device = choose_device(device)
    precision = choose_precision(device, precision)
    if world in BUNDLED:
        loaded = import_module(f".{world}.world", __name__).load(device, precision, **options)
        loaded.as_loaded = loaded.pipeline_hash  # by which records see that a part was changed since
        return loaded
    from .stable_diffusion import load as load_stable_diffusion

    return load_stable_diffusion(world, device, precision, **options)


def is_world_name(world: str) -> bool:
    """Whether this may name a world: one of `WORLDS`, a folder with a pipeline, or owner/name on the hub."""
    path = Path(world)
    is_pipeline = (path / "model_index.json").exists()
    return world in WORLDS or is_pipeline or (bool(HUB_ID.fullmatch(world)) and not path.exists())


def record_name(world: str) -> str:
    """The name of a world's folder of records: a folder's last part, or owner--name."""
    return world if world in WORLDS else Path(world).name if Path(world).exists() else world.replace("/", "--")
