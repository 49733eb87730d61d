"""The panel every method faces: one erasure, trained, drawn and judged, kept in the build folder so that long studies resume."""

import json
from dataclasses import asdict

import torch
from PIL import Image

from ..metrics import in_top, judged
from ..paths import BUILD
from ..results import code_hash
from ..sampling import sample
from .common import digest


def cell(name: str, world, compute, module: str, *parts) -> tuple[dict, Image.Image | None]:
    """`compute()`'s numbers and strip of images, or those kept from an earlier run.

    The name they are kept under holds `parts` (JSON-able), the base, and the code of the method's `module` and the panel.
    """
    code = code_hash(module, __name__, f"erasekit.studies.{name}", "erasekit.worlds")
    path = BUILD / "cells" / name / f"{digest(world.fingerprint, world.precision, code, parts)}.json"
    picture = path.with_suffix(".png")
    if path.exists():
        found = json.loads(path.read_text())
        return found, Image.open(picture).copy() if picture.exists() else None
    numbers, strip = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    if strip is not None:
        strip.save(picture)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(numbers))
    part.replace(path)
    return numbers, strip


def drawn(world, erasure, asked: list[tuple[str, str, int]], steps: int) -> torch.Tensor:
    """Images (N, 3, H, W) of (prompt, label, seed) triples by the public model, in the precision training runs in."""
    prompts, _, seeds = zip(*asked)
    return sample(
        world.pipe, list(prompts), list(seeds), erasure=erasure, steps=steps, batch_size=100, autocast=world.autocast
    )


def hits(world, images: torch.Tensor, labels: list[str], k: int = 1) -> torch.Tensor:
    """Boolean (N,): the object judge's first k hold the label."""
    return in_top(judged(world, images)[0], world.judge.objects, labels, k)


def as_json(config) -> dict:
    """A method's settings as a record holds them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
