"""What run_all.sh runs: the notebooks in order, or the tests."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from erasekit import paths
from erasekit.notebooks import Failure, Notebook, Refusal, execute, find

SCALES = ("smoke", "quick", "full")
QUIET = {
    "HF_HUB_OFFLINE": "1",  # the bundled world needs no hub; set it to 0 to fetch Stable Diffusion
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warns after each fork
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else each kernel warns of frozen modules
    "PYTHONHASHSEED": "0",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        return test() if argv == ["test"] else run(parse(argv))
    except Refusal as refusal:
        print(f"run_all: {refusal}.", file=sys.stderr)
        return 2


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_all.sh",
        description="Run the notebooks in order and rebuild figures/. A run that stopped goes on where it was.",
        epilog="run_all.sh test: ruff, pytest, and every notebook at scale smoke, offline.",
    )
    parser.add_argument(
        "--world",
        default="emojinette",
        help="the model: emojinette (default, bundled), sd14, sd15, sd21, sdxl, a folder, or a hub id (HF_HUB_OFFLINE=0 fetches)",
    )
    parser.add_argument("--scale", default="quick", help="smoke, quick (default) or full")
    parser.add_argument("--only", nargs="+", metavar="NOTEBOOK", help="these notebooks alone, such as 00 or 02_method")
    parser.add_argument("--fresh", action="store_true", help="compute everything, load no record")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a notebook parameter")
    parser.add_argument("--list", action="store_true", help="show the plan and run nothing")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    books = find(args.only)
    parameters = choose_parameters(args, books)
    from erasekit.worlds import called  # not above: it imports torch

    name = called(args.world)
    out = paths.BUILD / name / args.scale
    state_file = out / "unfinished.json"
    marks = {book.name: fingerprint(book, parameters) for book in books}
    started, done = read_state(state_file, marks)

    print_plan(books, args, done)
    if args.list:
        return 0
    check_disk(sum(book.disk_mb for book in books if book.name not in done))
    out.mkdir(parents=True, exist_ok=True)
    bar = sys.stderr.isatty() and "CI" not in os.environ
    for book in books:
        if book.name in done:
            continue
        if not bar:
            print(f"{book.name} ...", flush=True)
        begin = time.monotonic()
        try:
            execute(book, out / f"{book.name}.ipynb", parameters, bar)
        except Failure as failure:
            print(f"{failure}\nThe same command goes on from {book.name}.", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"\nStopped in {book.name}. The same command goes on from there.", file=sys.stderr)
            return 130
        done[book.name] = {"mark": marks[book.name], "seconds": round(time.monotonic() - begin, 1)}
        write_state(state_file, started, done)
    state_file.unlink(missing_ok=True)  # the next run starts anew: the quickstart always computes live
    print_made(books, done, started, name, args.scale)
    return 0


def choose_parameters(args: argparse.Namespace, books: list[Notebook]) -> dict:
    """The parameters to inject. Raises Refusal for a value or name that is not accepted."""
    from erasekit.worlds import OTHERS, WORLDS, possible  # here, since it imports torch and --help should not

    if args.scale not in SCALES:
        raise Refusal(f"unknown scale {args.scale!r}; accepted are {', '.join(SCALES)}")
    if not possible(args.world):
        raise Refusal(f"unknown world {args.world!r}; accepted are {', '.join(WORLDS)}, {OTHERS}")
    if args.world not in WORLDS and Path(args.world).exists():
        args.world = str(Path(args.world).resolve())  # notebooks run in a folder of their own
    extra = {}
    for item in args.set:
        name, equals, value = item.partition("=")
        if not equals:
            raise Refusal(f"--set takes NAME=VALUE, not {item!r}")
        for book in books:
            if name not in (accepted := book.own_parameters()):
                has = f"accepts {', '.join(sorted(accepted))}" if accepted else "has none to set"
                raise Refusal(f"unknown parameter {name!r}; {book.name} {has}")
        try:
            extra[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise Refusal(
                f"--set {item!r} has no value that YAML reads: accepted are a word, a number, or a list, [a, b]"
            ) from None
    return {"world": args.world, "scale": args.scale, "fresh": args.fresh, **extra}


def fingerprint(book: Notebook, parameters: dict) -> str:
    """A digest of all that decides the notebook's results: its content, its parameters, the code, the models."""
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True, default=str).encode())
    for path in (book.path, *sorted((paths.ROOT / "erasekit").rglob("*.py"))):
        digest.update(path.read_bytes())
    for path in sorted(paths.MODELS.rglob("*")):
        digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def read_state(path: Path, marks: dict[str, str]) -> tuple[float, dict]:
    """When the unfinished run began, and the notebooks it has done that are still as they were."""
    if path.exists():
        state = json.loads(path.read_text())
        done = {name: entry for name, entry in state["done"].items() if entry["mark"] == marks.get(name)}
        if done:
            return state["started"], done
    return time.time(), {}


def write_state(path: Path, started: float, done: dict) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"started": started, "done": done}))
    part.replace(path)


def check_disk(need_mb: int) -> None:
    paths.BUILD.mkdir(parents=True, exist_ok=True)
    free_mb = shutil.disk_usage(paths.BUILD).free // 2**20
    if free_mb < need_mb:
        raise Refusal(
            f"this run needs {need_mb} MB in {paths.BUILD} and {free_mb} MB are free; "
            "free some space or set ERASEKIT_BUILD to another disk"
        )


def print_plan(books: list[Notebook], args: argparse.Namespace, done: dict) -> None:
    own = (
        "times on two cores"
        if args.world == "emojinette"
        else "times and disk are the bundled world's, and no guide here"
    )
    print(f"World {args.world}, scale {args.scale}{', everything computed' if args.fresh else ''}; {own}.")
    minutes = {book.name: (book.minutes_fresh if args.fresh else book.minutes)[args.scale] for book in books}
    for book in books:
        cost = f"{minutes[book.name]:>5g} min {book.disk_mb:>5} MB"
        print(f"  {book.name:<20} {'done in the interrupted run' if book.name in done else cost}  {book.claim}")
    rest = [book for book in books if book.name not in done]
    total, disk = sum(minutes[book.name] for book in rest), sum(book.disk_mb for book in rest)
    print(f"  {'to do':<20} {total:>5g} min {disk:>5} MB", flush=True)


def print_made(books: list[Notebook], done: dict, started: float, world: str, scale: str) -> None:
    """The table of what was made. A file older than the run was kept as it is: its record was loaded.

    Of settings that are not the scale's own, what this run made lies in the build folder.
    """
    figures, trials = paths.figures_folder(world, scale == "smoke"), paths.figures_folder(world, True)

    def new(path: Path) -> bool:
        return path.exists() and path.stat().st_mtime >= started

    def line(path: Path, fresh: str, kept: str) -> str:
        size = path.stat().st_size / 1000
        return f"  {os.path.relpath(path, paths.ROOT):<52} {size:>8.1f} kB  {fresh if new(path) else kept}"

    print("\nMade")
    for book in books:
        print(f"  {book.name:<52} {done[book.name]['seconds']:>8.1f} s")
        for file in (f"{name}{kind}" for name in book.figures for kind in (".png", ".pdf")):
            path = trials / file if new(trials / file) else figures / file
            print(line(path, "rewritten", "kept") if path.exists() else f"  {path.name} is missing")
    for path in sorted((paths.RECORDS / world / scale).glob("*.json")):
        print(line(path, "computed", "loaded"))
    for path in filter(new, sorted((paths.BUILD / "records" / world / scale).glob("*.json"))):
        print(line(path, "computed", "loaded"))


def test() -> int:
    """Lint, unit tests, and the notebooks at scale smoke; stops at the first that fails."""
    from papermill import execute_notebook

    os.environ["HF_HUB_OFFLINE"] = "1"
    copies = paths.BUILD / "nbval"
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir(parents=True)
    for book in find():  # nbval cannot inject parameters, so it is given copies that have them
        execute_notebook(book.path, copies / book.path.name, {"scale": "smoke"}, prepare_only=True)

    cores = os.cpu_count() or 1
    workers = min(4, cores)  # each holds a world
    os.environ["OMP_NUM_THREADS"] = str(cores // workers)
    parallel = ["pytest", "-n", str(workers), "-p", "no:benchmark", "-p", "no:cacheprovider"]
    timeouts = ["--nbval-cell-timeout", "240", "--nbval-kernel-startup-timeout", "180"]
    stages = {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "pytest": [*parallel, "tests"],
        "benchmarks": ["pytest", "benchmarks", "--benchmark-disable"],  # each once
        # A notebook's cells stay together.
        "notebooks": [*parallel, "--dist", "loadfile", "--nbval-lax", "--nbval-current-env", *timeouts, str(copies)],
    }
    seconds = {}
    for stage, command in stages.items():
        print(f"== {stage}", flush=True)
        begin = time.monotonic()
        code = subprocess.run([sys.executable, "-m", *command], cwd=paths.ROOT).returncode
        seconds[stage] = f"{stage} {time.monotonic() - begin:.0f} s"
        if code:
            print(f"{stage} failed ({', '.join(seconds.values())})", file=sys.stderr)
            return code
    print(f"All passed: {', '.join(seconds.values())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
