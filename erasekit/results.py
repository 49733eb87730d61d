"""Records: what was computed, from what, on what; and compute-or-load."""

import ast
import datetime
import hashlib
import importlib.metadata
import io
import json
import platform
import subprocess
import time
import tokenize
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from .paths import BUILD, DATA, MODELS, RECORDS, ROOT
from .processes import shares

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy")
# Code that decides how results are kept or found, not what they are.
KEEPING = {"results.py", "paths.py"}
# A study's settings: what a record was computed with is in its config, and compared there.
SETTINGS = {"FULL", "SCALES"}
# Seconds that the parts took which a record finds kept from a run that was stopped.
EARLIER: list[float] = []


def provenance(device, seconds: float) -> dict:
    """Commit, versions, device, wall time in seconds and date of something just made."""
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "device": device_name(device),
        "seconds": round(seconds, 1),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """The checkout's commit, with "+" when files differ from it; "unknown" outside a checkout."""
    try:
        sha = git("rev-parse", "--short=12", "HEAD")
        return sha + ("+" if git("status", "--porcelain", "--", "erasekit", "models", "data") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def device_name(device) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


@cache
def sources(module: str) -> frozenset[Path]:
    """The package's files that decide a module's numbers: its own and, through their imports, those it builds on."""
    parts = module.split(".")
    path = ROOT.joinpath(*parts)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if parts[0] != "erasekit" or not path.exists() or path.name in KEEPING or module == "erasekit":
        return frozenset()
    found, todo = {path}, [path]
    while todo:
        path = todo.pop()
        for imported in imports(path) - found:
            found.add(imported)
            todo.append(imported)
    return frozenset(found)


def imports(path: Path) -> set[Path]:
    """The package's own files that a file imports directly."""
    here, found = path.relative_to(ROOT).with_suffix("").parts, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or (not node.level and (node.module or "").split(".")[0] != "erasekit"):
            continue
        package = here[: len(here) - node.level] if node.level else ()
        base = ROOT.joinpath(*package, *(node.module or "").split("."))
        wanted = [base.with_suffix(".py")]
        for name in node.names:  # what is imported may be a module itself; if not, it is in the package's __init__
            inside = [base / f"{name.name}.py", base / name.name / "__init__.py", base / "__init__.py"]
            wanted.append(next((path for path in inside if path.exists()), inside[0]))
        found |= {w for w in wanted if w.exists() and w.name not in KEEPING and w.parent != ROOT}
    return found - {ROOT / "erasekit" / "__init__.py"}


@cache
def code_hash(*modules: str) -> str:
    """Hash of the sources that decide the numbers of these modules (dotted names); see `substance`."""
    digest = hashlib.sha256()
    for path in sorted(set().union(*map(sources, modules))):
        digest.update(path.relative_to(ROOT).as_posix().encode() + substance(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:16]


def substance(source: str) -> str:
    """Python source without docstrings, comments, empty lines and a study's settings: what is left can change a number."""
    lines, documented = source.splitlines(), (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            first = node.body[0]
            blank(lines, first)
        if (
            isinstance(node, ast.Assign)
            and not node.col_offset
            and SETTINGS & {getattr(t, "id", "") for t in node.targets}
        ):
            blank(lines, node)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def blank(lines: list[str], node: ast.stmt) -> None:
    """Empty a statement's lines."""
    lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)


@cache
def model_hash() -> str:
    """Hash of the bundled weights, their settings and the art."""
    digest = hashlib.sha256()
    for path in sorted([*MODELS.rglob("*.safetensors"), *MODELS.rglob("*.json"), *DATA.glob("*.parquet")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Record:
    """A named result: `data` (JSON-able), `images` (name -> PIL image), `config` and provenance.

    On disk: records/<world>/<scale>/<name>.json and, for images, <name>.<image>.png beside it.
    """

    def __init__(self, path: Path, config: dict, data: dict, images: dict[str, Image.Image], made: dict, hashes: dict):
        self.path, self.config, self.data, self.images, self.made, self.hashes = (
            path,
            config,
            data,
            images,
            made,
            hashes,
        )

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else str(self.path)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for name, image in self.images.items():
            image.save(self.path.with_name(f"{self.path.stem}.{name}.png"), optimize=True)
        content = {"config": self.config, "data": self.data, "images": list(self.images), "made": self.made}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content | {"hashes": self.hashes}, indent=1) + "\n")
        part.replace(self.path)

    @classmethod
    def read(cls, path: Path) -> "Record":
        content = json.loads(path.read_text())
        images = {name: Image.open(path.with_name(f"{path.stem}.{name}.png")).copy() for name in content["images"]}
        return cls(path, content["config"], content["data"], images, content["made"], content["hashes"])


def recorded(world, scale: str, name: str, config: dict, trial: bool = False) -> tuple[Record | None, str]:
    """The record of this name if its config, code and model hashes match; else None, and why."""
    path = place(world, scale, name, trial)
    if not path.exists():
        return None, "there is no record yet"
    try:
        record = Record.read(path)
        differ = [kind for kind, value in hashes(name, world).items() if record.hashes.get(kind) != value]
        differ += ["config"] if record.config != json.loads(json.dumps(config)) else []  # as it reads back
    except (ValueError, KeyError, TypeError, AttributeError, OSError):  # no record, or an image lost or cut
        return None, "the record is damaged"
    return (None, f"the record's {' and '.join(differ)} differ") if differ else (record, "")


def place(world, scale: str, name: str, trial: bool) -> Path:
    """Where a record lies; a trial's, of settings that are not its scale's own, out of git's sight."""
    return (BUILD / "records" if trial else RECORDS) / world.name / scale / f"{name}.json"


def hashes(name: str, world) -> dict[str, str]:
    """What a study's record was computed with."""
    return {"code": code_hash(f"erasekit.studies.{name}", type(world).__module__), "model": world_hash(world)}


def world_hash(world) -> str:
    """The bundled world is told by all its files, any other by its U-Net and the files it was given."""
    return model_hash() if world.name == "emojinette" else world.version[:16]


def compute_or_load(
    world,
    scale: str,
    name: str,
    config: dict,
    compute: Callable[[], tuple[dict, dict]],
    fresh: bool = False,
    trial: bool = False,
) -> Record:
    """The record of this name if its config, code and model hashes match, else `compute()`, saved.

    `compute` returns data and images. Says which of the two happened, and why. A `trial` has a place of its own.
    """
    record, why = (None, "asked to compute everything") if fresh else recorded(world, scale, name, config, trial)
    if record:
        made = record.made
        print(f"loaded {record.name}: computed {made['date']} at {made['commit']} in {made['seconds']:.0f} s")
        return record
    print(f"computing {name}: {why}")
    path, made_with, began = place(world, scale, name, trial), hashes(name, world), time.time()
    EARLIER.clear()
    data, images = compute()
    seconds = time.time() - began + sum(EARLIER)
    config = json.loads(json.dumps(config))
    record = Record(path, config, data, images, provenance(world.pipe.device, seconds), made_with)
    if shares()[0] == 0:
        record.save()
    return record
