"""The parts of figures: a look for each method, labels that stay apart, no empty axes, and the studies' own choices."""

from itertools import combinations, pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from erasekit import studies
from erasekit.baselines import METHODS
from erasekit.paths import RECORDS
from erasekit.studies.kit import plots
from erasekit.studies.kit.records import Record
from erasekit.studies.mechanisms import best_prompt_lrs
from erasekit.studies.training_curve import at_erasure

OWN = (
    "quickstart",
    "key_specificity",
    "world",
    "method",
    "prompt_length",
    "training_curve",
    "mechanisms",
    "many_concepts",
    "your_pipeline",
)


@pytest.fixture(autouse=True)
def look():
    with plots.style_sheet():
        yield
    matplotlib.pyplot.close("all")


def test_each_method_has_a_look_of_its_own_and_variants_share_it():
    looks = [tuple(plots.style(method).values()) for method in (*METHODS, "base")]
    assert len(set(looks)) == len(looks)
    assert plots.style("kpop-u") == plots.style("kpop") != plots.style("esd-u") != plots.style("esd-x")
    assert plots.is_ours("kpop-anchor") and not plots.is_ours("esd-x")


def test_pareto_front_has_the_points_that_nothing_beats():
    assert plots.pareto_front([(1, 5), (2, 4), (2, 3), (3, 1), (0, 5)]) == [(1, 5), (2, 4), (3, 1)]


def test_spread_keeps_order_gap_and_limits():
    placed = plots.spread([10.0, 9.9, 9.8, 1.0], gap=1.0, low=0.0, high=10.0)
    assert placed[0] == 10.0 and placed == sorted(placed, reverse=True)
    assert all(a - b >= 1.0 - 1e-9 for a, b in pairwise(placed))
    assert min(plots.spread([0.1, 0.1, 0.0], gap=1.0, low=0.0, high=10.0)) == 0.0


def test_labels_of_crowded_points_stay_inside_the_axes_and_apart():
    figure, ax = matplotlib.pyplot.subplots(figsize=(5, 4), layout="constrained")
    ax.set(xlim=(80, 100), ylim=(80, 100))
    points = {method: (93 + n % 4, 95 - n // 4) for n, method in enumerate(METHODS)}
    plots.label_points(ax, points)
    figure.draw_without_rendering()
    texts = [text for text in ax.texts if text.get_text()]
    boxes = {text.get_text(): text.get_window_extent() for text in texts}
    assert set(boxes) == set(points)
    frame = ax.get_window_extent()
    assert all(frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1 for box in boxes.values())
    overlaps = [(a, b) for a, b in combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    assert not overlaps
    for name, point in points.items():
        x, y = ax.transData.transform(point)
        assert not any(box.contains(x, y) for box in boxes.values()), name


def test_panels_leave_no_empty_axes():
    figure, axes = plots.panels(7, columns=5)
    assert len(axes) == len(figure.axes) == 7
    assert axes[2].xaxis.get_tick_params()["labelbottom"]  # the lowest of its column now


def test_heatmap_leaves_blanks_and_labels_its_colour_bar():
    figure, ax = matplotlib.pyplot.subplots()
    plots.heatmap(ax, pd.DataFrame({"a": [1.0, np.nan], "b": [2.0, 3.0]}, index=["x", "y"]), "images, %")
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3"]
    assert figure.axes[1].get_ylabel() == "images, %"


def test_image_grid_shows_each_image_once_and_leaves_out_missing_ones():
    image = np.zeros((4, 4, 3), np.uint8)
    rows = {"base": [image, image, image], "kpop": [image, None, None]}
    figure = plots.image_grid(rows, groups={"erased": 1, "kept": 2}, captions={(0, 0): "100 %"}, outlined=[(1, 0)])
    (ax,) = figure.axes
    assert len(ax.images) == 4 and len(ax.patches) == 1
    assert {"base", "kpop", "erased", "kept", "100 %"} == {text.get_text() for text in ax.texts}


def test_a_mechanisms_learning_rate_is_the_one_whose_keys_bring_back_most():
    rows = [("a", 0.1, 90, 50, 50), ("a", 0.2, 90, 60, 50), ("a", 0.3, 80, 100, 100), ("b", 0.1, 0, 0, 0)]
    sweep = [{"mechanism": m, "prompt_lr": lr, "with the key": k, "ESR-1": e, "PSR-1": p} for m, lr, k, e, p in rows]
    assert best_prompt_lrs(sweep) == {"a": 0.2, "b": 0.1}


def test_a_training_is_read_where_it_first_erases_enough():
    run = pd.DataFrame({"erased.top-1": [60, 20, 30], "kept.top-1": [100, 90, 80], "distance": [1.0, 3.0, 5.0]})
    assert at_erasure(run, 60) == {"PSR-1, %": 95.0, "distance moved": 2.0}
    assert np.isnan(at_erasure(run, 95)["distance moved"])


@pytest.mark.parametrize("study", OWN)
def test_figures_of_committed_records_have_labels_and_no_nan(study):
    files = [RECORDS / "emojinette" / preset / f"{study}.json" for preset in ("full", "quick")]
    record = Record.read(next(file for file in files if file.exists()))
    source = studies.module(study)
    for name, figure in source.figures(record).items():
        assert name.startswith(study)
        for ax in figure.axes:
            assert ax.has_data() or ax.images, name
            texts = [text.get_text() for text in ax.texts]
            assert not any("nan" in text.lower().split() for text in texts), name
            if ax.axison and ax.lines + ax.collections + ax.patches and not ax.images:
                assert ax.get_xlabel() or ax.get_ylabel() or ax.get_title(), name
    assert len(source.table(record))


def test_models_are_ordered_by_the_rate_without_an_attack():
    rates = {"base": 40.0, "oracle": 9.0, "a": 20.0, "b": 60.0, "c": 50.0, "d": 20.0, "e": 80.0}
    assert plots.by_rate(list(rates), rates) == (["base", "e", "b", "c", "a", "d", "oracle"], [3, 6])
    assert plots.by_rate(["a", "b"], rates) == (["b", "a"], [1])
    assert plots.by_rate(["d", "base", "a"], rates) == (["base", "d", "a"], [1])
    assert plots.by_rate(["a", "base"], {}) == (["base", "a"], [1]) and plots.by_rate(["a"], {}) == (["a"], [])
