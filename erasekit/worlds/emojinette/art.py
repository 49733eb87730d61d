"""The emoji art of the bundled world: loading, placing icons on backgrounds, captions."""

import io
import re
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from ...paths import DATA

RESOLUTION = 64  # pixels, width and height of every image of the world
SIZES = (52, 54, 56, 58, 60)  # pixels, longer side of an icon
JITTER = 3  # pixels, largest distance of an icon from the centre

BACKGROUNDS = {  # name -> RGB; captions do not mention white
    "white": (255, 255, 255),
    "red": (226, 122, 122),
    "orange": (247, 190, 122),
    "yellow": (250, 232, 138),
    "green": (146, 205, 142),
    "blue": (132, 178, 240),
    "purple": (186, 154, 224),
    "gray": (176, 180, 186),
}

TEMPLATES = ("a {}", "a picture of a {}", "an emoji of a {}", "{}", "an image of a {}", "a drawing of a {}")

# (object, style) pairs that the generator never sees, to measure composition: four per style, from the objects
# outside Emojinette and the weapons.
HELD_OUT_SEED, HELD_OUT_PER_STYLE = 0, 4


@dataclass
class Art:
    """Every icon at every size, premultiplied, uint8.

    `sprites[size]` has shape (N, 4, size, size); `object_id` and `style_id` have shape (N,).
    """

    objects: list[str]
    styles: list[str]
    category: dict[str, list[str]]  # "emojinette" | "weapon" | "other" -> objects
    object_id: torch.Tensor
    style_id: torch.Tensor
    sprites: dict[int, torch.Tensor] = field(repr=False)

    def held_out_mask(self) -> torch.Tensor:
        """Boolean mask (N,) of the pairs that the generator is not trained on."""
        other = torch.tensor([self.objects[i] in self.category["other"] for i in self.object_id])
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        mask = torch.zeros(len(self.object_id), dtype=torch.bool)
        used: set[int] = set()  # an object is held out in one style only, since it is learned from the others
        for style in range(len(self.styles)):
            rows = ((self.style_id == style) & other).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)].tolist()
            selected = [r for r in rows if int(self.object_id[r]) not in used][:HELD_OUT_PER_STYLE]
            mask[selected] = True
            used |= {int(self.object_id[r]) for r in selected}
        return mask

    def compose(self, rows, sizes, dx, dy, mirror, backgrounds) -> torch.Tensor:
        """Images (B, 3, 64, 64) in [-1, 1]; every argument is a sequence of length B (backgrounds: RGB triples)."""
        images = torch.tensor(np.asarray(backgrounds), dtype=torch.float32)[:, :, None, None]
        images = images.expand(-1, 3, RESOLUTION, RESOLUTION).clone()
        for b, (row, size) in enumerate(zip(rows, sizes)):
            icon = self.sprites[int(size)][int(row)].float()
            if mirror[b]:
                icon = icon.flip(-1)
            top = (RESOLUTION - size) // 2
            y, x = (min(max(top + int(d), 0), RESOLUTION - int(size)) for d in (dy[b], dx[b]))
            patch = images[b, :, y : y + size, x : x + size]
            patch.mul_(1 - icon[3:] / 255).add_(icon[:3])
        return images.div_(127.5).sub_(1).clamp_(-1, 1)  # Lanczos overshoots

    def render(self, rows: torch.Tensor, generator: torch.Generator, mirror: float, white: float):
        """Compose the given rows at random sizes and positions.

        `mirror` and `white` are the probabilities of mirroring and of a white background.
        Returns images (B, 3, 64, 64) and the background names.
        """
        count = len(rows)
        sizes = torch.tensor(SIZES)[torch.randint(len(SIZES), (count,), generator=generator)].tolist()
        dx, dy = torch.randint(-JITTER, JITTER + 1, (2, count), generator=generator).tolist()
        flip = (torch.rand(count, generator=generator) < mirror).tolist()
        plain = (torch.rand(count, generator=generator) < white).tolist()
        names = list(BACKGROUNDS)[1:]
        colors = torch.randint(len(names), (count,), generator=generator).tolist()
        backgrounds = ["white" if p else names[c] for p, c in zip(plain, colors)]
        images = self.compose(rows.tolist(), sizes, dx, dy, flip, [BACKGROUNDS[b] for b in backgrounds])
        return images, backgrounds


@cache
def load_art() -> Art:
    """Read data/emojinette.parquet and crop every icon to its visible pixels, so that all styles fill the frame. Loaded once."""
    table = pq.read_table(DATA / "emojinette.parquet").to_pylist()
    objects = list(dict.fromkeys(row["class"] for row in table))
    styles = list(dict.fromkeys(row["style"] for row in table))
    category: dict[str, list[str]] = {}
    for row in table:
        names = category.setdefault(row["category"], [])
        if row["class"] not in names:
            names.append(row["class"])
    sprites = {size: torch.empty(len(table), 4, size, size, dtype=torch.uint8) for size in SIZES}
    for n, row in enumerate(table):
        icon = Image.open(io.BytesIO(row["png"])).convert("RGBA")
        left, top, right, bottom = icon.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
        side = max(right - left, bottom - top)
        x, y = (left + right - side) // 2, (top + bottom - side) // 2
        # "RGBa" is premultiplied: resizing straight alpha would mix the invisible pixels' colour into the edges.
        square = icon.crop((x, y, x + side, y + side)).convert("RGBa")
        for size in SIZES:
            pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
            sprites[size][n] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    object_id = torch.tensor([objects.index(row["class"]) for row in table])
    style_id = torch.tensor([styles.index(row["style"]) for row in table])
    return Art(objects, styles, category, object_id, style_id, sprites)


def caption(template: str, name: str, style: str | None = None, background: str = "white") -> str:
    """Describe an image: "a picture of an owl in the style of noto on a blue background"."""
    text = template.format(name)
    if style:
        text += f" in the style of {style}"
    if background != "white":
        text += f" on a {background} background"
    return re.sub(r"\ba (?=[aeio]|u[^n])", "an ", text)  # "an owl", but "a unicycle"
