"""Records: what a study measured, with which settings on which world, beside the images that belong to it."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ... import paths
from ...provenance import provenance
from ...worlds.distributed import rank_and_count


class StoredImages(Mapping):
    """Name -> PIL image of the files beside a record, each read when it is first used."""

    def __init__(self, files: dict[str, Path]):
        self.files, self._images = files, {}

    def __getitem__(self, name: str) -> Image.Image:
        if name not in self._images:
            self._images[name] = Image.open(self.files[name]).copy()
        return self._images[name]

    def __iter__(self):
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


@dataclass(repr=False)
class Record:
    """A study's result: `data` (as JSON reads back), `images` (name -> PIL image), and where they come from.

    On disk: <world>/<preset>/<study>.json and, for images, <study>.<image>.png beside it.
    """

    path: Path
    study: str
    preset: str
    settings: dict
    data: dict
    images: Mapping[str, Image.Image]
    made: dict  # commit, versions, device, seconds and date of the computation
    world: dict  # name and hash
    version: int  # of the study
    verified: list = field(default_factory=list)  # one entry for each run of tools.verify
    migrated: dict | None = None  # how it was converted from an earlier format

    def __repr__(self) -> str:
        return f"<Record {self.name}>"

    @property
    def name(self) -> str:
        inside = self.path.is_relative_to(paths.ROOT)
        return self.path.relative_to(paths.ROOT).as_posix() if inside else str(self.path)

    @property
    def committed(self) -> bool:
        """Whether it lies in records/, which git keeps, and not in the build folder."""
        return self.path.is_relative_to(paths.RECORDS)

    def image_file(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{name}.png")

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for name, image in self.images.items():
            image.save(self.image_file(name), optimize=True)
        for file in self.path.parent.glob(f"{self.path.stem}.*.png"):
            if file not in map(self.image_file, self.images):
                file.unlink()
        self.save_json()

    def save_json(self) -> None:
        names = ("study", "version", "preset", "world", "settings", "data", "images", "made", "verified")
        content = {name: getattr(self, name) for name in names} | {"images": list(self.images)}
        content |= {"migrated": self.migrated} if self.migrated else {}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
        part.replace(self.path)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Raises ValueError, KeyError, TypeError, SyntaxError or OSError where the record or an image is damaged."""
        content = json.loads(path.read_text(encoding="utf-8"))
        record = cls(path, **content | {"images": {}})
        record.images = StoredImages({name: record.image_file(name) for name in content["images"]})
        for file in record.images.files.values():
            with Image.open(file) as image:
                image.verify()
        return record


@dataclass(frozen=True)
class Request:
    """What makes a record valid. `custom`: the settings are not the preset's own, so the record belongs in the build folder."""

    study: str
    version: int
    preset: str
    world: dict  # name and hash
    settings: dict  # as JSON reads back
    custom: bool = False

    @property
    def folders(self) -> list[Path]:
        """Where a record may lie. Custom and smoke records never lie in records/."""
        build = paths.BUILD / "records"
        return [build] if self.custom or self.preset == "smoke" else [paths.RECORDS, build]

    def path(self, folder: Path) -> Path:
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        return folder / self.world["name"] / self.preset / f"{self.study}{f'-{digest}' if self.custom else ''}.json"

    def find(self) -> tuple[Record | None, str]:
        """The valid record, committed or in the build folder. Without one: None, and the first reason found."""
        reasons = []
        for path in map(self.path, self.folders):
            if not path.exists():
                continue
            try:
                record = Record.read(path)
                if not (differences := self.differences(record)):
                    return record, ""
                reasons.append(f"in {record.name} {' and '.join(differences)}")
            except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, OSError):
                reasons.append(f"{path.name} is damaged")
        return None, reasons[0] if reasons else "there is no record yet"

    def differences(self, record: Record) -> list[str]:
        names = {*self.settings, *record.settings}
        changed = sorted(n for n in names if self.settings.get(n, ...) != record.settings.get(n, ...))
        found = [f"the settings {', '.join(changed)} differ"] if changed else []
        found += [f"the version of the study is {record.version}"] if record.version != self.version else []
        return found + (["the world's hash differs"] if record.world["hash"] != self.world["hash"] else [])


def made_of(last: dict, earlier: list[dict]) -> dict:
    """Of a result whose parts come from `earlier` runs and a `last` one: the provenance of the machine that took longest.

    "seconds" are of all of them, "device" names every machine that took a hundredth of that.
    """
    seconds: dict[str, float] = {}
    for part in (*earlier, last):
        seconds[part["device"]] = seconds.get(part["device"], 0.0) + part["seconds"]
    total, names = sum(seconds.values()), sorted(seconds, key=seconds.get, reverse=True)
    longest = next(part for part in (*earlier, last) if part["device"] == names[0])
    devices = [name for name in names if seconds[name] >= total / 100]
    return {k: longest[k] for k in last} | {"seconds": round(total, 1), "device": " and ".join(devices)}


def load_or_compute(request: Request, load_world: Callable, compute: Callable, recompute: bool = False) -> Record:
    """The valid record, or that of `compute(load_world())`, which returns (data, images). Prints which of the two, and why.

    A new record goes to the build folder; to records/ if the environment has ERASEKIT_RECORD=1 (`run_all.sh --record`).
    """
    path = request.path(request.folders[0 if os.environ.get("ERASEKIT_RECORD") == "1" else -1])
    record, why = (None, "recomputing was asked for") if recompute else request.find()
    if record:
        made = record.made
        print(f"loaded {record.name}: computed {made['date']} at {made['commit']} in {made['seconds']:.0f} s")
        if path.is_relative_to(paths.RECORDS) and not record.committed:
            record.images, record.path = dict(record.images), path
            record.save()
        return record
    print(f"computing {request.study}: {why}")
    from .cache import earlier_parts

    world, began = load_world(), time.time()
    with (
        earlier_parts() as earlier
    ):  # a record reports the time of everything in it, whenever and wherever it was computed
        data, images = compute(world)
    made = made_of(provenance(world.pipe.device, time.time() - began), earlier)
    data = json.loads(json.dumps(data))
    own = {"world": request.world, "version": request.version}
    record = Record(path, request.study, request.preset, request.settings, data, images, made, **own)
    if rank_and_count()[0] == 0:
        record.save()
    return record
