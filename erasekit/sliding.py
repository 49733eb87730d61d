"""A slider for the strength of a key, in a notebook: over the images that the record of 09 holds, so that it moves at once."""

import io

import ipywidgets as widgets
import numpy as np
from PIL import Image

from .questions import weighed_tiles

PIXELS = 128  # of an image on the screen


def key_slider(record) -> widgets.VBox:
    """Choose a case and a method, move the log-weight of its key: the same prompts and seeds, from no key to full and beyond.

    Raises ValueError for another study's record.
    """
    if "log_weights" not in record.data:
        raise ValueError(
            f"{record.name} holds no strengths of a key: the slider takes the record of the study 'recovery'"
        )
    choice = widgets.Dropdown(options=[(name.replace(".", ", hidden by "), name) for name in record.images])
    steps = [("no key", 0)] + [
        (f"{w:+g}" if w else "0, as trained", n) for n, w in enumerate(record.data["log_weights"], 1)
    ]
    slider = widgets.SelectionSlider(options=steps, description="log-weight", layout={"width": "480px"})
    screen = widgets.Image(format="png")

    def draw(_=None):
        row = np.concatenate(weighed_tiles(record, choice.value)[slider.value], axis=1)
        image = Image.fromarray(row).resize((PIXELS * row.shape[1] // row.shape[0], PIXELS), Image.Resampling.NEAREST)
        image.save(png := io.BytesIO(), format="png")
        screen.value = png.getvalue()

    choice.observe(draw, "value")
    slider.observe(draw, "value")
    draw()
    return widgets.VBox([choice, slider, screen])
