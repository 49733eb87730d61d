"""Verification: narrowed settings are recomputed, matching rows are compared, and only `verified` changes in the record."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from erasekit import paths, studies, worlds
from erasekit.studies.kit.records import Record
from erasekit.tools import verify


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = ("uce", "kpop", "esd-x")
    training_seeds: int = 3


def rows(settings, shift=0.0):
    return [
        {
            "method": method,
            "training_seed": seed,
            "scale": scale,
            "ESR-1": 90.0 + shift,
            "training_seconds": 3.0 + 9 * shift,
        }
        for method in settings.methods
        for seed in range(settings.training_seeds)
        for scale in (0.5, 1.0)
    ]


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A committed record of a study whose numbers are 0.25 larger today."""
    monkeypatch.setattr(paths, "RECORDS", tmp_path)
    presets = {"full": Settings()}
    study = SimpleNamespace(
        PRESETS=presets, compute=lambda world, s: ({"runs": rows(s, 0.25), "base": {"ESR-1": 0.0}}, {})
    )
    monkeypatch.setattr(studies, "module", lambda name: study)
    monkeypatch.setattr(worlds, "load", lambda name: None)
    made = {"commit": "c", "versions": {}, "device": "cpu", "seconds": 1.0, "date": "2026-01-01"}
    data = {"runs": rows(Settings()), "base": {"ESR-1": 0.0}}
    record = Record(
        tmp_path / "emojinette/full/fake.json", "fake", "full", {}, data, {}, made, {"name": "w", "hash": "h"}, 1
    )
    record.save()
    return record


def test_narrowed_cells_are_compared_and_noted(record, capsys):
    before = json.loads(record.path.read_text())
    assert verify.verify("fake", cells=2) == 0
    after = json.loads(record.path.read_text())
    [entry] = after.pop("verified")
    assert before.items() >= after.items()
    # the rates of two methods at two scales and of the base
    assert (entry["cells"], entry["numbers"], entry["largest_difference"]) == (2, 5, 0.25)
    assert "largest difference 0.25 at .runs" in capsys.readouterr().out


def test_a_study_chooses_how_it_is_narrowed():
    study = SimpleNamespace(PRESETS={"full": Settings()}, VERIFY={"methods": ("kpop", "esd-x", "uce")})
    assert verify.narrow(study, "full", 1) == Settings(methods=("kpop",))


def test_rows_without_a_counterpart_are_left_out():
    old, new = [{"m": 1, "rate": 1.0}, {"m": 2, "rate": 2.0}], [{"m": 2, "rate": 2.5}, {"m": 3, "rate": 9.0}]
    assert [difference for difference, _ in verify.differences(new, old)] == [0.5]


def test_nothing_to_compare_is_a_failure(record, monkeypatch, capsys):
    monkeypatch.setattr(verify, "narrow", lambda *_: Settings(methods=()))
    monkeypatch.setattr(verify, "differences", lambda new, old: [])
    assert verify.verify("fake", cells=2) == 1
    assert "nothing to compare" in capsys.readouterr().err
