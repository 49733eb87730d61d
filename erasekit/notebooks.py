"""The notebooks: what each declares about itself, and how one is executed with papermill."""

from dataclasses import dataclass
from pathlib import Path

import nbformat

from erasekit import paths

CELL_TIMEOUT = 6 * 3600  # seconds; a hung cell must end some day, a full training must not be cut


class Refusal(Exception):
    """One sentence on why nothing was run."""


class Failure(Exception):
    """A few lines on where and why a notebook stopped."""


@dataclass(frozen=True)
class Notebook:
    """A notebook and its metadata `erasekit`; minutes are per scale, on two cores."""

    path: Path
    claim: str
    minutes: dict[str, float]  # with valid records
    minutes_fresh: dict[str, float]  # computing everything
    disk_mb: int
    figures: list[str]

    @property
    def name(self) -> str:
        return self.path.stem

    def own_parameters(self) -> set[str]:
        """The parameters beyond world, scale and fresh, which have options of their own."""
        from papermill import inspect_notebook

        return set(inspect_notebook(self.path)) - {"world", "scale", "fresh"}


def read(path: Path) -> Notebook:
    metadata = nbformat.read(path, as_version=4).metadata.get("erasekit", {})
    try:
        return Notebook(path, **metadata)
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


def execute(book: Notebook, output: Path, parameters: dict, bar: bool) -> None:
    """Run `book` in its folder and keep it in `output`, cell by cell. Raises Failure."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    try:
        execute_notebook(
            book.path,
            output,
            parameters,
            kernel_name="python3",
            cwd=paths.NOTEBOOKS,
            progress_bar={"desc": book.name} if bar else False,
            start_timeout=180,
            execution_timeout=CELL_TIMEOUT,
            extra_arguments=["--log-level=CRITICAL"],  # else it warns, each time, that it is not encrypted
        )
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        reason = "its kernel was killed, most likely for memory: close other programs, or take a smaller --scale"
    except CellTimeoutError:
        reason = f"the cell did not end within {CELL_TIMEOUT} seconds"
    else:
        return
    number, line = _stopped_at(output)
    reason = "\n  ".join(reason.splitlines()[:6])
    raise Failure(f"{book.name} stopped in cell [{number}] ({line})\n  {reason}\n  executed so far: {output}")


def _stopped_at(output: Path) -> tuple[int, str]:
    """Execution number and first line of the last cell that papermill started."""
    cells = [cell for cell in nbformat.read(output, as_version=4).cells if cell.cell_type == "code"]
    number = max(i for i, cell in enumerate(cells, 1) if cell.metadata.papermill.start_time)
    return number, cells[number - 1].source.splitlines()[0]
