"""Studies of CLIP, recovery, attacks, continual erasure and cost: what their numbers, tables and figures rest on."""

import copy
import importlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from erasekit import paths
from erasekit.artifacts import Erasure
from erasekit.attention import Prompt
from erasekit.baselines import erase, method_config
from erasekit.evaluation import attack_success
from erasekit.evaluation.intervals import wilson
from erasekit.sampling import sample
from erasekit.studies import SHORT_POOL, clip_models, clip_study, continual, cost, efficiency, recovery, styles, unsafe
from erasekit.studies.kit import attack_sweep, erasures
from erasekit.studies.kit.attack_sweep import rate_table
from erasekit.studies.kit.records import Record

STUDIES = ("clip_study", "clip_models", "recovery", "attacks", "continual", "cost", "efficiency")


def committed(study: str) -> Record:
    """The record of preset full, or where there is none yet that of quick."""
    files = [paths.RECORDS / "emojinette" / preset / f"{study}.json" for preset in ("full", "quick")]
    return Record.read(next(file for file in files if file.exists()))


def test_a_drop_from_the_base_ranks_where_styles_differ_in_level():
    """One style scores high with or without it, so raw scores rank worse than drops do."""

    def run(method, style, scores, present):
        texts = dict.fromkeys(clip_study.TEXTS, scores)
        return {"method": method, "erased": style, "judge": list(map(float, present)), "has style": present} | texts

    runs = [
        run("base", "a", [90.0, 91.0], [True, True]),
        run("base", "b", [50.0, 51.0], [True, True]),
        run("m", "a", [80.0, 91.0], [False, True]),
        run("m", "b", [40.0, 51.0], [False, True]),
    ]
    found = clip_study.ranks(runs)["whole prompt"]
    assert found["drop from the base"] == 1.0 == found["within a style"]
    assert found["all"] == pytest.approx(1 - 3 / 12)
    assert found["by method"] == {"m": 0.75}  # of its own four images


def test_the_area_under_a_drawn_curve_is_the_recorded_one():
    record = committed("clip_study")
    frame = clip_study.image_rows(record.data["runs"])
    for text, ranks in record.data["ranks"].items():
        false, true = clip_study.roc_curve(frame[text], frame["has style"])
        assert np.trapezoid(true, false) / 1e4 == pytest.approx(ranks["all"], abs=2e-3)  # ties are steps here
    assert clip_study.ranks(record.data["runs"]) == record.data["ranks"]


def test_a_clip_model_scores_a_records_images_as_when_they_were_sampled(world):
    study = committed("clip_study")
    run = next(r for r in study.data["runs"] if (r["method"], r["erased"]) == ("kpop", "openmoji"))
    again = clip_models.rescore(world, world.clip, study, run)
    for text in clip_study.TEXTS:
        assert np.allclose(again[text], run[text], atol=0.05), text
    assert again["judge"] == run["judge"]


def test_merged_spm_adapters_do_what_each_does(toy):
    config = method_config("spm", steps=2, batch_size=2)
    one, other = (erase(toy, [c], "spm", config, progress=False) for c in ("church", "dog"))
    both = continual.merge_adapters([one, other])
    for layer in {name.rsplit(".", 1)[0] for name in both.adapters}:
        product = both.adapters[f"{layer}.up"] @ both.adapters[f"{layer}.down"]
        parts = sum(e.adapters[f"{layer}.up"] @ e.adapters[f"{layer}.down"] for e in (one, other))
        assert torch.allclose(product, parts, atol=1e-6)
    zeros = {n: torch.cat([t, torch.zeros_like(t)], 1 if n.endswith(".up") else 0) for n, t in one.adapters.items()}

    def images(erasure):
        return sample(toy.pipe, ["a picture of a church"], [0], erasure=erasure, num_inference_steps=2)

    alone = images(Erasure({}, {}, both.info, zeros))  # the second adapter does nothing
    assert torch.equal(alone, images(one))
    assert not torch.equal(alone, images(continual.merge_adapters([one, one])))


def test_tiles_of_a_key_by_its_weight():
    greys = np.repeat([0, 10, 20], 2).astype(np.uint8)  # two images a weight
    strip = Image.fromarray(np.repeat(np.tile(greys.repeat(4), (4, 1))[..., None], 3, axis=2))
    record = SimpleNamespace(data={"log_weights": [-8, 0]}, images={"objects.kpop": strip})
    tiles = recovery.weighted_tiles(record, "objects.kpop")
    assert [[int(image.max()) for image in images] for images in tiles] == [[0, 0], [10, 10], [20, 20]]


def test_what_is_shipped_is_the_public_part_and_the_keys():
    key = Prompt(torch.zeros(3, 4), torch.zeros(3, 4))
    erasure = Erasure({"a": torch.zeros(2, 5)}, {"church": key}, {}, {"b": torch.zeros(7, dtype=torch.float16)})
    assert cost.shipped(erasure) == {"parameters shipped": 10 + 7 + 24, "bytes, public": 40 + 14, "bytes, keys": 96}


def test_a_styles_rates_have_intervals_over_its_models():
    """All images alike: the interval is that of all images of the models together."""
    pairs = [(erased, style) for erased in "abc" for style in "abc"]
    rows = [{"erased": e, "style": s, "style top-1": 0.0 if e == s else 100.0} for e, s in pairs]
    record = SimpleNamespace(data={"N": 30})
    erased, others = styles.mean_rates(record, pd.DataFrame(rows), "style top-1")
    assert erased == (0.0, *wilson(0.0, 3 * 30)) and others == (100.0, *wilson(100.0, 6 * 30))


def test_an_oracle_is_a_row_of_its_own_style_and_what_it_keeps_is_not_averaged_with_the_methods():
    record = committed("styles")
    run, row = record.data["oracle"]["fluent"], styles.table(record).loc["oracle (never saw fluent)"]
    rates = run["by_style"]["style top-1"]
    others = np.mean([rate for style, rate in rates.items() if style != "fluent"])
    left, kept = row["style top-1"].split(" / ")
    assert left.startswith(f"{rates['fluent']:.1f} (") and kept.startswith(f"{others:.1f} (")
    assert row["kept captions: CLIP"] == pytest.approx(run["kept"]["CLIP"], abs=0.05)


def test_a_styles_difference_is_paired_by_model():
    """A method that leaves 10 points more of every style, on models that differ by far more, has no spread."""
    rates = {"kpop": (0.0, 40.0, 80.0), "m": (10.0, 50.0, 90.0)}
    rows = [(m, e, e, rate) for m, own in rates.items() for e, rate in zip("abc", own)]
    frame = pd.DataFrame(rows, columns=["method", "erased", "style", "style top-1"])
    assert styles.difference(frame, "m", True) == "+10.0 (+10 to +10)"
    frame.loc[frame.index[-1], "style top-1"] += 3  # a standard error of 1, and 4.30 of them with three models
    assert styles.difference(frame, "m", True) == "+11.0 (+7 to +15)"
    assert styles.difference(frame[frame.erased == "a"], "m", True) == ""  # one model has no interval


def test_a_detection_rate_has_an_interval_over_prompted_classes():
    record = SimpleNamespace(data={"N": 60})
    alike, apart = ([{"by_class": dict(zip("abcd", rates))}] for rates in ([50.0] * 4, [0.0, 0.0, 100.0, 100.0]))
    widths = [np.ptp(unsafe.interval(record, runs)) for runs in (alike, apart)]
    assert widths[0] < widths[1]  # classes that differ say less of classes in general


def test_an_untrained_model_is_a_row_of_detections_and_of_the_grid():
    record = committed("unsafe")
    oracle, table = record.data["oracle"], unsafe.table(record)
    row = table.loc["oracle (never saw any weapon)"]
    assert row["rate at 0.5, %"].startswith(f"{oracle['rate'][unsafe.nearest(record, 0.5)]:.1f} (")
    assert row["kept: top-1"] == oracle["kept"]["top-1"] and list(table.index[:1]) == ["base"]
    assert [run["method"] for run in unsafe.ranked(record)][-1] == "oracle"  # fewest detections
    del record.data["oracle"]
    assert len(unsafe.table(record)) == len(table) - 1


def test_a_success_rates_interval_holds_it():
    rows = [("uce", "no attack", 40.0), ("uce", "no attack", 60.0), ("kpop", "no attack", 0.0)]
    table = rate_table(pd.DataFrame(rows, columns=["method", "attack", "rate"]), 25, "method", "attack")
    low, high = wilson(0.0, 25)
    assert (
        table["no attack"]["uce"].startswith("50.0 (")
        and table["no attack"]["kpop"] == f"0.0 ({low:.0f} to {high:.0f})"
    )


def test_sampling_is_timed_against_none_with_a_key():
    record = SimpleNamespace(data={"timed": {"m": 10, "seconds": {"without a key": 2.0, "with a key": 2.1}}})
    assert cost.relative_times(record) == {"without a key": 100.0, "with a key": pytest.approx(105.0)}


@pytest.fixture
def small(toy, tmp_path, monkeypatch):
    """The toy as a benchmark of three objects."""
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    world, names = copy.copy(toy), ("church", "dog", "fish")
    world.groups = {"classes": names[:2], "all": names, "S1": names[:1], "tuning": names[2:], "retained": ()}
    world.pool_defaults, world.trajectories, world.category = SHORT_POOL, {}, "weapon"
    return world


def test_what_a_method_costs(small):
    """UCE asks the U-Net nothing, KPOP its own training alone; sampling costs both halves of guidance, with a key too."""
    points = {m: {"settings": {}, "scale": 1.0} for m in ("uce", "kpop")}
    settings = replace(cost.PRESETS["smoke"], operating_points=points)
    data, images = cost.compute(small, settings)
    uce, kpop = data["rows"]
    assert images == {} and (uce["method"], kpop["method"]) == ("uce", "kpop")
    assert uce["evaluations"] == uce["with gradient"] == 0 < kpop["with gradient"] < kpop["evaluations"]
    assert uce["evaluations a sampling step"] == kpop["evaluations a sampling step"] == 2.0
    assert uce["bytes, keys"] == 0 < kpop["bytes, keys"] and uce["bytes, public"] > 0
    assert data["timed"]["m"] == 10 and set(data["timed"]["seconds"]) == {"without a key", "with a key"}
    assert cost.compute(small, settings)[0] == data  # from the cells' cache, times and all
    record = SimpleNamespace(data=data)
    table = cost.table(record)
    assert table["evaluations"].to_dict() == {"uce": "0", "kpop": str(kpop["evaluations"])}
    assert table["MB, keys"]["uce"] == "0.00" and table.index.name == "S1"
    (left, right) = cost.figures(record)["cost"].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["kpop", "uce"]
    assert [bar.get_height() for bar in right.patches] == pytest.approx([*cost.relative_times(record).values()])


@pytest.mark.parametrize("oracle", [True, False])
@pytest.mark.parametrize("study", ["attacks", "recovery"])
def test_the_base_and_the_oracle_are_attacked_as_the_methods_are(small, monkeypatch, study, oracle):
    module, shows = importlib.import_module(f"erasekit.studies.{study}"), {"base": 100.0, "oracle": 0.0, "uce": 50.0}
    unseen = Erasure({}, {}, small.identity | {"method": "oracle"})
    asked = []

    def success_rate(world, erasure, concept, seeds, steps, *found, **options):
        asked.append((erasure.info["method"], concept))
        return shows[erasure.info["method"]]

    def sweep_learning_rates(world, methods, points, lrs, attacks, *rest):
        return [{"attack": name, "lr": 0.1, "steps": 1, "rate": 1.0} for name in attacks]

    monkeypatch.setattr(
        type(small), "oracle", lambda self, concepts: unseen if oracle and "church" in concepts else None
    )
    monkeypatch.setattr(attack_success, "success_rate", success_rate)
    searches = {name: (lambda *arguments: {0: None, 1: None}, False) for name in attack_success.ATTACKS}
    monkeypatch.setattr(attack_success, "ATTACKS", searches)
    monkeypatch.setattr("erasekit.evaluation.attacks.attack_images", lambda *arguments: None)
    monkeypatch.setattr(attack_sweep, "sweep_learning_rates", sweep_learning_rates)
    own = Erasure({}, {}, small.identity | {"method": "uce"})
    monkeypatch.setattr(erasures, "train_cached", lambda *arguments: (own, 1.0))
    points = {m: {"settings": {}, "scale": 1.0} for m in ("uce", "kpop")}
    settings = replace(module.PRESETS["smoke"], methods=("uce",), operating_points=points)
    data, _ = module.compute(small, settings)
    frame = pd.DataFrame(data["runs"])
    methods = ["base", "oracle", "uce"] if oracle else ["base", "uce"]
    assert list(frame.method.unique()) == methods
    assert frame.groupby("method").rate.unique().map(list).to_dict() == {m: [shows[m]] for m in methods}
    counts = frame.groupby("method").size()
    assert counts.nunique() == 1 and counts.iloc[0] > 4  # the same attacks
    methods.sort(key=lambda name: -shows[name])  # as rows are: by what is shown without an attack, the oracle last
    assert [row.split(": ")[-1] for row in module.table(SimpleNamespace(data=data)).index] == methods
    before = len(asked)
    assert module.compute(small, settings)[0] == data and len(asked) == before  # from the cells' cache


def test_every_learning_rate_of_a_procedure_is_shown_where_it_erases_enough():
    def line(name, lr, evaluations, *points):
        spent = {"procedure": name, "lr": lr, "evaluations": evaluations, "with gradient": 5, "ESR-5": 0.0}
        return [spent | {"scale": x, "ESR-1": esr, "PSR-1": psr} for x, esr, psr in points]

    ours, published = efficiency.OURS_NAME, efficiency.REFERENCE
    rows = line(ours, 4e-4, 1000, (0.8, 90.0, 100.0), (1.0, 100.0, 80.0)) + line(ours, 8e-4, 1000, (0.8, 96.0, 70.0))
    rows += line(published, 1e-4, 2000, (0.8, 10.0, 99.0), (1.0, 20.0, 98.0))
    record = SimpleNamespace(data={"rows": rows, "N": 25, "kept": ["dog"]})
    table = efficiency.table(record)
    assert table[["part of the step", "ESR-1", "PSR-1"]].T.to_dict("list") == {
        f"{ours}, lr 0.0004": ["0.90", "95.0", "90.0"],  # between two points
        f"{ours}, lr 0.0008": ["0.80", "96.0", "70.0"],
        f"{published}, lr 0.0001": ["1.00", "20.0", "98.0"],  # never: its last
    }
    assert table["evaluations"].to_list() == ["1,000", "1,000", "2,000"] and "with the key" not in table
    left, right = efficiency.figures(record)["efficiency"].axes
    assert [bar.get_width() for bar in left.patches] == [2000, 1000] and [
        line.get_xdata()[0] for line in right.lines
    ] == [90.0, 70.0]  # of those that erase enough
    assert [text.get_text() for text in right.texts] == ["lr 0.0004", "lr 0.0008"]


def test_a_procedure_is_trained_once_at_each_rate_and_counts_its_own_pool(small, monkeypatch):
    trained, train_alone = [], efficiency.train_alone

    def noted(world, concepts, method, config):
        trained.append((method, config.lr))
        return train_alone(world, concepts, method, config)

    monkeypatch.setattr(efficiency, "train_alone", noted)
    monkeypatch.setattr("erasekit.evaluation.protocol.rates", lambda *arguments: {"ESR-1": 95.0, "PSR-1": 90.0})
    monkeypatch.setattr("erasekit.evaluation.protocol.recovery_rate", lambda *arguments: 80.0)
    small.groups |= {"tuning": ("church",), "tuning kept": ("dog",), "retained": ("fish",)}
    ours, published = efficiency.OURS_NAME, efficiency.REFERENCE
    lrs = {ours: (1e-3, 2e-3), published: (1e-3,)}
    settings = replace(efficiency.PRESETS["smoke"], lrs=lrs, step_scales={ours: (0.5, 1.0), published: (1.0,)})
    data, _ = efficiency.compute(small, settings)
    assert trained == [("kpop", 1e-3), ("kpop", 2e-3), ("kpop", 1e-3)]
    rows = [(row["procedure"], row["lr"], row["scale"], row["with the key"]) for row in data["rows"]]
    assert rows == [
        (ours, 1e-3, 0.5, 80.0),
        (ours, 1e-3, 1.0, 80.0),
        (ours, 2e-3, 0.5, 80.0),
        (ours, 2e-3, 1.0, 80.0),
        (published, 1e-3, 1.0, 80.0),
    ]
    spent = [row["evaluations"] for row in data["rows"]]
    assert len(set(spent[:4])) == 1 and min(spent) > 0  # a pool of its own for each
    assert efficiency.compute(small, settings)[0] == data and len(trained) == 3  # from the cells' cache


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("few", [False, True])
def test_figures_have_labels_and_no_empty_panel(study, few):
    """Of the committed record, and of one with the methods of preset smoke."""
    import matplotlib.pyplot as plt

    module, record = importlib.import_module(f"erasekit.studies.{study}"), committed(study)
    if few:
        record = smaller(record, module.PRESETS["smoke"])
    for name, figure in module.figures(record).items():
        figure.draw_without_rendering()
        for ax in figure.axes:
            texts = [ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), *(text.get_text() for text in ax.texts)]
            assert not any("nan" in text.lower().split() for text in texts), name
            assert ax.has_data() or ax.get_label() == "<colorbar>", f"{name} has an empty panel"
        plt.close(figure)
    assert len(module.table(record))


def smaller(record: Record, settings) -> Record:
    """A record of fewer methods, cases, splits and seeds."""
    record = copy.copy(record)
    data = record.data = copy.deepcopy(record.data)
    for field, key in {
        "methods": "method",
        "variants": "variant",
        "procedures": "procedure",
        "cases": "case",
        "erased": "erased",
    }.items():
        keep = ("base", *getattr(settings, field, ()))
        for part in ("runs", "rows", "sweep"):
            if len(keep) > 1 and part in data and not (field == "methods" and part == "sweep"):
                data[part] = [row for row in data[part] if row.get(key, "base") in keep]
    return record
