"""What several studies do: one cached erasure per setting, and images as strips."""

import hashlib
import inspect
import json
import time
from dataclasses import asdict

import numpy as np
import torch
from PIL import Image

from ..artifacts import Erasure
from ..attention import Prompt
from ..paths import BUILD
from ..processes import first, shares
from ..results import code_hash
from ..sampling import sample
from ..trajectories import ROLL


def erasure(world, concepts: list[str], config, train, fresh: bool = False) -> tuple[Erasure, float]:
    """The erasure that a method's function `train` makes with these settings, and the seconds it took to train here.

    Kept in the build folder, keys included, under a name that changes with the method's code; an interrupted training goes on.
    """
    code = code_hash(train.__module__, type(world).__module__)
    folder = (
        BUILD
        / "erasures"
        / digest(train.__name__, world.networks, concepts, asdict(config), world.precision, ROLL, code)
    )
    checkpoint = folder / "training.safetensors"
    # Of several processes the first trains, and the others read what it saved.
    with first():
        if (folder / "delta.safetensors").exists() and not (fresh and shares()[0] == 0):
            found = Erasure.load(folder, world.pipe.unet)
            return found, found.info["provenance"]["seconds"]
        began = time.time()
        resumes = {"checkpoint": checkpoint} if "checkpoint" in inspect.signature(train).parameters else {}
        made = train(world, concepts, config, **resumes)
        made.save(folder)
        checkpoint.unlink(missing_ok=True)
        return made, time.time() - began


def digest(*parts) -> str:
    """A short name for JSON-able parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def draw(world, concepts: list[str], seeds: list[int], key: Prompt | None = None, bar: str | None = None, **how):
    """Images (len(concepts) * len(seeds), 3, H, W) of "a picture of a <concept>", concept by concept, and their labels."""
    labels = [c for c in concepts for _ in seeds]
    prompts = [world.prompt(c) for c in labels]
    how = {"batch_size": min(50, world.batch)} | how
    return sample(world.pipe, prompts, seeds * len(concepts), key=key, progress=bar, **how), labels


def strip(images: torch.Tensor) -> Image.Image:
    """Images (N, 3, H, W) side by side."""
    return Image.fromarray(np.ascontiguousarray(torch.cat(list(images), dim=2).permute(1, 2, 0).numpy()))


def rounded(values, digits: int = 4) -> list[float]:
    """Floats short enough for a record."""
    return [round(float(v), digits) for v in values]
