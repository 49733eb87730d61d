"""What every committed notebook keeps to, so that it reads well on the web, runs anywhere and stays small."""

import ast
import json
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from erasekit import paths
from erasekit.tools import notebooks
from erasekit.worlds import BUNDLED

FILES = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
MAX_LINES, MAX_BYTES, MAX_WORDS = 25, 400_000, 25
MACHINE = re.compile(r"/(?:home|root|work|tmp|Users|content)/")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_there_are_notebooks():
    assert FILES


def test_opens_with_title_badge_claim_and_time(path, notebook):
    book, opening = notebooks.read(path), notebook.cells[0]
    assert opening.cell_type == "markdown" and book.title.startswith(f"{path.stem[:2]} · ")
    assert all(line in opening.source.splitlines() for line in book.opening()), (
        "run: python -m erasekit.tools.docs address"
    )


def test_a_claim_is_one_short_sentence(path):
    claim = notebooks.read(path).claim
    assert len(claim.split()) <= MAX_WORDS and claim.endswith(".")
    assert not re.search(r"[.!?] [A-Z]", claim)


def test_declares_minutes(path):
    assert notebooks.read(path).minutes.keys() == {"load", "smoke", "quick", "full"}


def test_starts_with_colab_in_one_line(notebook):
    assert code(notebook)[0].source == notebooks.colab_line()


def test_one_parameters_cell_of_literals(notebook):
    [cell] = [cell for cell in code(notebook) if "parameters" in tags(cell)]
    lines = ast.parse(cell.source).body
    assert all(isinstance(line, ast.AnnAssign) for line in lines), "papermill reads the types from the annotations"
    values = {line.target.id: ast.literal_eval(line.value) for line in lines}
    assert values["world"] in BUNDLED and values.items() >= {"preset": "quick", "recompute": False}.items()


def test_has_short_cells_and_only_live_ones_define_functions(path, notebook):
    for cell in code(notebook):
        assert len(cell.source.splitlines()) <= MAX_LINES, cell.source
        defines = re.search(r"^\s*(?:async def|def|class) ", cell.source, re.MULTILINE)
        assert not defines or notebooks.read(path).live, cell.source


def test_what_displays_has_its_output(notebook):
    for cell in code(notebook)[1:]:
        last = (ast.parse(cell.source).body or [None])[-1]
        if (
            isinstance(last, ast.Expr)
            and not cell.source.rstrip().endswith(";")
            and "nbval-ignore-output" not in tags(cell)
        ):
            assert cell.outputs, f"no output of: {cell.source}\nrun: python -m erasekit.tools.notebooks render"


def test_is_small_and_clean(path, notebook):
    assert path.stat().st_size < MAX_BYTES
    assert set(notebook.metadata) == {"erasekit", *notebooks.METADATA}, (
        "GitHub shows no notebook with half of its widgets"
    )
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        assert not any(output.output_type == "error" for output in cell.get("outputs", []))


def test_names_no_folder_of_one_machine(notebook):
    for cell in notebook.cells:
        outputs = json.dumps([{k: v for k, v in out.items() if k != "metadata"} for out in cell.get("outputs", [])])
        outputs = re.sub(r'"image/\w+": "[^"]*"', "", outputs)  # base64 has slashes of its own
        for text in (cell.source, outputs):
            assert not (found := MACHINE.search(text)), text[max(0, found.start() - 80) : found.end() + 80]


def test_cleaning_keeps_what_a_reader_sees():
    stdout = [new_output("stream", name="stdout", text=text) for text in ("loaded\n", "N = 10\n")]
    widget = new_output("display_data", {notebooks.WIDGET: {}, "text/plain": "VBox()"})
    image = new_output("display_data", {"image/png": "iVBO"}, metadata={"width": 3})
    shown = new_code_cell("show", outputs=[*stdout, image, new_output("stream", name="stderr", text="50%")])
    slider = new_code_cell("slider", outputs=[widget], metadata={"papermill": {"duration": 3.0}, "tags": ["mine"]})
    metadata = {"erasekit": {"disk_mb": 1}, "widgets": {}, "papermill": {}}
    notebook = notebooks.clean(new_notebook(cells=[new_markdown_cell("# 1"), shown, slider], metadata=metadata))
    assert set(notebook.metadata) == {"erasekit", "kernelspec", "language_info"}
    text, picture = notebook.cells[1].outputs
    assert text.text == "loaded\nN = 10\n" and picture.data == {"image/png": "iVBO"} and not picture.metadata
    assert notebook.cells[2].outputs == []
    assert notebook.cells[2].metadata == {"tags": ["mine", "nbval-ignore-output"]}
