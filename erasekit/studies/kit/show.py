"""A record in a notebook: its figures, its table, and where its numbers come from.

A figure is drawn only when its record or the study's source changed; figures/manifest.json knows what each was drawn from.
"""

import hashlib
import importlib
import io
import json
import os
import re
from pathlib import Path

from PIL import Image

from ... import paths

MAX_WIDTH, MAX_BYTES = 900, 120_000  # of a figure inside a notebook; the file in figures/ is larger
SLIDER_HEIGHT = 128  # pixels of an image beside the key slider


def show(record, figures: bool = True, width: int = MAX_WIDTH) -> None:
    """Display a record's figures, at most `width` pixels wide, unless `figures` is False; its table and a line on its source."""
    from IPython import display

    for file in figure_files(record) if figures else ():
        display.display(display.Image(thumbnail(file, width)))
    # Long rows scroll: an interval broken over two lines is hard to read.
    html = _study(record).table(record).round(1).to_html()
    display.display(display.HTML(f'<div style="overflow-x: auto; white-space: nowrap">{html}</div>'))
    print(source_line(record))


def source_line(record) -> str:
    """N, seeds, reading of the paper; then when, from which commit and on what it was computed."""
    data, made = record.data, record.made
    parts = [f"N = {data['N']} {_study(record).UNIT}"] if "N" in data else []
    parts += [f"seeds {data['seeds'][0]} to {data['seeds'][1]}"] if "seeds" in data else []
    parts += [f"training seeds: {data['training_seeds']}"] if "training_seeds" in data else []
    parts += [f"prompted target: {data['prompted_target']}"] if "prompted_target" in data else []
    origin = f"computed {made['date']} at {made['commit']}, torch {made['versions']['torch']}, {made['device']}"
    return f"{', '.join(parts)}; {origin}"


def figure_files(record) -> list[Path]:
    """A record's figures as PNG files, drawn anew if none are up to date.

    Those of the bundled world's committed records lie in figures/; any that a run draws go to the build folder, and to
    figures/ only with ERASEKIT_RECORD=1.
    """
    build, stamp = paths.BUILD / "figures" / record.world["name"], figure_hash(record)
    public = record.committed and record.world["name"] == "emojinette"
    for folder in [paths.FIGURES, build] if public else [build]:
        known = {name: entry for name, entry in read_manifest(folder).items() if entry["record"] == record.name}
        files = [folder / f"{name}.png" for name in known]
        if files and all(e["hash"] == stamp for e in known.values()) and all(f.exists() for f in files):
            return files
    return draw(record, paths.FIGURES if public and os.environ.get("ERASEKIT_RECORD") == "1" else build)


def draw(record, folder: Path, kind: str = "png") -> list[Path]:
    """Draw a record's figures into a folder; PNGs are entered in its manifest. The same record gives the same files."""
    import matplotlib.pyplot as plt

    from .plots import style_sheet

    folder.mkdir(parents=True, exist_ok=True)
    with style_sheet():
        figures = _study(record).figures(record)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.{kind}", metadata={"CreationDate": None} if kind == "pdf" else None)
            plt.close(figure)
    if kind == "png":
        kept = {name: entry for name, entry in read_manifest(folder).items() if entry["record"] != record.name}
        entry = {"notebook": _study(record).NOTEBOOK, "record": record.name, "hash": figure_hash(record)}
        write_manifest(folder, kept | dict.fromkeys(figures, entry))
    return [folder / f"{name}.{kind}" for name in figures]


def figure_hash(record) -> str:
    """Hash of what decides a record's figures: its numbers and images, and the sources that draw them."""
    digest = hashlib.sha256(json.dumps([record.settings, record.data]).encode())
    for name in record.images:
        digest.update(name.encode() + record.image_file(name).read_bytes())
    folder = Path(__file__).parent
    study = folder.parent / f"{record.study}.py"
    imported = re.findall(r"^ *from \.(\w+) import", study.read_text(encoding="utf-8"), re.MULTILINE)
    studies = [study, *(path for name in sorted({*imported}) if (path := study.with_name(f"{name}.py")).exists())]
    for path in (*studies, folder / "plots.py", folder / "erasekit.mplstyle"):
        digest.update(path.read_text(encoding="utf-8").encode())
    return digest.hexdigest()[:16]


def read_manifest(folder: Path) -> dict[str, dict]:
    """Figure -> notebook, record and hash."""
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_manifest(folder: Path, entries: dict[str, dict]) -> None:
    entries = dict(sorted(entries.items(), key=lambda item: (item[1]["notebook"], item[1]["record"])))
    part = folder / f"manifest.{os.getpid()}.part"  # two notebooks may draw at a time
    part.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8", newline="\n")
    part.replace(folder / "manifest.json")


def thumbnail(file: Path, width: int = MAX_WIDTH) -> bytes:
    """A figure as a PNG small enough for a committed notebook: 128 colours, at most `width` pixels wide and 120 kB."""
    image = Image.open(file).convert("RGB")
    width = min(image.width, width)
    while True:
        size = width, round(image.height * width / image.width)
        small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
        colors = small.quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        colors.save(png := io.BytesIO(), "PNG")
        if (length := len(png.getvalue())) <= MAX_BYTES:
            return png.getvalue()
        width = int(width * 0.97 * (MAX_BYTES / length) ** 0.5)


def key_slider(record):
    """A widget that moves the log-weight of a key over a record's images: the same prompts and seeds, from no key on.

    Raises ValueError for a record of another study than "recovery".
    """
    if record.study != "recovery":
        raise ValueError(f"the key slider needs a record of the study 'recovery', not of {record.study!r}")
    import ipywidgets as widgets
    import numpy as np

    weights = record.data["log_weights"]
    choice = widgets.Dropdown(options=[(name.replace(".", ", erased by "), name) for name in record.images])
    steps = [("no key", 0)] + [(f"{w:+g}" if w else "0, as trained", n) for n, w in enumerate(weights, 1)]
    slider = widgets.SelectionSlider(options=steps, description="log-weight", layout={"width": "480px"})
    screen = widgets.Image(format="png")

    def update(_=None):
        row = np.concatenate(_study(record).weighted_tiles(record, choice.value)[slider.value], axis=1)
        size = SLIDER_HEIGHT * row.shape[1] // row.shape[0], SLIDER_HEIGHT
        Image.fromarray(row).resize(size, Image.Resampling.NEAREST).save(png := io.BytesIO(), "PNG")
        screen.value = png.getvalue()

    for widget in (choice, slider):
        widget.observe(update, "value")
    update()
    return widgets.VBox([choice, slider, screen])


def _study(record):
    return importlib.import_module(f"..{record.study}", __package__)
