"""Results of a study's parts, cached in the build folder, so that long studies resume and new methods compute their own."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict

from PIL import Image

from ... import paths
from ...checkpoints import LATER
from ...provenance import provenance
from ...worlds.distributed import rank_and_count

_EARLIER: ContextVar[list[dict] | None] = ContextVar("earlier_parts", default=None)


def cached(study: str, version: int, world, compute: Callable, *parts) -> tuple[dict, Image.Image | None]:
    """`compute()`'s numbers and image (or None), or those of an earlier run alike in world, precision, sampler and `parts`.

    `parts`: everything else the numbers depend on, JSON-able. `version` is the study's; raise it when numbers should change.
    """
    path = (
        paths.BUILD / "cells" / study / f"{digest(version, world.version, world.precision, world.sampler, parts)}.json"
    )
    picture = path.with_suffix(".png")
    if path.exists():
        content = json.loads(path.read_text())
        if (earlier := _EARLIER.get()) is not None:
            earlier.append(content["provenance"])
        return content["numbers"], Image.open(picture).copy() if picture.exists() else None
    start = time.time()
    numbers, image = compute()
    if rank_and_count()[0] == 0:  # of several processes one writes
        path.parent.mkdir(parents=True, exist_ok=True)
        if image is not None:
            image.save(picture)
        origin = {"precision": world.precision} | provenance(world.pipe.device, time.time() - start)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"numbers": numbers, "parts": parts, "provenance": origin}))
        part.replace(path)
    return numbers, image


@contextmanager
def earlier_parts() -> Iterator[list[dict]]:
    """Collect where the results found in the cache inside the block come from, for a record's machine and total time."""
    parts: list[dict] = []
    token = _EARLIER.set(parts)
    try:
        yield parts
    finally:
        _EARLIER.reset(token)


def digest(*parts) -> str:
    """A short hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def settings_dict(config) -> dict:
    """A method's config as JSON has it; without later settings that are off, so that earlier numbers stay valid."""
    own = {name: value for name, value in asdict(config).items() if name not in LATER or value != LATER[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
