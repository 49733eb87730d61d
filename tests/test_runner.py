"""The runner on tiny notebooks, with the real papermill and real kernels."""

import json
import os
import shutil
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from erasekit import paths, runner
from erasekit.badges import renew

PARAMETERS = 'world: str = "emojinette"\nscale: str = "quick"\nfresh: bool = False\nsteps: int = 3'


def write(name: str, *sources: str) -> None:
    """A notebook in the test's notebooks/ that adds its name and parameters to log.txt, then runs `sources`."""
    minutes = {"smoke": 0.1, "quick": 0.2, "full": 1}
    declared = {"claim": f"{name} runs", "minutes": minutes, "minutes_fresh": minutes, "disk_mb": 1, "figures": [name]}
    log = f'print("{name}", world, scale, fresh, steps, file=open("log.txt", "a"))'
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# Title"), parameters, *(new_code_cell(source) for source in (log, *sources))]
    metadata = {"erasekit": declared, "kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), paths.NOTEBOOKS / f"{name}.ipynb")


def log() -> list[str]:
    """What the notebooks have logged; the runner must have run them in their own folder."""
    return (paths.NOTEBOOKS / "log.txt").read_text().splitlines()


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("NOTEBOOKS", "FIGURES", "RECORDS", "BUILD", "MODELS"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
        (tmp_path / name.lower()).mkdir()


def test_runs_in_order_and_tells_what_was_made(capsys):
    folder = paths.BUILD / "figures" / "emojinette"  # of scale smoke
    folder.mkdir(parents=True)
    figure, kept = folder / "01_b.png", folder / "00_a.png"
    kept.write_bytes(b"old")
    os.utime(kept, (0, 0))
    write("01_b", f"open({str(figure)!r}, 'w').write('new')")
    write("00_a")
    (paths.NOTEBOOKS / "draft.ipynb").write_text("not a numbered notebook")
    assert runner.main(["--scale", "smoke", "--fresh", "--set", "steps=7"]) == 0
    assert log() == ["00_a emojinette smoke True 7", "01_b emojinette smoke True 7"]
    executed = nbformat.read(paths.BUILD / "emojinette" / "smoke" / "01_b.ipynb", as_version=4)
    assert executed.cells[-1].execution_count
    shown = capsys.readouterr().out
    assert [line.split()[-1] for line in shown.splitlines() if ".png" in line] == ["kept", "rewritten"]
    assert "01_b.pdf is missing" in shown


def test_what_other_settings_made_is_shown_where_it_lies(capsys):
    (paths.FIGURES / "00_a.png").write_bytes(b"old")
    os.utime(paths.FIGURES / "00_a.png", (0, 0))
    made = [paths.BUILD / "figures/emojinette/00_a.png", paths.BUILD / "records/emojinette/quick/a.json"]
    for path in made:
        path.parent.mkdir(parents=True)
    (made[1].parent / "earlier.json").write_text("{}")
    os.utime(made[1].parent / "earlier.json", (0, 0))
    write("00_a", *(f"open({str(path)!r}, 'w').write('new')" for path in made))
    assert runner.main(["--set", "steps=7"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[-1] for line in shown.splitlines() if "00_a.png" in line] == ["rewritten"]
    assert "a.json" in shown and "earlier.json" not in shown


def test_a_failure_names_the_cell_and_the_next_run_goes_on(capsys):
    write("00_a")
    write("01_b", "m = 0", "raise ValueError('m must be at least 1') if m == 0 else None")
    write("02_c")
    assert runner.main([]) == 1
    shown = capsys.readouterr().err
    assert "01_b stopped in cell [5] (raise ValueError(" in shown
    assert "ValueError: m must be at least 1" in shown
    assert str(paths.BUILD / "emojinette" / "quick" / "01_b.ipynb") in shown

    write("01_b", "m = 1")
    assert runner.main([]) == 0
    assert "done in the interrupted run" in capsys.readouterr().out
    assert [line.split()[0] for line in log()] == ["00_a", "01_b", "01_b", "02_c"]

    assert runner.main(["--only", "00"]) == 0  # a finished run leaves nothing to go on from
    assert log()[-1].startswith("00_a")


def test_a_killed_kernel_is_told_apart(capsys):
    write("00_a", "import os\nos.kill(os.getpid(), 9)")
    assert runner.main([]) == 1
    shown = capsys.readouterr().err
    assert "killed, most likely for memory" in shown
    assert "cell [4] (import os)" in shown


def test_what_changes_the_results_undoes_the_skipping(monkeypatch):
    write("00_a")
    book = runner.find()[0]
    (paths.MODELS / "model.safetensors").write_bytes(b"weights")
    marks = {runner.fingerprint(book, {"steps": 3}), runner.fingerprint(book, {"steps": 4})}
    (paths.MODELS / "model.safetensors").write_bytes(b"other weights")
    marks.add(runner.fingerprint(book, {"steps": 3}))
    write("00_a", "1 + 1")
    marks.add(runner.fingerprint(book, {"steps": 3}))
    assert len(marks) == 4


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--set", "stepz=7"], "unknown parameter 'stepz'; 00_a accepts steps"),
        (["--set", "world=sd14"], "unknown parameter 'world'; 00_a accepts steps"),
        (["--set", "steps"], "--set takes NAME=VALUE, not 'steps'"),
        (["--only", "00", "07"], "unknown notebook '07'; the notebooks are 00_a"),
        (["--world", "narnia"], "unknown world 'narnia'; accepted are emojinette"),
        (["--scale", "huge"], "unknown scale 'huge'; accepted are smoke, quick, full"),
    ],
)
def test_wrong_input_is_one_sentence_and_runs_nothing(argv, named, capsys):
    write("00_a")
    assert runner.main(argv) == 2
    shown = capsys.readouterr().err
    assert named in shown
    assert shown.count("\n") == 1
    assert not (paths.NOTEBOOKS / "log.txt").exists()


def test_a_full_disk_is_refused_before_anything_runs(monkeypatch, capsys):
    write("00_a")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**19))
    assert runner.main([]) == 2
    assert "needs 1 MB" in capsys.readouterr().err
    assert not (paths.NOTEBOOKS / "log.txt").exists()


def test_list_runs_nothing(capsys):
    write("00_a")
    assert runner.main(["--list"]) == 0
    assert "00_a runs" in capsys.readouterr().out
    assert not list(paths.BUILD.rglob("*.ipynb"))


def test_metadata_that_does_not_fit_is_named(capsys):
    write("00_a")
    path = paths.NOTEBOOKS / "00_a.ipynb"
    notebook = json.loads(path.read_text())
    del notebook["metadata"]["erasekit"]["claim"]
    path.write_text(json.dumps(notebook))
    assert runner.main([]) == 2
    assert "00_a.ipynb: its notebook metadata 'erasekit' does not fit" in capsys.readouterr().err


def test_the_address_is_renewed_and_other_repositories_are_left():
    old = (
        "https://colab.research.google.com/github/old/name/blob/v1/notebooks/00_a.ipynb "
        "git+https://github.com/old/name@v1 https://github.com/old/name.git https://github.com/old/name-too "
        "https://github.com/rohitgandikota/erasing"
    )
    assert renew(old) == (
        f"https://colab.research.google.com/github/{paths.REPOSITORY}/blob/{paths.RELEASE}/notebooks/00_a.ipynb "
        f"git+https://github.com/{paths.REPOSITORY}@{paths.RELEASE} https://github.com/{paths.REPOSITORY}.git "
        "https://github.com/old/name-too https://github.com/rohitgandikota/erasing"
    )
    assert renew(renew(old)) == renew(old)
