"""The table of methods: each cell is its study's own."""

from types import SimpleNamespace

import pandas as pd
import pytest

from erasekit.studies import STUDIES
from erasekit.studies.operating_points import PUBLIC
from erasekit.tools import summary


@pytest.fixture
def tabled(monkeypatch):
    """Records whose study has this table."""

    def record(table, **options):
        monkeypatch.setattr(summary, "module", lambda study: SimpleNamespace(table=lambda record: table))
        return SimpleNamespace(study="a study", **options)

    return record


def test_cells_are_columns_or_rows_of_a_studys_table(tabled):
    frame = pd.DataFrame({"x": ["1.0", "2.0"], "y": ["3.0", ""]}, index=["base", "oracle (never saw them)"])
    assert summary.column("y")(tabled(frame)) == {"base": "3.0", "oracle": ""}
    assert summary.row("x")(tabled(frame.T)) == {"base": "1.0", "oracle": "2.0"}


def test_the_most_concepts_at_once(tabled):
    frame = pd.DataFrame(
        {"ESR-1": ["50.0 (1 to 2)", "95.0 (9 to 9)", "1.0"], "97 other objects": ["90.0", "80.0 (7 to 8)", "2.0"]},
        index=["uce, 5", "uce, 100", "kpop, 10"],
    )
    record = tabled(frame, settings={"counts": [5, 100, 10]}, data={"kept": 97})
    assert summary.most_at_once("ESR-1")(record) == {"uce": "95.0 (9 to 9)"}
    assert summary.most_at_once("kept")(record) == {"uce": "80.0 (7 to 8)"}


def test_the_picture_has_every_number_and_is_darkest_where_a_number_is_best(tmp_path, monkeypatch):
    heads = ("kept at 95 % erased", "10 new words, 10 steps")  # more is better, less is better
    rows = [["base", "99.0", "100.0"], ["uce", "90.0 (80 to 95)", "10.0"], ["kpop", "80.0", ""], ["ca", "85.0", "50.0"]]
    drawn, axes = {}, summary.plots.plt.Axes
    monkeypatch.setattr(axes, "imshow", lambda ax, values, **options: drawn.update(values=values))
    monkeypatch.setattr(axes, "text", lambda ax, x, y, text, **options: drawn.setdefault("texts", []).append(text))
    summary.draw_summary([["model", *heads], *rows], tmp_path / "a.png")
    assert drawn["values"].filled(-1).tolist() == [[-1, -1], [1, 1], [0, -1], [0.5, 0]]
    assert {"99.0", "90.0", "80 to 95", "10.0", "–"} <= {*drawn["texts"]} and (tmp_path / "a.png").exists()


def test_ten_words_are_those_of_the_fewest_steps():
    rows = [("uce", "textual inversion", 0, 0.0), ("uce", "textual inversion", 10, 40.0)]
    rows += [("uce", "textual inversion", 200, 90.0), ("uce", "hard prompt", 10, 70.0)]
    runs = [dict(zip(("method", "attack", "steps", "rate"), row)) | {"concept": c} for row in rows for c in "ab"]
    assert summary.words(SimpleNamespace(data={"runs": runs, "N": 25}))["uce"].startswith("40.0 (")


@pytest.mark.parametrize("most, text", [(96.0, "90.0 ("), (94.0, summary.NOT_REACHED)])
def test_what_is_kept_is_told_where_enough_is_erased(most, text):
    by_class = {"ESR-1": {"a": 100.0 - most}, "PSR-1": {"b": 50.0}, "others": {"c": 90.0}}
    data = {"base": {"S1": {"others": 99.0}, "S2": {"others": 98.0}}}
    data["runs"] = [{"method": "uce", "factor": 1.0, "by_class": by_class}]
    settings = {"methods": ["uce"], "factors": [1.0], "seeds": 25, "kept_seeds": 10, "other_seeds": 1}
    found = summary.kept(SimpleNamespace(data=data, settings=settings))
    assert found["base"] == "98.5" and found["uce"].startswith(text)


def test_a_study_without_a_record_has_no_column(monkeypatch):
    columns = {
        "one": ("objects", lambda record: {"uce": record}, summary.MORE),
        "two": ("attacks", lambda record: {"uce": "never"}, summary.MORE),
    }
    monkeypatch.setattr(summary, "COLUMNS", columns)
    head, *rows = summary.summary({"objects": "1.0"})
    assert head == ["model", "one"] and {row[0] for row in rows} == {*summary.ROWS}
    assert [row for row in rows if row[1]] == [["uce", "1.0"]]


def test_methods_stand_below_the_references_by_what_they_keep(monkeypatch):
    cells = {"base": "99.0", "uce": "90.5 (80 to 95)", "kpop": "98.0 (97 to 99)", "ace": summary.NOT_REACHED}
    monkeypatch.setattr(summary, "COLUMNS", {"kept": ("stronger", lambda record: cells, summary.MORE)})
    names = [row[0] for row in summary.summary({"stronger": None})[1:]]
    assert names[:4] == ["base", "oracle", "kpop", "uce"] and {*names} == {"base", "oracle", *PUBLIC}


def test_columns_are_of_studies_there_are():
    assert {study for study, *_ in summary.COLUMNS.values()} <= set(STUDIES)
