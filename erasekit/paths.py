"""Folders, and the project's public address."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
DOCS = ROOT / "docs"
MODELS = ROOT / "models"
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"
RECORDS = ROOT / "records"
# Everything git ignores: caches, executed notebooks, erasures with their keys.
BUILD = Path(os.environ.get("ERASEKIT_BUILD", ROOT / "build"))

# Change the address here, then run `python -m erasekit.tools.docs address`.
REPOSITORY = "erasekit/erasekit"
RELEASE = "main"
