"""The comparison of methods: what it is tuned on, its frontier, its operating points, and what its figures are laid out by."""

from itertools import pairwise
from types import SimpleNamespace

import pandas as pd
import pytest

from erasekit import paths
from erasekit.baselines import METHODS
from erasekit.evaluation.intervals import wilson
from erasekit.studies import ablations, objects, operating_points, style_operating_points, unsafe
from erasekit.studies.kit.plots import pareto_front, spread
from erasekit.studies.kit.records import Record


def test_no_concept_that_is_tuned_on_or_retained_is_reported(world):
    reported = set(world.concepts("classes")).union(*world.neighbours.values())
    assert not any(reported & set(world.concepts(group)) for group in ("tuning", "tuning kept", "retained"))


def test_methods_are_compared_in_order_and_swept():
    # The tables have a method when its operating point is chosen.
    assert tuple(m for m in METHODS if m in operating_points.METHOD_NAMES) == operating_points.METHOD_NAMES
    assert all(method.sweep for method in METHODS.values())
    assert set(style_operating_points.SWEEP) <= set(METHODS)


def test_variants_change_settings_that_their_methods_have():
    rows = [(method, ablations.STRONG[method] | changes) for method, changes in ablations.VARIANTS.values()]
    rows += [(method, changes) for method, changes, _ in unsafe.VARIANTS.values()]
    assert all(objects.has_setting(method, name) for method, changes in rows for name in changes)


@pytest.mark.parametrize(
    "method, option, seed, expected",
    [
        ("kpop", "named", 2, True),
        ("uce", "named", 1, False),  # no randomness
        ("uce", "empty", 0, True),
        ("kpop", "empty", 1, False),
        ("np", "empty", 0, False),  # retains nothing
    ],
)
def test_only_runs_that_can_differ_are_computed(method, option, seed, expected):
    assert objects.worth_running(method, option, seed) == expected


def test_a_baseline_is_ahead_only_if_it_erases_more_and_keeps_more():
    def run(method, esr, psr):
        return {"method": method, "split": "S1", "ESR-1": esr, "PSR-1": psr, "others": 50.0}

    runs = [run("kpop", 90, 90), run("a", 95, 95), run("b", 99, 90), run("c", 80, 99)]
    assert objects.frontier(runs) == {"kpop": {"S1": {"PSR-1": ["a"], "others": []}}}


def test_the_recorded_frontier_follows_from_the_recorded_runs():
    data = Record.read(paths.RECORDS / "emojinette" / "full" / "objects.json").data
    assert objects.frontier([run for run in data["runs"] if run["retain"] == "named"]) == data["frontier"]


def test_points_along_the_step():
    def erasure(scale, delta):
        return SimpleNamespace(scale=scale, delta=delta, adapters={}, scaled=lambda _, x: erasure(scale * x, delta))

    measure = operating_points.along_step(None, (0.5, 1.0), lambda erasure: {"ESR-1": 100 * erasure.scale})
    assert measure(erasure(1, {"weight": 0}))[0]["points"] == [
        {"scale": 0.5, "ESR-1": 50},
        {"scale": 1.0, "ESR-1": 100},
    ]
    assert measure(erasure(1, {}))[0]["points"] == [{"scale": 1.0, "ESR-1": 100}]  # guidance alone has no step


def test_points_of_several_splits_are_averaged_by_scale():
    curves = [
        [{"scale": 0.5, "ESR-1": 10.0}, {"scale": 1.0, "ESR-1": 50.0}],
        [{"scale": 0.5, "ESR-1": 20.0}, {"scale": 1.0, "ESR-1": 60.0}],
    ]
    assert operating_points.mean_points(curves) == [{"scale": 0.5, "ESR-1": 15.0}, {"scale": 1.0, "ESR-1": 55.0}]


def test_interpolation_of_the_ablations():
    curve = [
        {"scale": x, "ESR-1": esr, "ESR-5": 0.0, "PSR-1": psr}
        for x, esr, psr in ((0.7, 90.0, 100.0), (1.0, 100.0, 80.0))
    ]
    short = [point | {"ESR-1": 50.0} for point in curve]
    runs = [{"variant": name, "curve": points} for name, points in (("kpop", curve), ("spm", short))]
    table = ablations.table(SimpleNamespace(data={"runs": runs}))
    assert table["PSR-1 at ESR-1 95"].to_dict() == {"kpop": 90.0, "spm": ""}  # too little is erased: no value


def test_pareto_front_has_what_nothing_beats():
    assert pareto_front([(1, 5), (2, 4), (2, 3), (3, 1), (0, 5)]) == [(1, 5), (2, 4), (3, 1)]


def test_labels_are_apart_in_order_and_on_the_axis():
    placed = spread([10.0, 9.9, 9.8, 1.0], gap=1.0, low=0.0, high=10.0)
    assert placed[0] == 10.0 and placed == sorted(placed, reverse=True)
    assert all(a - b >= 1.0 - 1e-9 for a, b in pairwise(placed))
    assert min(spread([0.1, 0.1, 0.0], gap=1.0, low=0.0, high=10.0)) == 0.0


@pytest.mark.parametrize(
    ("split", "said", "count"), [("b", {}, 1), ("a, b", {}, 2), ("S1", {}, 2), ("S1", {"S1": "abc"}, 3)]
)
def test_a_splits_rates_are_those_of_what_it_erases(split, said, count):
    """One class erased by its name leaves nine kept: its interval was that of five."""
    by_class = {name: 0.0 if n < count else 100.0 for n, name in enumerate("badc" if split == "b" else "abcd")}
    data = {"base": {split: {"by_class": by_class}}, "N": 10, "sizes": {"others": 100}, "erased": said}
    run = {"split": split, "by_class": by_class, "templates": {"x": 50.0}, "others": 90.0, "other templates": 50.0}
    record = SimpleNamespace(data=data, settings={"few_seeds": 4})
    found = objects.intervals(record, pd.DataFrame([run]))
    assert objects.num_erased(record, split) == count
    assert found["ESR-1"] == pytest.approx(wilson(100.0, 10 * count))
    assert found["PSR-1"] == pytest.approx(wilson(100.0, 10 * (4 - count)))
    assert found["others"] == wilson(90.0, 100) and found["other templates"] == wilson(50.0, 4 * count)
