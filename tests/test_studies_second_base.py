"""Notebook 04: five methods on two bases, and what varies: base, training or images."""

import copy
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest

from erasekit.studies import second_base
from erasekit.worlds.benchmark import Benchmark

FACTORS = (0.85, 1.0, 1.3)
POINTS = {m: {"settings": {}, "scale": 0.5} for m in ("uce", "kpop")}


def line(erased: tuple, kept: float) -> list[dict]:
    """ESR-1 of the one erased class at each factor; both other objects are kept alike."""
    by_class = [{"ESR-1": {"a": 100.0 - e}, "PSR-1": {"b": 100.0}, "others": {"x": kept, "y": kept}} for e in erased]
    return [{"ESR-1": e, "by_class": own} for e, own in zip(erased, by_class)]


@pytest.fixture
def made(toy, monkeypatch):
    """A record of two bases: KPOP's three trainings keep 90, 92 and 94 % on the first, 10 points less on the second."""
    asked = []

    def rates_along_step(world, s, split, method, point, seed):
        asked.append((world.name, split, method, seed))
        kept = {"uce": 80.0, "kpop": 90.0 + 2 * seed}[method] - 10 * (world.name == "second")
        return line((80.0, 95.0, 100.0), kept)

    monkeypatch.setattr(second_base, "rates_along_step", rates_along_step)
    monkeypatch.setattr(second_base, "untrained", lambda world, s, split: {"of": world.name})
    other, first = copy.copy(toy), copy.copy(toy)
    other.name, first.name = "second", "first"
    monkeypatch.setattr(type(toy), "second_base", lambda self: other if self is first else None)
    settings = replace(second_base.Settings(("uce", "kpop"), POINTS), factors=FACTORS, seeds=4)
    data, _ = second_base.compute(first, settings)
    return SimpleNamespace(data=data, settings=asdict(settings)), asked


def test_each_training_is_measured_on_both_bases_and_a_closed_form_once(made):
    record, asked = made
    trainings = [("uce", 0), ("kpop", 0), ("kpop", 1), ("kpop", 2)]
    assert asked == [(base, split, *own) for base in ("first", "second") for split in ("S1", "S2") for own in trainings]
    assert record.data["base"]["second"] == {split: {"of": "second"} for split in ("S1", "S2")}
    assert len(record.data["runs"]) == len(asked) * len(FACTORS)


def test_what_varies_is_told_apart(made):
    record, _ = made
    rates = second_base.measured_rates(record, "second", "kpop")
    assert rates["others"].tolist() == [[80, 80], [82, 82], [84, 84]]  # trainings x objects, where 95 % are erased
    assert rates["ESR-1"].tolist() == [[95, 95]] * 3  # trainings x classes of both splits, at the step's own size
    varies = second_base.spread(record, "kpop")
    assert varies["others"]["trainings"] == pytest.approx(2.0)
    assert varies["others"]["bases"] == pytest.approx(np.std([92, 82], ddof=1))
    assert varies["ESR-1"] == pytest.approx(
        {"concepts": 0, "bases": 0, "trainings": 0, "images": 100 * np.sqrt(0.95 * 0.05 / 3 / 2)}
    )
    assert np.isnan(second_base.spread(record, "uce")["ESR-1"]["trainings"])  # a closed form has one


def test_a_world_without_a_second_base_has_its_own_rows(toy, monkeypatch):
    monkeypatch.setattr(second_base, "rates_along_step", lambda *a: line((80.0, 95.0, 100.0), 90.0))
    monkeypatch.setattr(second_base, "untrained", lambda *a: {})
    assert Benchmark.second_base(toy) is None
    data, _ = second_base.compute(toy, second_base.Settings(("uce",), POINTS, factors=FACTORS))
    assert {run["base"] for run in data["runs"]} == {"bundled"} == set(data["bases"])


def test_the_bundled_world_has_a_second_base(world):
    other = world.second_base()
    assert other.name == "emojinette-seed1" and other.second_base() is None
    assert other.components_hash == world.components_hash and other.version != world.version
    assert other.precision == world.precision and other.groups == world.groups
