"""What run_all.sh runs: the notebooks, or the tests."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
import yaml

from .. import paths, studies
from ..studies.kit.show import read_manifest
from .notebooks import ENVIRONMENT, Failure, Notebook, Refusal, execute, find

COLUMNS = shutil.get_terminal_size().columns  # of the plan: a claim is cut to fit; 80 where there is no terminal


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        if argv[:1] == ["test"]:
            if argv[1:] not in ([], ["--all"]):
                raise Refusal(f"unknown option {' '.join(argv[1:])!r} of test: accepted is --all")
            return test(everything=len(argv) == 2)
        return run(parse(argv))
    except Refusal as refusal:
        print(f"run_all: {refusal}.", file=sys.stderr)
        return 2


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run_all.sh",
        description="Run the notebooks. Results that are valid are loaded; a run that stopped resumes from them.",
        epilog="run_all.sh test: ruff, pytest and the notebooks. run_all.sh test --all: also what is slow.",
    )
    world = "emojinette (default, bundled), sd14, sd15, sd21, sdxl, a folder, or a hub id (HF_HUB_OFFLINE=0 downloads)"
    parser.add_argument("--world", default="emojinette", help=world)
    parser.add_argument("--preset", default="quick", help="smoke, quick (default) or full")
    parser.add_argument("--only", nargs="+", metavar="NOTEBOOK", help="these notebooks alone, such as 00 or 02_method")
    parser.add_argument("--recompute", action="store_true", help="compute everything, load no record")
    parser.add_argument(
        "--record", action="store_true", help="write new results to records/ and figures/, which git keeps"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a notebook parameter")
    parser.add_argument("--list", action="store_true", help="show the plan and run nothing")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    books = find(args.only)
    parameters = choose_parameters(args, books)
    computing = [book for book in books if computes(book, args)]
    print_plan(books, computing, args)
    if args.list:
        return 0
    check_disk(sum(book.disk_mb for book in computing))
    if args.record:
        os.environ["ERASEKIT_RECORD"] = "1"
    name = args.world
    if name != studies.BUNDLED:
        from ..worlds import record_name  # imports torch

        name = record_name(name)
    out, started = paths.BUILD / name / args.preset, time.time()
    out.mkdir(parents=True, exist_ok=True)
    try:
        seconds = run_books(books, computing, out, parameters, args.record)
    except Failure as failure:
        print(f"{failure}\nThe same command continues: what was computed is kept.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command continues: what was computed is kept.", file=sys.stderr)
        return 130
    print_results(books, seconds, started, name, out)
    return 0


def choose_parameters(args: argparse.Namespace, books: list[Notebook]) -> dict:
    """The parameters to inject. Raises Refusal for a value or name that is not accepted."""
    if args.preset not in studies.PRESETS:
        raise Refusal(f"unknown preset {args.preset!r}; accepted are {', '.join(studies.PRESETS)}")
    if args.world != studies.BUNDLED:
        from ..worlds import ACCEPTED, WORLDS, is_world_name

        if not is_world_name(args.world):
            raise Refusal(f"unknown world {args.world!r}; accepted are {ACCEPTED}")
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
                f"--set {item!r} has no YAML value: accepted are a word, a number, or a list, [a, b]"
            ) from None
    return {"world": args.world, "preset": args.preset, "recompute": args.recompute, **extra}


def computes(book: Notebook, args: argparse.Namespace) -> bool:
    """Whether a notebook will compute, and not only load records."""
    if book.live or args.recompute or args.set or args.world != studies.BUNDLED:
        return True
    presets = ("full", "quick") if args.preset == "quick" else (args.preset,)
    own = [study for study, name in studies.STUDIES.items() if name == book.name]
    return not all(any(studies.find(study, args.world, preset)[0] for preset in presets) for study in own)


def print_plan(books: list[Notebook], computing: list[Notebook], args: argparse.Namespace) -> None:
    whose = "times on two cores" if args.world == studies.BUNDLED else "times of the bundled world, no guide here"
    print(f"World {args.world}, preset {args.preset}{', everything recomputed' if args.recompute else ''}; {whose}.")
    total = 0.0
    for book in books:
        recorded = not args.recompute and (book.live or book not in computing)
        minutes = book.minutes["load" if recorded and args.preset != "smoke" else args.preset]
        total += minutes
        line = f"  {book.name:<20} {minutes:>5g} min  {'computes' if book in computing else 'loads   '}  {book.claim}"
        print(line if len(line) <= COLUMNS else f"{line[: COLUMNS - 3]}...")
    print(f"  {'all':<20} {total:>5.1f} min", flush=True)


def check_disk(need_mb: int) -> None:
    paths.BUILD.mkdir(parents=True, exist_ok=True)
    free_mb = shutil.disk_usage(paths.BUILD).free // 2**20
    if free_mb < need_mb:
        raise Refusal(
            f"this run needs {need_mb} MB in {paths.BUILD} and {free_mb} MB are free; "
            "free some space or set ERASEKIT_BUILD to another disk"
        )


def run_books(books, computing, out: Path, parameters: dict, record: bool) -> dict[str, float]:
    """Run the notebooks that compute, one at a time on all cores; then those that only load, two at a time.

    Returns each notebook's seconds. Raises Failure for the first that fails.
    """
    seconds, bar = {}, sys.stderr.isatty() and "CI" not in os.environ

    def finished(book: Notebook, took: float) -> None:
        seconds[book.name] = took
        print(f"  {book.name:<20} {took:>6.1f} s", flush=True)

    alone = books if record else computing  # with --record all, since each would write figures/manifest.json
    with ProcessPoolExecutor(2) as pool:
        try:
            for book in alone:
                if not bar:
                    print(f"  {book.name:<20} running", flush=True)
                finished(book, pool.submit(timed, book, out, parameters, bar).result())
            jobs = {pool.submit(timed, book, out, parameters): book for book in books if book not in alone}
            for job in as_completed(jobs):
                finished(jobs[job], job.result())
        finally:
            pool.shutdown(cancel_futures=True)
    return seconds


def timed(book: Notebook, out: Path, parameters: dict, bar: bool = False) -> float:
    began = time.monotonic()
    smoke = book.smoke if parameters["preset"] == "smoke" else {}
    execute(book, out / f"{book.name}.ipynb", smoke | parameters, bar)
    return time.monotonic() - began


def print_results(books: list[Notebook], seconds: dict[str, float], started: float, world: str, out: Path) -> None:
    """The time and the new files of each notebook."""
    made = {book.name: [] for book in books}
    for folder in (paths.FIGURES, paths.BUILD / "figures" / world):
        for name, entry in read_manifest(folder).items():
            made.setdefault(entry["notebook"], []).append(folder / f"{name}.png")
    for folder in (paths.RECORDS / world, paths.BUILD / "records" / world):
        for file in sorted(folder.glob("*/*.json")):
            made.setdefault(studies.STUDIES.get(file.stem.split("-")[0], ""), []).append(file)
    print(f"\n  {'made':<20} {'time':>8}  results")
    for book in books:
        new = [file for file in made[book.name] if file.exists() and file.stat().st_mtime >= started]
        print(f"  {book.name:<20} {seconds[book.name]:>6.1f} s  {'' if new else 'records and figures loaded'}")
        for file in new:
            print(f"  {'':<20} {file.stat().st_size / 1000:>5.0f} kB  {os.path.relpath(file, paths.ROOT)}")
    print(f"  executed notebooks: {os.path.relpath(out, paths.ROOT)}")


def test(everything: bool = False) -> int:
    """Lint, unit tests and notebooks, stopping at the first stage that fails; `everything` adds what is slow.

    Notebooks that load records are compared with their committed outputs; live ones run at preset smoke, uncompared.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    workers = min(4, os.cpu_count() or 1)  # each holds a world
    os.environ["OMP_NUM_THREADS"] = str((os.cpu_count() or 1) // workers)
    compared, computed = notebook_copies(everything)
    quick_start = ["-p", "erasekit.tools", "-p", "no:cacheprovider"]  # the former before nbval imports nbformat
    parallel = ["pytest", "-n", str(workers), *quick_start, "-p", "no:benchmark"]
    limits = ["--nbval-cell-timeout", "240", "--nbval-kernel-startup-timeout", "180"]
    nbval = [*parallel, "--dist", "loadfile", "--nbval-lax", "--nbval-current-env", *limits]
    nbval += ["--nbval-sanitize-with", "tests/nbval_sanitize.cfg"]
    stages = {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "pytest": [*parallel, "-p", "no:nbval", "tests", *([] if everything else ["-m", "not slow"])],
        "notebooks": [*nbval, str(compared)],
    }
    if everything:
        stages["benchmarks"] = ["pytest", "benchmarks", "--benchmark-disable"]  # each once
        stages["notebooks at smoke"] = [*nbval, str(computed)]
    results = []
    for stage, command in stages.items():
        print(f"== {stage}", flush=True)
        began = time.monotonic()
        code, summary = run_stage([sys.executable, "-m", *command])
        took = f"{time.monotonic() - began:.0f} s"
        if command[0] == "pytest" and not code and "passed" not in summary:
            code, summary = 1, f"no test passed ({summary or took})"
        results.append(f"{stage}: {summary or took}")
        if code:
            print(f"{stage} failed ({'; '.join(results)})", file=sys.stderr)
            return code
    print(f"All passed: {'; '.join(results)}")
    return 0


def run_stage(command: list[str]) -> tuple[int, str]:
    """Exit status and pytest's last summary, such as "310 passed in 140.12s"; the output appears as it comes."""
    with subprocess.Popen(command, cwd=paths.ROOT, stdout=subprocess.PIPE) as process:
        output = b""
        while chunk := process.stdout.read1():
            output += chunk
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
    found = re.findall(
        r"\d+ (?:passed|failed|error|skipped|deselected)[^\n]* in [\d.]+s", output.decode(errors="replace")
    )
    return process.returncode, found[-1] if found else ""


def notebook_copies(everything: bool) -> tuple[Path, Path]:
    """Copies for nbval, which cannot inject parameters: those to compare, and live ones at preset smoke; all at smoke."""
    from papermill import execute_notebook

    compared, computed = paths.BUILD / "nbval" / "compared", paths.BUILD / "nbval" / "computed"
    shutil.rmtree(compared.parent, ignore_errors=True)
    for folder in (compared, computed):
        folder.mkdir(parents=True)
    for book in find():
        if book.live:
            smoke = {"preset": "smoke"} | book.smoke
            execute_notebook(book.path, compared / book.path.name, smoke, prepare_only=True)
        else:
            notebook = nbformat.read(book.path, as_version=4)
            for cell in notebook.cells:
                tags = cell.metadata.get("tags", [])
                cell.metadata["tags"] = tags if "nbval-ignore-output" in tags else [*tags, "nbval-check-output"]
            nbformat.write(notebook, compared / book.path.name)
        if everything and not book.live:
            smoke = {"preset": "smoke", "recompute": True}
            execute_notebook(book.path, computed / book.path.name, smoke, prepare_only=True)
    return compared, computed


if __name__ == "__main__":
    sys.exit(main())
