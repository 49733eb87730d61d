"""Prompts and pictures of a public data set, into the files that Stable Diffusion worlds read from data/.

    python -m erasekit.fetch unsafe AIML-TUDA/i2p
    python -m erasekit.fetch captions phiyodr/coco2017 --split validation --limit 1000
    python -m erasekit.fetch pictures detection-datasets/coco --split val --limit 1000

A data set is a hub id or a local folder that `datasets` can read. Beside what is written stands where it came from. Pictures are
what FID and KID compare the kept images with: they should show what the captions say, or, without captions, lie in folders named
as the classes are (`--by`). WikiArt (huggan/wikiart, --by artist) is for prompts of paintings.
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

from .checkpoints import seeded
from .paths import DATA
from .prompts import COLUMNS

TEXTS = (*COLUMNS["prompt"], "caption", "captions", "text", "sentences")
IMAGES = ("image", "img", "picture")


def read(source: str, split: str, limit: int | None) -> tuple[Iterator[dict], dict[str, list[str]], dict]:
    """The rows of a data set in order, streamed; the names behind each column of class numbers; and where it comes from.

    Raises ImportError without `datasets`, ValueError for a data set or split that cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError("reading public data sets needs `datasets`: pip install 'erasekit[data]'") from None
    try:
        stream = datasets.load_dataset(source, split=split, streaming=True)
        features = stream.features or {}
        first = next(iter(stream))
    except StopIteration:
        raise ValueError(f"{source!r} has no rows in its split {split!r}") from None
    except Exception as error:  # a dozen kinds, by what is missing: the hub, the data set, its split, its files
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{source!r} could not be read as a data set with a split {split!r}: {why}") from None
    names = {column: feature.names for column, feature in features.items() if hasattr(feature, "names")}
    origin = {"source": source, "split": split, "licence": stream.info.license or "see the data set's own page"}
    origin |= {"columns": list(first), "fetched": datetime.date.today().isoformat()}
    return islice(stream, limit), names, origin


def said(value) -> str:
    """A row's text, of several the first. Raises ValueError for anything else."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first or "", str):
        raise ValueError(f"a prompt is a text or a list of texts, not {first!r:.80}")
    return " ".join((first or "").split())


def column(origin: dict, wanted: tuple[str, ...], what: str) -> str:
    """The first of the wanted columns that a data set has. Raises ValueError naming them, and what there is."""
    for name in wanted:
        if name in origin["columns"]:
            return name
    has, accepted = ", ".join(origin["columns"]), ", ".join(wanted)
    raise ValueError(f"{origin['source']!r} has no column for the {what}: accepted are {accepted}; it has {has}")


def prompts(source: str, path: Path, split: str = "train", limit: int | None = None) -> int:
    """Save a data set's texts as a CSV file of prompts (see `prompts.read_prompts`), and return how many.

    A row's own seed is kept; where it has none, it gets one that its number decides. Of several texts in a row the first is
    taken. Raises ValueError for a data set without any, and leaves the file as it was.
    """
    rows, classes, origin = read(source, split, limit)
    text = column(origin, TEXTS, "prompt")
    has = {kind: next((n for n in names if n in origin["columns"]), None) for kind, names in COLUMNS.items()}
    seed, label, case, guidance = (has[kind] for kind in ("seed", "label", "case", "guidance"))
    path.parent.mkdir(parents=True, exist_ok=True)
    part, count = path.with_suffix(".part"), 0
    with part.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["case_number", "prompt", "evaluation_seed", "class", "evaluation_guidance"])
        for number, row in enumerate(tqdm(rows, desc=path.name, unit="prompts")):
            asked, own = said(row[text]), row[seed] if seed else None
            if not asked:
                continue
            if own is None:
                own = seeded("prompt", source, number).initial_seed() % 2**31
            shown = named(classes, label, row[label]) if label else ""
            out.writerow([row[case] if case else number, asked, own, shown, row[guidance] if guidance else ""])
            count += 1
    if not count:
        part.unlink()
        raise ValueError(f"{source!r} has no text in its column {text!r}: {path.name} is left as it was")
    part.replace(path)
    beside(path, origin | {"prompts": count})
    return count


def pictures(
    source: str, folder: Path, split: str = "train", limit: int | None = None, by: str | None = None, side: int = 512
) -> int:
    """Save a data set's pictures as PNG, cut square in the middle, `side` pixels wide, and return how many.

    With `by`, a column such as artist or label, each of its values has a folder. Pictures that are there already are
    left, so that a fetch that was stopped goes on. Raises ValueError for a folder that holds another data set's.
    """
    from PIL import ImageOps

    rows, classes, origin = read(source, split, limit)
    shown = column(origin, IMAGES, "picture")
    if by:
        column(origin, (by,), "folders")
    origin |= {"by": by, "side": side}
    before = source_file(folder)
    if before.exists():
        other = json.loads(before.read_text())
        if any(other.get(name) != origin[name] for name in ("source", "split", "by", "side")):
            holds = f"{other.get('source')!r}, split {other.get('split')!r}, by {other.get('by')!r}, {other.get('side')} pixels"
            raise ValueError(
                f"{folder} holds pictures of {holds}: remove it and {before.name}, or write --to another folder"
            )
    beside(folder, origin)
    count = 0
    for number, row in enumerate(tqdm(rows, desc=folder.name, unit="pictures")):
        place = folder / named(classes, by, row[by]).replace("/", "-") if by else folder
        path = place / f"{number:06d}.png"
        if not path.exists():
            place.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            ImageOps.fit(row[shown].convert("RGB"), (side, side)).save(part, format="PNG")
            part.replace(path)
        count += 1
    beside(folder, origin | {"pictures": count})
    return count


def named(names: dict[str, list[str]], column: str, value) -> str:
    """A label's name, where the data set counts its classes."""
    if column not in names or not isinstance(value, int):
        return "" if value is None else str(value)
    return names[column][value] if value >= 0 else ""  # -1: not known


def beside(path: Path, origin: dict) -> None:
    """Where something came from, in <path>.source.json."""
    source_file(path).parent.mkdir(parents=True, exist_ok=True)
    source_file(path).write_text(json.dumps(origin, indent=1) + "\n")


def source_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.source.json")


KINDS = {"unsafe": "i2p.csv", "captions": "captions.csv", "pictures": "reference"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="erasekit.fetch", description="Fetch what Stable Diffusion worlds are asked.")
    parser.add_argument("what", choices=KINDS, help=", ".join(f"{k} ({f})" for k, f in KINDS.items()))
    parser.add_argument("source", help="a data set's hub id, or a folder that holds one")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--limit", type=int, help="how many rows; default: all")
    parser.add_argument("--by", help="pictures: the column that names their folders, such as artist or label")
    parser.add_argument("--side", type=int, default=512, help="pictures: pixels; default: 512")
    parser.add_argument("--to", type=Path, default=DATA, help="the folder to write into; default: data/")
    args = parser.parse_args(arguments)
    path = args.to / KINDS[args.what]
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit} is not possible: it is at least 1")
    try:
        if args.what == "pictures":
            count = pictures(args.source, path, args.split, args.limit, args.by, args.side)
        else:
            count = prompts(args.source, path, args.split, args.limit)
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again.", file=sys.stderr)
        return 130
    except Exception as error:  # a broken picture, a full disk, a lost network: each of its own kind
        print((str(error).strip().splitlines() or [type(error).__name__])[0], file=sys.stderr)
        return 2
    print(f"{count} {'pictures' if args.what == 'pictures' else 'prompts'} in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
