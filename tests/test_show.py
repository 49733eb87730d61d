"""Showing a record: figures are drawn once, stay small in a notebook, and go to figures/ only when that is asked for."""

import io
import re

import numpy as np
import pytest
from PIL import Image

import erasekit
from erasekit import paths, studies
from erasekit.studies.kit import show


@pytest.fixture(scope="module")
def record():
    return studies.find("many_concepts", "emojinette", "full")[0]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.delenv("ERASEKIT_RECORD", raising=False)
    return tmp_path


@pytest.fixture
def draws(monkeypatch):
    """Counts drawings, without drawing: a blank PNG stands for each figure."""
    folders = []

    def draw(record, folder):
        folders.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (600, 400)).save(folder / "one.png")
        entry = {"notebook": "07_mechanisms", "record": record.name, "hash": show.figure_hash(record)}
        show.write_manifest(folder, show.read_manifest(folder) | {"one": entry})
        return [folder / "one.png"]

    monkeypatch.setattr(show, "draw", draw)
    return folders


def test_figures_are_drawn_into_the_build_folder_once(record, draws, folders):
    assert show.figure_files(record) == show.figure_files(record) == [folders / "build/figures/emojinette/one.png"]
    assert draws == [folders / "build/figures/emojinette"]


def test_committed_figures_change_only_when_recording(record, draws, folders, monkeypatch):
    monkeypatch.setenv("ERASEKIT_RECORD", "1")
    assert show.figure_files(record) == [folders / "figures/one.png"]
    monkeypatch.delenv("ERASEKIT_RECORD")
    assert show.figure_files(record) == [folders / "figures/one.png"] and len(draws) == 1
    (folders / "figures/one.png").unlink()
    assert show.figure_files(record) == [folders / "build/figures/emojinette/one.png"]


def test_figures_are_drawn_again_when_their_record_or_source_changes(record, draws, monkeypatch):
    show.figure_files(record)
    with monkeypatch.context() as patch:
        patch.setitem(record.data, "N", 0)
        show.figure_files(record)
        assert len(draws) == 2
    read_text = show.Path.read_text
    changed = lambda path, **how: read_text(path, **how) + "#" * (path.name == "many_concepts.py")  # noqa: E731
    monkeypatch.setattr(show.Path, "read_text", changed)
    show.figure_files(record)
    assert len(draws) == 3


def test_a_figure_is_drawn_the_same_twice(record, folders):
    [first], [second] = show.draw(record, folders / "a"), show.draw(record, folders / "b")
    assert first.read_bytes() == second.read_bytes()
    assert show.read_manifest(folders / "a")["many_concepts"]["notebook"] == "07_mechanisms"
    [pdf] = show.draw(record, folders / "c", "pdf")
    assert pdf.read_bytes().startswith(b"%PDF") and not show.read_manifest(folders / "c")


def test_a_thumbnail_fits_in_a_notebook(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1200, 2000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    png = show.thumbnail(tmp_path / "noise.png")
    image = Image.open(io.BytesIO(png))
    assert len(png) <= show.MAX_BYTES and image.width <= show.MAX_WIDTH
    assert image.height / image.width == pytest.approx(0.6, abs=0.01)
    assert Image.open(io.BytesIO(show.thumbnail(tmp_path / "noise.png", 200))).size == (200, 120)


@pytest.mark.parametrize("figures", [True, False])
def test_figures_are_shown_at_a_width_or_left_out(figures, record, draws, folders, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    show.show(record, figures=figures, width=300)
    *images, table = shown
    assert bool(images) == figures and "nowrap" in table.data and "<table" in table.data
    assert all(Image.open(io.BytesIO(image.data)).width <= 300 for image in images)


def test_the_source_line_has_numbers_and_origin(record):
    assert re.fullmatch(
        r"N = \d+ .*, seeds 0 to \d+.*; computed \d{4}-\d\d-\d\d at .*, torch .*", show.source_line(record)
    )


def test_the_key_slider_needs_a_record_of_recovery(record, sentence):
    with pytest.raises(ValueError) as error:
        erasekit.key_slider(record)
    assert "'recovery', not of 'many_concepts'" in sentence(error)


def test_the_key_slider_shows_images_by_log_weight():
    recovery = studies.find("recovery", "emojinette", "full")[0]
    choice, slider, screen = erasekit.key_slider(recovery).children
    assert len(slider.options) == 1 + len(recovery.data["log_weights"])
    before, slider.index = screen.value, len(slider.options) - 1
    assert screen.value != before
    choice.index = 1
    assert bytes(screen.value).startswith(b"\x89PNG")
