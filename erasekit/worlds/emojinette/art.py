"""The emoji art behind the bundled world: read it, put one or two icons on a background."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from ...paths import DATA

RESOLUTION = 64  # pixels, width and height of every image of the world
SIZES = (52, 54, 56, 58, 60)  # pixels, the icon's longer side
HALF_SIZES = (26, 28, 30)  # pixels, where two icons share a picture
JITTER = 3  # pixels, how far an icon may be from the centre
HALF_JITTER = (1, 10)  # pixels, sideways and up or down, where two share a picture

BACKGROUNDS = {  # name -> RGB; white is not mentioned in captions
    "white": (255, 255, 255),
    "red": (226, 122, 122),
    "orange": (247, 190, 122),
    "yellow": (250, 232, 138),
    "green": (146, 205, 142),
    "blue": (132, 178, 240),
    "purple": (186, 154, 224),
    "gray": (176, 180, 186),
}

# (object, style) pairs the generator never sees: they measure whether it composes. Drawn once with seed 0 from the
# objects outside Emojinette and the weapons.
HELD_OUT_SEED, HELD_OUT_PER_STYLE = 0, 6


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

    def names(self, row: int) -> tuple[str, str]:
        """Object and style of an icon."""
        return self.objects[self.object_id[row]], self.styles[self.style_id[row]]

    def held_out(self) -> torch.Tensor:
        """Boolean mask (N,) of the pairs kept from the generator."""
        other = torch.tensor([self.objects[i] in self.category["other"] for i in self.object_id])
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        mask = torch.zeros(len(self.object_id), dtype=torch.bool)
        taken: set[int] = set()  # an object is held out in one style only: the others must teach it
        for style in range(len(self.styles)):
            rows = ((self.style_id == style) & other).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)].tolist()
            chosen = [r for r in rows if int(self.object_id[r]) not in taken][:HELD_OUT_PER_STYLE]
            mask[chosen] = True
            taken |= {int(self.object_id[r]) for r in chosen}
        return mask

    def without(self, names: Sequence[str]) -> torch.Tensor:
        """Boolean mask (N,) of the icons that show none of the named objects and have none of the named styles."""
        unknown = set(names) - {*self.objects, *self.styles}
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]!r} is neither an object nor a style of this world")
        return torch.tensor([not {*self.names(row)} & {*names} for row in range(len(self.object_id))])

    def canvas(self, backgrounds: Sequence[str]) -> torch.Tensor:
        """Empty images (B, 3, 64, 64) in [0, 255]."""
        colours = torch.tensor([BACKGROUNDS[b] for b in backgrounds], dtype=torch.float32)
        return colours[:, :, None, None].expand(-1, -1, RESOLUTION, RESOLUTION).clone()

    def paste(self, image: torch.Tensor, row: int, size: int, y: int, x: int, mirror: bool = False) -> None:
        """Put an icon on `image` (3, 64, 64), in place; (y, x) is its upper left corner, moved inside the frame."""
        icon = self.sprites[size][row].float()
        if mirror:
            icon = icon.flip(-1)
        y, x = (min(max(v, 0), RESOLUTION - size) for v in (y, x))
        image[:, y : y + size, x : x + size].mul_(1 - icon[3:] / 255).add_(icon[:3])

    def draw(self, rows: torch.Tensor, generator: torch.Generator, mirror: float, white: float):
        """Random placement of the given rows, one icon an image.

        `mirror` and `white` are the probabilities of mirroring and of a white background.
        Returns images (B, 3, 64, 64) in [-1, 1] and the background names.
        """
        count = len(rows)
        sizes = _choice(SIZES, count, generator)
        dx, dy = torch.randint(-JITTER, JITTER + 1, (2, count), generator=generator).tolist()
        flip = (torch.rand(count, generator=generator) < mirror).tolist()
        backgrounds = _backgrounds(count, generator, white)
        images = self.canvas(backgrounds)
        for n, row in enumerate(rows.tolist()):
            corner = (RESOLUTION - sizes[n]) // 2
            self.paste(images[n], row, sizes[n], corner + dy[n], corner + dx[n], flip[n])
        return images.div_(127.5).sub_(1).clamp_(-1, 1), backgrounds  # Lanczos overshoots

    def draw_pairs(self, left: torch.Tensor, right: torch.Tensor, generator: torch.Generator, white: float):
        """Two icons an image at half their size, left and right. Returns as `draw`."""
        count = len(left)
        backgrounds = _backgrounds(count, generator, white)
        images = self.canvas(backgrounds)
        for side, rows in enumerate((left, right)):
            sizes = _choice(HALF_SIZES, count, generator)
            sideways, upright = (torch.randint(-j, j + 1, (count,), generator=generator).tolist() for j in HALF_JITTER)
            for n, row in enumerate(rows.tolist()):
                y, x = (RESOLUTION - sizes[n]) // 2, (RESOLUTION // 2 - sizes[n]) // 2 + side * RESOLUTION // 2
                self.paste(images[n], row, sizes[n], y + upright[n], x + sideways[n])
        return images.div_(127.5).sub_(1).clamp_(-1, 1), backgrounds


def _choice(values: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    return torch.tensor(values)[torch.randint(len(values), (count,), generator=generator)].tolist()


def _backgrounds(count: int, generator: torch.Generator, white: float) -> list[str]:
    plain = (torch.rand(count, generator=generator) < white).tolist()
    names = list(BACKGROUNDS)[1:]
    coloured = torch.randint(len(names), (count,), generator=generator).tolist()
    return ["white" if p else names[c] for p, c in zip(plain, coloured)]


def load_art(file: str = "emojinette.parquet") -> Art:
    """Read the icons of data/; they are cut to their ink, so that every style fills the frame alike."""
    table = pq.read_table(DATA / file).to_pylist()
    objects = list(dict.fromkeys(row["class"] for row in table))
    styles = list(dict.fromkeys(row["style"] for row in table))
    category: dict[str, list[str]] = {}
    for row in table:
        names = category.setdefault(row["category"], [])
        if row["class"] not in names:
            names.append(row["class"])
    sizes = (*SIZES, *HALF_SIZES)
    sprites = {size: torch.empty(len(table), 4, size, size, dtype=torch.uint8) for size in sizes}
    for n, row in enumerate(table):
        icon = Image.open(io.BytesIO(row["png"])).convert("RGBA")
        left, top, right, bottom = icon.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
        side = max(right - left, bottom - top)
        x, y = (left + right - side) // 2, (top + bottom - side) // 2
        # "RGBa" is premultiplied: resizing straight alpha would bleed the invisible pixels' colour into the edges.
        square = icon.crop((x, y, x + side, y + side)).convert("RGBa")
        for size in sizes:
            pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
            sprites[size][n] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return Art(
        objects=objects,
        styles=styles,
        category=category,
        object_id=torch.tensor([objects.index(row["class"]) for row in table]),
        style_id=torch.tensor([styles.index(row["style"]) for row in table]),
        sprites=sprites,
    )
