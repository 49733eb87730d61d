"""What every committed notebook keeps to, so that it reads well, runs anywhere and stays small."""

import ast
import json
import re

import nbformat
import pytest

from erasekit import badges, notebooks, paths

FILES = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
MAX_LINES = 25
MAX_BYTES = 300_000
PLACES = re.compile(r"/(?:home|root|work|tmp|Users|content)/")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert FILES


def test_opens_with_title_badge_claim_and_time(path, notebook):
    book, opening = notebooks.read(path), notebook.cells[0]
    assert opening.cell_type == "markdown"
    assert opening.source.startswith(f"# {path.stem[:2]} · ")
    assert badges.badge(path.name) in opening.source
    assert "**Claim.** " in opening.source
    from_records, fresh = book.minutes["quick"], book.minutes_fresh["quick"]
    time = f"**Expected time** on two cores: {from_records} min from records, {fresh} min computing everything."
    assert time in opening.source


def test_declares_every_scale(path):
    book = notebooks.read(path)
    assert set(book.minutes) == set(book.minutes_fresh) == {"smoke", "quick", "full"}


def test_one_parameters_cell_of_literals(notebook):
    [cell] = [cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", [])]
    lines = ast.parse(cell.source).body
    assert all(isinstance(line, ast.AnnAssign) for line in lines), "papermill learns the types from the annotations"
    values = {line.target.id: ast.literal_eval(line.value) for line in lines}
    assert values.items() >= {"world": "emojinette", "scale": "quick", "fresh": False}.items()


def test_defines_nothing_and_has_short_cells(notebook):
    for cell in code(notebook):
        assert not re.search(r"^\s*(?:async def|def|class) ", cell.source, re.MULTILINE), cell.source
        assert len(cell.source.splitlines()) <= MAX_LINES, cell.source


def test_is_small_and_clean(path, notebook):
    assert path.stat().st_size < MAX_BYTES
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata, "without their state GitHub does not show the notebook"
    assert "papermill" not in notebook.metadata, "commit the notebook, not what build/ keeps of a run"


def test_names_no_place_of_one_machine(notebook):
    for cell in notebook.cells:
        outputs = json.dumps([{k: v for k, v in out.items() if k != "metadata"} for out in cell.get("outputs", [])])
        outputs = re.sub(r'"image/\w+": "[^"]*"', "", outputs)  # base64 has slashes of its own
        assert not PLACES.search(cell.source), cell.source
        assert not (found := PLACES.search(outputs)), outputs[max(0, found.start() - 80) : found.end() + 80]


def test_every_figure_of_the_readme_has_its_notebook_and_records():
    manifest = json.loads((paths.FIGURES / "manifest.json").read_text())
    shown = re.findall(r"figures/([\w-]+)\.(?:png|pdf)", (paths.ROOT / "README.md").read_text())
    assert shown
    for name in shown:
        assert (paths.FIGURES / f"{name}.png").exists()
        assert (paths.FIGURES / f"{name}.pdf").exists()
        assert (paths.NOTEBOOKS / manifest[name]["notebook"]).with_suffix(".ipynb").exists()
        for record in manifest[name]["records"]:
            assert (paths.ROOT / record).exists(), record


def test_the_readme_opens_every_notebook_in_colab():
    readme = (paths.ROOT / "README.md").read_text()
    assert [path.name for path in FILES if badges.badge(path.name) not in readme] == []


def test_the_address_is_kept_in_one_place(capsys):
    assert badges.main(["--check"]) == 0, capsys.readouterr().out
    sources = [*(paths.ROOT / "erasekit").rglob("*.py"), *paths.ROOT.glob("*.toml"), *paths.ROOT.glob("*.yml")]
    assert [path.name for path in sources if paths.REPOSITORY in path.read_text()] == ["paths.py"]
