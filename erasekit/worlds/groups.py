"""Named groups of public data sets, COCO-Stuff's labels and WikiArt's names, and reference images in those sets' own layouts.

A member of a group is worded for prompts ("brick wall", "Vincent van Gogh"); `load_groups` keeps the published label of each
("wall-brick", "Vincent_van_Gogh"), and folders and annotations are matched by either.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..paths import DATA

FOLDER = DATA / "groups"
STYLE_GROUPS = ("wikiart artists", "wikiart styles")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

# Labels that the rules of `coco_words` would word badly. Four stuff labels have the word of a thing that is annotated nowhere.
COCO_WORDS = {
    "desk-stuff": "writing desk",
    "door-stuff": "doorway",
    "mirror-stuff": "wall mirror",
    "window-other": "window pane",
    "window-blind": "window blind",
    "solid-other": "solid object",
    "structural-other": "structure",
    "playingfield": "playing field",
    "waterdrops": "water drops",
}
WIKIART_WORDS = {
    "Mannerism_Late_Renaissance": "Mannerism",
    "Naive_Art_Primitivism": "Naive Art",
    "Pierre_Auguste_Renoir": "Pierre-Auguste Renoir",
    "Post_Impressionism": "Post-Impressionism",
    "Ukiyo_e": "Ukiyo-e",
}

LABEL_MAPS = re.compile(r"annotations|stuffthingmaps|.*pixelmaps")  # folders of label maps, which are no pictures
MIN_SHARE = 0.05  # of an image's area that a COCO-Stuff label covers in a reference image of it


def coco_words(label: str) -> str:
    """A COCO-Stuff label in words: "building-other" is "building", "wall-brick" is "brick wall"."""
    head, _, kind = label.partition("-")
    return COCO_WORDS.get(label) or (head if kind in ("", "other") else f"{kind} {head}")


@cache
def load_groups() -> dict[str, dict[str, str]]:
    """Group -> {member, in words: published label}, in the data sets' order. Empty where data/groups is not installed."""
    if not FOLDER.exists():
        return {}
    coco, wikiart = (json.loads((FOLDER / f"{n}.json").read_text(encoding="utf-8")) for n in ("coco_stuff", "wikiart"))
    groups = {f"coco-stuff {kind}": {coco_words(label): label for label in coco[kind]} for kind in ("things", "stuff")}
    groups["coco-stuff"] = groups["coco-stuff things"] | groups["coco-stuff stuff"]
    for kind in ("artists", "styles", "genres"):
        groups[f"wikiart {kind}"] = {WIKIART_WORDS.get(n, n.replace("_", " ")): n for n in wikiart[kind]}
    return groups


def normalized(name: str) -> str:
    """A name without case, accents and punctuation: "Vincent_van_Gogh" and "vincent-van-gogh" are equal."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", " ", plain).strip() or name


def find_images(folder: Path) -> list[Path]:
    """The images under a folder, without label maps."""
    paths = (p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(p for p in paths if not any(map(LABEL_MAPS.fullmatch, p.relative_to(folder).parts[:-1])))


def images_of(folder: Path, paths: list[Path], names: Iterable[str]) -> list[Path]:
    """The images that show one of these names.

    An image shows the name of its folder; the artist before "_" in its own name, as in WikiArt's <style>/<artist>_<title>.jpg;
    and what COCO-Stuff's annotations under `folder` say of it, see `annotated`.
    """
    published = {words: label for group in load_groups().values() for words, label in group.items()}
    wanted = {normalized(label) for name in names for label in (name, published.get(name, name))}
    labels = annotated(folder)

    def shows(path: Path) -> set[str]:
        artist = path.stem.partition("_")[0]
        return {normalized(path.parent.name), normalized(artist)} | labels.get(path.stem, set())

    return [path for path in paths if wanted & shows(path)]


def annotated(folder: Path) -> dict[str, set[str]]:
    """Image stem -> normalised labels that cover at least `MIN_SHARE` of it.

    From label maps (annotations/<split>/<image>.png, as COCO-Stuff publishes them) and from annotations in COCO's format
    (instances_*.json and stuff_*.json).
    """
    found: dict[str, set[str]] = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix == ".json" and path.stem.startswith(("instances_", "stuff_")):
            for stem, labels in read_annotations(path, path.stat().st_mtime_ns).items():
                found.setdefault(stem, set()).update(labels)
        elif path.suffix == ".png" and any(map(LABEL_MAPS.fullmatch, path.relative_to(folder).parts[:-1])):
            found.setdefault(path.stem, set()).update(read_label_map(path, path.stat().st_mtime_ns))
    return found


@cache
def read_label_map(path: Path, modified: int) -> frozenset[str]:
    """The normalised labels of a label map's file. `modified`: its time stamp, so that the cache forgets an older file."""
    with Image.open(path) as image:
        return frozenset(map(normalized, labels_on(image)))


def labels_on(label_map: Image.Image) -> list[str]:
    """The published labels that cover at least `MIN_SHARE` of a label map, whose pixels are their ids less one, 255 for none."""
    labels = list(load_groups()["coco-stuff"].values())
    ids, counts = np.unique(np.asarray(label_map), return_counts=True)
    least = MIN_SHARE * counts.sum()
    return [labels[i] for i, count in zip(ids.tolist(), counts.tolist()) if i < len(labels) and count >= least]


@cache
def read_annotations(path: Path, modified: int) -> dict[str, frozenset[str]]:
    """Image stem -> normalised labels of one file in COCO's format; an annotation without an area counts as the whole image.

    Raises ValueError for another file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images = {image["id"]: image for image in content["images"]}
        names = {category["id"]: category["name"] for category in content["categories"]}
        shares: Counter = Counter()
        for a in content["annotations"]:
            image = images[a["image_id"]]
            share = a["area"] / (image["width"] * image["height"]) if "area" in a else 1.0
            shares[a["image_id"], names[a["category_id"]]] += share
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of annotations in COCO's format: {error!r:.80}") from None
    found: dict[str, set[str]] = {}
    for (image, name), share in shares.items():
        if share >= MIN_SHARE:
            found.setdefault(Path(images[image]["file_name"]).stem, set()).add(normalized(name))
    return {stem: frozenset(labels) for stem, labels in found.items()}
