"""Where things are, and the project's one public address."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
MODELS = ROOT / "models"
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"
RECORDS = ROOT / "records"
BUILD = Path(
    os.environ.get("ERASEKIT_BUILD", ROOT / "build")
)  # everything git ignores: caches, executed notebooks, keys

# The repository's public address is not settled. Change it here, then run `python -m erasekit.badges`.
REPOSITORY = "erasekit/erasekit"
RELEASE = "main"


def figures_folder(world: str, trial: bool) -> Path:
    """Where a world's figures go: the bundled one's to figures/, others' and those of trial runs to the build folder."""
    return FIGURES if world == "emojinette" and not trial else BUILD / "figures" / world
