"""The notebooks: what each declares about itself, how one is executed, and how its committed outputs are made.

python -m erasekit.tools.notebooks render [NOTEBOOK ...]
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from .. import paths

CELL_TIMEOUT = 6 * 3600  # seconds; a hung cell must end some day, a full training must not be cut
# Variables of the kernels. The bundled world needs no hub; HF_HUB_OFFLINE=0 fetches Stable Diffusion.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warns after each fork
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else each kernel warns of frozen modules
    "PYTHONHASHSEED": "0",
}
KERNEL = {
    "kernel_name": "python3",
    "start_timeout": 180,
    "extra_arguments": ["--log-level=CRITICAL"],  # else it warns, each time, that it is not encrypted
}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"


class Refusal(Exception):
    """One sentence on why nothing was run."""


class Failure(Exception):
    """A few lines on where and why a notebook stopped."""


@dataclass(frozen=True)
class Notebook:
    """A notebook: its claim, and what its metadata `erasekit` declares."""

    path: Path
    title: str
    claim: str
    minutes: dict[str, float]  # on two cores: "load" with valid records; "smoke", "quick", "full" computing everything
    disk_mb: int
    live: bool = False  # computes by itself, records or not
    smoke: dict = field(default_factory=dict)  # parameters that preset smoke replaces too

    @property
    def name(self) -> str:
        return self.path.stem

    def own_parameters(self) -> set[str]:
        """The parameters beyond world, preset and recompute, which have options of their own."""
        from papermill import inspect_notebook

        return set(inspect_notebook(self.path)) - {"world", "preset", "recompute"}

    def opening(self) -> tuple[str, str]:
        """The lines below the title that are generated: the Colab badge, and the expected time."""
        colab = "https://colab.research.google.com"
        link = f"{colab}/github/{paths.REPOSITORY}/blob/{paths.RELEASE}/notebooks/{self.path.name}"
        load, quick = duration(self.minutes["load"]), duration(self.minutes["quick"])
        return (
            f"[![Open In Colab]({colab}/assets/colab-badge.svg)]({link})",
            f"**Expected time** on two cores: {load} with the committed records, {quick} to compute everything.",
        )


def colab_line() -> str:
    """The first code cell: on Colab it fetches the repository, elsewhere it does nothing.

    The link lets Python find the package in the working folder, and the package the models beside it.
    """
    clone = f"git clone -q --depth 1 -b {paths.RELEASE} https://github.com/{paths.REPOSITORY} repository"
    return f"![ -d /content ] && {clone} && ln -s repository/erasekit . && pip install -q ./repository"


def duration(minutes: float) -> str:
    return f"{60 * minutes:.0f} s" if minutes < 1 else f"{minutes:g} min"


def read(path: Path) -> Notebook:
    """Raises Refusal where the opening cell or the metadata lacks something."""
    notebook = nbformat.read(path, as_version=4)
    opening = notebook.cells[0].source if notebook.cells else ""
    title, claim = (re.search(p, opening, re.MULTILINE) for p in (r"^# (.+)$", r"^\*\*Claim\.\*\* (.+)$"))
    if not (title and claim):
        raise Refusal(f"{path.name}: its first cell lacks a line '# title' or '**Claim.** sentence'")
    try:
        return Notebook(path, title[1], claim[1], **notebook.metadata.get("erasekit", {}))
    except TypeError as error:
        raise Refusal(f"{path.name}: its notebook metadata 'erasekit' does not fit ({error})") from None


def find(only: list[str] | None = None) -> list[Notebook]:
    """All notebooks in order, or those that `only` names in full ("02_method") or by number ("02")."""
    books = [read(path) for path in sorted(paths.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))]
    if not books:
        raise Refusal(f"there are no notebooks in {paths.NOTEBOOKS}")
    for wanted in only or []:
        if not any(wanted in (book.name, book.name[:2]) for book in books):
            raise Refusal(f"unknown notebook {wanted!r}; the notebooks are {', '.join(book.name for book in books)}")
    return [book for book in books if not only or book.name in only or book.name[:2] in only]


def execute(book: Notebook, output: Path, parameters: dict, bar: bool = False) -> None:
    """Run a notebook in its folder and save it to `output`, cell by cell. Raises Failure."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    bar = {"desc": book.name} if bar else False
    how = KERNEL | {"cwd": book.path.parent, "progress_bar": bar, "execution_timeout": CELL_TIMEOUT}
    try:
        execute_notebook(book.path, output, parameters, **how)
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        reason = "its kernel was killed, most likely for memory: close other programs, or take a smaller --preset"
    except CellTimeoutError:
        reason = f"the cell did not end within {CELL_TIMEOUT} seconds"
    else:
        return
    number, line = _last_cell(output)
    reason = "\n  ".join(reason.splitlines()[:6])
    raise Failure(f"{book.name} stopped in cell [{number}] ({line})\n  {reason}\n  executed so far: {output}")


def _last_cell(output: Path) -> tuple[int, str]:
    """Execution number and first line of the last cell that papermill started."""
    cells = [cell for cell in nbformat.read(output, as_version=4).cells if cell.cell_type == "code"]
    number = max(i for i, cell in enumerate(cells, 1) if cell.metadata.papermill.start_time)
    return number, cells[number - 1].source.splitlines()[0]


def render(book: Notebook) -> None:
    """Execute a notebook at its default parameters and keep the outputs in the file, without traces of the machine."""
    from nbclient import NotebookClient

    notebook = nbformat.read(book.path, as_version=4)
    how = {"kernel_name": KERNEL["kernel_name"], "extra_arguments": KERNEL["extra_arguments"]}
    how |= {"startup_timeout": KERNEL["start_timeout"], "timeout": CELL_TIMEOUT}
    NotebookClient(notebook, **how, resources={"metadata": {"path": str(book.path.parent)}}).execute()
    nbformat.write(clean(notebook), book.path)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Keep what a reader sees: text, tables, images. Drop execution times, machine metadata, progress bars and widgets.

    A cell that had a widget is tagged so that nbval does not compare it, since GitHub shows none.
    """
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code":
            shown = [out for out in cell.outputs if WIDGET not in out.get("data", {}) and out.get("name") != "stderr"]
            if len(shown) < len(cell.outputs) and "nbval-ignore-output" not in tags:
                tags = [*tags, "nbval-ignore-output"]
            cell.outputs = _join_streams(shown)
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = {}
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    own = {"erasekit": notebook.metadata["erasekit"]} if "erasekit" in notebook.metadata else {}
    notebook.metadata = nbformat.from_dict(own | METADATA)
    return notebook


def _join_streams(outputs: list) -> list:
    """Consecutive prints as one output, however the kernel happened to send them."""
    joined = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m erasekit.tools.notebooks", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["render"])
    parser.add_argument("only", nargs="*", metavar="NOTEBOOK", help="such as 00 or 02_method; all without one")
    args = parser.parse_args(argv)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for book in find(args.only):
        render(book)
        print(f"{book.path.name}: {book.path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
