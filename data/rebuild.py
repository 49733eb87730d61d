"""Rebuild data/emojinette.parquet from the emoji packages on npm: `python data/rebuild.py`.

Needs npm, resvg_py and pyarrow. Packages and versions stand in erasekit/worlds/emojinette/sources.py, objects in objects.csv
beside it. Each icon is drawn by resvg on 96 x 96 transparent pixels; each row keeps its source and licence.
"""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

from erasekit.worlds.emojinette import sources, words

PIXELS = 96


def draw(icons: dict, name: str) -> bytes:
    """One icon as PNG bytes, RGBA, PIXELS x PIXELS; aliases are followed."""
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    # Monochrome sets draw in the text's colour, which an image does not have: black.
    body = icon["body"].replace("currentColor", "#000000")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=PIXELS, height=PIXELS)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def main() -> None:
    rows = []
    for style, (package, version, licence, author) in sources.STYLES.items():
        icons = sources.icons(style)
        for entry in words.OBJECTS.values():
            rows.append(
                {
                    "class": entry.name,
                    "category": entry.group,
                    "style": style,
                    "png": draw(icons, entry.icon),
                    "source": package,
                    "version": version,
                    "icon": entry.icon,
                    "licence": licence,
                    "author": author,
                }
            )
    out = Path(__file__).parent / "emojinette.parquet"
    # The PNGs are compressed already.
    pq.write_table(pa.Table.from_pylist(rows), out, compression="none")
    print(f"{len(rows)} icons -> {out.name}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
