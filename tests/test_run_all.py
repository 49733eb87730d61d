"""run_all on tiny notebooks, with the real papermill and real kernels."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from erasekit import paths
from erasekit.tools import run_all

PARAMETERS = 'world: str = "emojinette"\npreset: str = "quick"\nrecompute: bool = False\nsteps: int = 3'
MINUTES = {"load": 0.1, "smoke": 0.2, "quick": 3, "full": 60}


def write(name: str, *sources: str, **declared) -> None:
    """A notebook in the test's folder that adds its name and parameters to log.txt, then runs `sources`."""
    log = f'print("{name}", world, preset, recompute, steps, file=open("log.txt", "a"))'
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    opening = new_markdown_cell(
        f"# {name[:2]} · Title\n\n**Claim.** {name} runs, which is all that it has to show here."
    )
    cells = [opening, parameters, *(new_code_cell(source) for source in (log, *sources))]
    metadata = {"erasekit": {"minutes": MINUTES, "disk_mb": 1} | declared}
    metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python"}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), paths.NOTEBOOKS / f"{name}.ipynb")


def log() -> list[str]:
    """What the notebooks have logged; they must have run in their own folder."""
    path = paths.NOTEBOOKS / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("NOTEBOOKS", "FIGURES", "RECORDS", "BUILD"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
        (tmp_path / name.lower()).mkdir()
    monkeypatch.delenv("ERASEKIT_RECORD", raising=False)


def test_live_notebooks_run_first_and_new_files_are_listed(capsys):
    made = [paths.BUILD / "records/emojinette/smoke/objects.json", paths.BUILD / "figures/emojinette/objects_grid.png"]
    for path in made:
        path.parent.mkdir(parents=True)
    (made[1].parent / "manifest.json").write_text('{"objects_grid": {"notebook": "04_objects"}}')
    (made[0].parent / "world.json").write_text("{}")
    os.utime(made[0].parent / "world.json", (0, 0))
    write("04_objects", *(f"open({str(path)!r}, 'w').write('new')" for path in made))
    write("01_world")
    write("02_method", live=True, smoke={"steps": 5})
    (paths.NOTEBOOKS / "draft.ipynb").write_text("not a numbered notebook")
    assert run_all.main(["--preset", "smoke"]) == 0
    assert {*log()} == {
        "02_method emojinette smoke False 5",
        *(f"{n} emojinette smoke False 3" for n in ("01_world", "04_objects")),
    }
    executed = nbformat.read(paths.BUILD / "emojinette" / "smoke" / "04_objects.ipynb", as_version=4)
    assert executed.cells[-1].execution_count
    shown = capsys.readouterr().out
    assert "objects.json" in shown and "objects_grid.png" in shown and "world.json" not in shown


def test_notebooks_without_studies_load_two_at_a_time(capsys):
    write("00_a")
    write("01_b")
    assert run_all.main([]) == 0
    assert {*log()} == {"00_a emojinette quick False 3", "01_b emojinette quick False 3"}
    shown = capsys.readouterr().out
    assert shown.count("records and figures loaded") == 2
    assert all(len(line) <= run_all.COLUMNS for line in shown.splitlines() if "runs, which" in line)


def test_a_failure_names_the_cell(capsys):
    write("00_a", live=True)
    write("01_b", "m = 0", "raise ValueError('m must be at least 1') if m == 0 else None")
    assert run_all.main(["--set", "steps=7"]) == 1
    assert log() == ["00_a emojinette quick False 7", "01_b emojinette quick False 7"]
    shown = capsys.readouterr().err
    assert "01_b stopped in cell [5] (raise ValueError(" in shown and "ValueError: m must be at least 1" in shown
    assert str(paths.BUILD / "emojinette" / "quick" / "01_b.ipynb") in shown
    assert "The same command continues" in shown


@pytest.mark.slow
def test_a_killed_kernel_is_recognized(capsys):
    write("00_a", "import os\nos.kill(os.getpid(), 9)")
    assert run_all.main(["--recompute"]) == 1
    shown = capsys.readouterr().err
    assert "killed, most likely for memory" in shown and "cell [4] (import os)" in shown


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--set", "stepz=7"], "unknown parameter 'stepz'; 00_a accepts steps"),
        (["--set", "world=sd14"], "unknown parameter 'world'; 00_a accepts steps"),
        (["--set", "steps"], "--set takes NAME=VALUE, not 'steps'"),
        (["--only", "00", "07"], "unknown notebook '07'; the notebooks are 00_a"),
        (["--world", "narnia"], "unknown world 'narnia'; accepted are emojinette"),
        (["--preset", "huge"], "unknown preset 'huge'; accepted are smoke, quick, full"),
        (["test", "--al"], "unknown option '--al' of test: accepted is --all"),
    ],
)
def test_wrong_input_is_one_sentence_and_runs_nothing(argv, named, capsys):
    write("00_a")
    assert run_all.main(argv) == 2
    shown = capsys.readouterr().err
    assert named in shown and shown.count("\n") == 1
    assert not log()


def test_a_full_disk_is_refused_before_anything_runs(monkeypatch, capsys):
    write("00_a", live=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**19))
    assert run_all.main([]) == 2
    assert "needs 1 MB" in capsys.readouterr().err and not log()


def test_list_runs_nothing(capsys):
    write("00_a")
    assert run_all.main(["--list"]) == 0
    assert "00_a runs" in capsys.readouterr().out
    assert not list(paths.BUILD.rglob("*.ipynb"))


@pytest.mark.parametrize("lacking", ["minutes", "claim"])
def test_a_notebook_that_declares_too_little_is_named(lacking, capsys):
    write("00_a")
    path = paths.NOTEBOOKS / "00_a.ipynb"
    notebook = json.loads(path.read_text().replace("**Claim.**", "") if lacking == "claim" else path.read_text())
    notebook["metadata"]["erasekit"].pop(lacking, None)
    path.write_text(json.dumps(notebook))
    assert run_all.main([]) == 2
    assert capsys.readouterr().err.startswith("run_all: 00_a.ipynb: its ")


# ------------------------------------------------------------------------------------------------------ the test command


def test_a_stage_returns_pytest_s_summary(capfd):
    assert run_all.run_stage([sys.executable, "-c", "print('....\\n3 passed, 1 skipped in 0.10s')"]) == (
        0,
        "3 passed, 1 skipped in 0.10s",
    )
    assert run_all.run_stage([sys.executable, "-c", "print('1 failed in 0.1s'); exit(1)"]) == (1, "1 failed in 0.1s")


@pytest.mark.parametrize("summary, code", [("2 passed in 1.00s", 0), ("", 1), ("5 skipped in 1.00s", 1)])
def test_no_stage_passes_without_tests(summary, code, monkeypatch, capsys):
    monkeypatch.setattr(run_all, "notebook_copies", lambda everything: (paths.BUILD, paths.BUILD))
    monkeypatch.setattr(run_all, "run_stage", lambda command: (0, summary if "pytest" in command else ""))
    assert run_all.main(["test"]) == code
    shown = capsys.readouterr()
    assert f"pytest: {'no test passed' if code else summary}" in shown.out + shown.err


def test_copies_for_nbval(monkeypatch):
    write("00_a", live=True, smoke={"steps": 1})
    write("01_b", "1 + 1")
    compared, computed = run_all.notebook_copies(everything=True)
    [live, loading] = (nbformat.read(path, as_version=4) for path in sorted(compared.iterdir()))
    assert "steps = 1" in live.cells[2].source and 'preset = "smoke"' in live.cells[2].source
    assert all("nbval-check-output" in cell.metadata.tags for cell in loading.cells)
    [path] = computed.iterdir()
    assert "recompute = True" in nbformat.read(path, as_version=4).cells[2].source
