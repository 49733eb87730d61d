"""Rebuild data/emojinette.parquet from the emoji packages on npm: `python data/rebuild.py`.

Needs npm, resvg_py and pyarrow. Packages, versions and the drawing of an icon are the second world's; each row keeps its source
and licence.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rebuild_emojinette2 import draw

from erasekit.worlds.emojinette2 import sources

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


def main() -> None:
    objects = EMOJINETTE + WEAPON + OTHER
    assert len(objects) == len(set(objects))
    rows = []
    for style, (package, version, licence, author) in sources.STYLES.items():
        icons = sources.icons(style)
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
    print(f"{len(objects)} objects x {len(sources.STYLES)} styles -> {out.name}, {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
