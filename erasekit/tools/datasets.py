"""Prompts and images of a public data set, written to the files that Stable Diffusion worlds read from data/.

    python -m erasekit.tools.datasets unsafe AIML-TUDA/i2p
    python -m erasekit.tools.datasets captions phiyodr/coco2017 --split validation --limit 1000
    python -m erasekit.tools.datasets images detection-datasets/coco --split val --limit 1000

A data set is a hub id or a local folder that `datasets` reads. Its origin is written beside the output. FID and KID compare the
neutral samples with the images, which should show what the captions describe or, without captions, lie in folders named as the
classes (`--by`). `--by` also takes several labels of an image: a list, a field of a list (objects.category), or a label map
as COCO-Stuff's; they are written as annotations in COCO's format. WikiArt is huggan/wikiart, --by artist or --by style.
"""

import argparse
import csv
import datetime
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm

from ..checkpoints import seeded
from ..paths import DATA
from ..worlds.groups import labels_on
from ..worlds.prompt_csv import COLUMNS

TEXTS = (*COLUMNS["prompt"], "caption", "captions", "text", "sentences")
IMAGES = ("image", "img", "picture")
OUTPUTS = {"unsafe": "i2p.csv", "captions": "captions.csv", "images": "reference"}


def open_dataset(source: str, split: str, limit: int | None) -> tuple[Iterator[dict], dict[str, list[str]], dict]:
    """The rows of a data set in order, streamed; the class names of each column of class numbers; and the data set's origin.

    Raises ImportError without `datasets`, ValueError for a data set or split that cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError("reading public data sets needs `datasets`: pip install 'erasekit[data]'") from None
    try:
        stream = datasets.load_dataset(source, split=split, streaming=True)
        first = next(iter(stream))
    except StopIteration:
        raise ValueError(f"{source!r} has no rows in its split {split!r}") from None
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = first_line(error)[:200]
        raise ValueError(f"{source!r} could not be read as a data set with a split {split!r}: {reason}") from error
    names = class_names(stream.features or {})
    origin = {"source": source, "split": split, "licence": stream.info.license or "see the data set's own page"}
    origin |= {"columns": list(first), "fetched": datetime.date.today().isoformat()}
    return islice(stream, limit), names, origin


def class_names(features: dict, prefix: str = "") -> dict[str, list[str]]:
    """The class names of each column of class numbers, also inside lists and records ("objects.category")."""
    names = {}
    for name, feature in features.items():
        while hasattr(feature, "feature"):
            feature = feature.feature
        if isinstance(feature, list):
            feature = feature[0]
        if isinstance(feature, dict):
            names |= class_names(feature, f"{prefix}{name}.")
        elif hasattr(feature, "names"):
            names[prefix + name] = feature.names
    return names


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_text(value) -> str:
    """A row's text; of a list the first. Raises ValueError for anything else."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first or "", str):
        raise ValueError(f"a prompt is a text or a list of texts, not {first!r:.80}")
    return " ".join((first or "").split())


def find_column(origin: dict, accepted: tuple[str, ...], what: str) -> str:
    """The first accepted column that a data set has. Raises ValueError if it has none."""
    for name in accepted:
        if name in origin["columns"]:
            return name
    present, accepted = ", ".join(origin["columns"]), ", ".join(accepted)
    raise ValueError(f"{origin['source']!r} has no column for the {what}: accepted are {accepted}; it has {present}")


def class_name(names: dict[str, list[str]], column: str, value) -> str:
    """A label as text, also where the data set numbers its classes; "" for none."""
    if column not in names or not isinstance(value, int):
        return "" if value is None else str(value)
    return names[column][value] if value >= 0 else ""  # -1: unknown


def image_labels(row: dict, by: str, names: dict[str, list[str]]) -> str | list[str]:
    """The label of a row's image, or the labels where its column `by` has several: a list, or a COCO-Stuff label map."""
    value = row
    for part in by.split("."):
        value = [v[part] for v in value] if isinstance(value, list) else value[part]
    if hasattr(value, "getpixel"):
        return labels_on(value)
    if isinstance(value, list):
        return list(dict.fromkeys(class_name(names, by, v) for v in value))
    return class_name(names, by, value)


def fetch_prompts(source: str, path: Path, split: str = "train", limit: int | None = None) -> int:
    """Save a data set's texts as a CSV file of prompts (see `prompt_csv.read_prompts`), and return how many.

    A row keeps its seed; without one, its number decides the seed. Of several texts in a row the first is used. Raises
    ValueError for a data set without texts, and leaves the file as it was.
    """
    rows, names, origin = open_dataset(source, split, limit)
    text = find_column(origin, TEXTS, "prompt")
    column = {kind: next((n for n in names if n in origin["columns"]), None) for kind, names in COLUMNS.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part, count = path.with_suffix(".part"), 0
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case_number", "prompt", "evaluation_seed", "class", "evaluation_guidance"])
        for number, row in enumerate(tqdm(rows, desc=path.name, unit="prompts")):
            prompt = first_text(row[text])
            if not prompt:
                continue
            value = {kind: row[name] if name else None for kind, name in column.items()}
            if value["seed"] is None:
                value["seed"] = seeded("prompt", source, number).initial_seed() % 2**31
            case = value["case"] if column["case"] else number
            label = class_name(names, column["label"], value["label"])
            writer.writerow([case, prompt, value["seed"], label, value["guidance"]])
            count += 1
    if not count:
        part.unlink()
        raise ValueError(f"{source!r} has no text in its column {text!r}: {path.name} is left as it was")
    part.replace(path)
    write_source(path, origin | {"prompts": count})
    return count


def fetch_images(
    source: str, folder: Path, split: str = "train", limit: int | None = None, by: str | None = None, side: int = 512
) -> int:
    """Save a data set's images as PNG, cropped to the central square and resized to `side` pixels, and return how many.

    With `by`, a column such as artist or label, each of its values has a folder; a column of several labels for an image
    becomes a file of annotations (see `image_labels`). Existing images are skipped, so that an interrupted fetch resumes.
    Raises ValueError for a folder with another data set's images.
    """
    from PIL import ImageOps

    rows, names, origin = open_dataset(source, split, limit)
    image = find_column(origin, IMAGES, "image")
    if by:
        find_column(origin, (by.partition(".")[0],), "folders")
    origin |= {"by": by, "side": side}
    if (file := source_file(folder)).exists():
        old = json.loads(file.read_text())
        if any(old.get(name) != origin[name] for name in ("source", "split", "by", "side")):
            raise ValueError(
                f"{folder} holds images of {old.get('source')!r}, split {old.get('split')!r}, by {old.get('by')!r}, "
                f"{old.get('side')} pixels: remove it and {file.name}, or write --to another folder"
            )
    write_source(folder, origin)
    count, shown = 0, {}
    for number, row in enumerate(tqdm(rows, desc=folder.name, unit="images")):
        label = image_labels(row, by, names) if by else ""
        if isinstance(label, list):
            shown[f"{number:06d}.png"], label = label, ""
        parent = folder / label.replace("/", "-")
        path = parent / f"{number:06d}.png"
        if not path.exists():
            parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            ImageOps.fit(row[image].convert("RGB"), (side, side)).save(part, format="PNG")
            part.replace(path)
        count += 1
    if shown:
        write_annotations(folder / "instances_fetched.json", shown)
    write_source(folder, origin | {"images": count})
    return count


def write_annotations(path: Path, shown: dict[str, list[str]]) -> None:
    """Write what images show in COCO's format, which `groups.annotated` reads. `shown`: file name -> labels."""
    names = sorted({label for labels in shown.values() for label in labels})
    content = {
        "images": [{"id": n, "file_name": file} for n, file in enumerate(shown)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names)],
        "annotations": [
            {"image_id": n, "category_id": names.index(label)}
            for n, labels in enumerate(shown.values())
            for label in labels
        ],
    }
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def source_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.source.json")


def write_source(path: Path, origin: dict) -> None:
    """Write where a file or folder comes from to <path>.source.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source_file(path).write_text(json.dumps(origin, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "erasekit.tools.datasets", description="Fetch the data of Stable Diffusion worlds."
    )
    parser.add_argument("what", choices=OUTPUTS, help=", ".join(f"{k} ({f})" for k, f in OUTPUTS.items()))
    parser.add_argument("source", help="a data set's hub id, or a folder that holds one")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--limit", type=int, help="number of rows; default: all")
    parser.add_argument("--by", help="images: the column of their labels, such as artist or objects.category")
    parser.add_argument("--side", type=int, default=512, help="images: pixels; default: 512")
    parser.add_argument("--to", type=Path, default=DATA, help="the folder to write into; default: data/")
    args = parser.parse_args(arguments)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit} is not possible: it is at least 1")
    path = args.to / OUTPUTS[args.what]
    try:
        if args.what == "images":
            count = fetch_images(args.source, path, args.split, args.limit, args.by, args.side)
        else:
            count = fetch_prompts(args.source, path, args.split, args.limit)
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to resume.", file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError) as error:
        print(first_line(error), file=sys.stderr)
        return 2
    print(f"{count} {'images' if args.what == 'images' else 'prompts'} in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
