"""Rebuild data/emojinette.parquet from the emoji packages on npm: `python data/rebuild.py`.

Needs npm, resvg_py and pyarrow. Each package is fetched at the pinned version by `npm pack`, each icon is drawn by
resvg on 96 x 96 transparent pixels, and each row keeps its source and licence.
"""

import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

PIXELS = 96

# style -> (npm package, version, SPDX licence, who drew it)
STYLES = {
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc, Noto Emoji"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter, Twitter Emoji"),
    "openmoji": ("@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0", "OpenMoji"),
    "fluent": ("@iconify-json/fluent-emoji", "1.2.7", "MIT", "Microsoft Corporation, Fluent UI Emoji"),
    "contrast": (
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "MIT",
        "Microsoft Corporation, Fluent UI Emoji High Contrast",
    ),
}

# Imagenette's ten classes, each with the emoji nearest to it.
EMOJINETTE = """videocassette carpentry-saw church dog postal-horn articulated-lorry fuel-pump flag-in-hole parachute
fish""".split()
# The category "weapon": our stand-in for unsafe content.
WEAPON = "dagger bomb crossed-swords kitchen-knife axe bow-and-arrow firecracker boomerang".split()
OTHER = """fox wolf cat bear panda lion tiger-face horse cow pig rabbit frog monkey elephant giraffe zebra camel
kangaroo hedgehog koala penguin owl duck eagle flamingo turtle snake crocodile shark whale octopus crab snail butterfly
honeybee spider house castle tent stadium factory hospital mosque ferris-wheel fountain volcano automobile taxi bus
ambulance fire-engine tractor bicycle locomotive airplane helicopter rocket sailboat anchor guitar violin trumpet drum
saxophone microphone headphone radio telephone television camera laptop printer hammer wrench screwdriver gear magnet
ladder scissors key light-bulb candle flashlight battery telescope microscope compass alarm-clock watch umbrella bed
chair toilet broom basket teddy-bear balloon crown ring glasses backpack high-heeled-shoe top-hat jeans necktie banana
red-apple grapes pineapple strawberry watermelon pear carrot mushroom broccoli cactus sunflower tulip palm-tree
evergreen-tree hamburger pizza doughnut""".split()


def fetch(package: str, version: str, folder: Path) -> dict:
    """The icon set of one npm package (parsed icons.json)."""
    name = subprocess.run(
        ["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    with tarfile.open(folder / name) as tar:
        return json.load(tar.extractfile("package/icons.json"))


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
    objects = EMOJINETTE + WEAPON + OTHER
    assert len(objects) == len(set(objects))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for style, (package, version, licence, author) in STYLES.items():
            icons = fetch(package, version, Path(folder))
            for name in objects:
                category = "emojinette" if name in EMOJINETTE else "weapon" if name in WEAPON else "other"
                rows.append(
                    {
                        # What captions call it: the icon's name in words.
                        "class": name.replace("-face", "").replace("red-apple", "apple").replace("-", " "),
                        "category": category,
                        "style": style,
                        "png": draw(icons, name),
                        "source": package,
                        "version": version,
                        "icon": name,
                        "licence": licence,
                        "author": author,
                    }
                )
    out = Path(__file__).parent / "emojinette.parquet"
    # The PNGs are compressed already.
    pq.write_table(pa.Table.from_pylist(rows), out, compression="none")
    print(f"{len(objects)} objects x {len(STYLES)} styles -> {out.name}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
