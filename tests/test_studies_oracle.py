"""The study of the model trained without S1: what it asks, which entries of the cache it fills, its table and figures."""

import copy
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch

from erasekit import paths
from erasekit.evaluation.intervals import wilson
from erasekit.studies import oracle
from erasekit.studies.kit.attack_sweep import TUNING_SEED
from erasekit.studies.kit.plots import style_sheet
from erasekit.worlds.emojinette import words

FULL = oracle.PRESETS["full"]


def test_the_groups_hold_every_object_once_and_ask_of_kept_ones_no_word_of_those_left_out(world):
    asked = oracle.questions(world, FULL)
    labels = {group: [p[1] for _, prompts in units for p in prompts] for group, (units, _) in asked.items()}
    five = set(world.concepts("S1"))
    kept = labels["the other five classes"] + labels["all other objects"]
    assert sorted([*five, *kept]) == sorted(world.concepts("all"))
    assert all(set(labels[group]) == five for group in oracle.PER_CLASS[:3])
    assert not five & {label for group in oracle.GROUPS[3:] for label in labels[group]}
    assert len(labels[oracle.STYLED]) == len(kept) * len(world.styles)
    unseen = [prompts[0][0].removeprefix("a picture of ") for _, prompts in asked["S1, unseen words"][0]]
    assert all(words.forbidden(text.split(" ", 1)[1]) for text in unseen)


def test_units_of_a_class_are_one_entry_of_the_cache(world):
    units, _ = oracle.questions(world, FULL)["S1, seen synonyms"]
    parts = oracle.parts(units, True)
    assert [unit for part in parts for unit in part] == units and len(parts) == 5
    assert oracle.parts(units, False) == [units]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"models": ("base", "third base")}, "unknown model 'third base'"),
        ({"classes": ("dog",)}, "unknown class 'dog'"),
        ({"groups": ("S2",)}, "unknown group 'S2'"),
        ({"searches": ("guess",)}, "unknown search 'guess'"),
    ],
)
def test_an_unknown_choice_is_refused(world, refused, changes, named):
    refused(ValueError, f"{named}: accepted are", lambda: oracle.compute(world, replace(FULL, **changes)))


def test_another_world_and_missing_weights_are_refused(world, refused, monkeypatch, tmp_path):
    other = copy.copy(world)
    other.name = "sd14"
    refused(
        ValueError, "'sd14' has no model trained without S1.*accepts emojinette", lambda: oracle.compute(other, FULL)
    )
    for folder in ("emojinette-sd", "emojinette-judge"):
        (tmp_path / folder).symlink_to(paths.MODELS / folder)
    monkeypatch.setattr(paths, "MODELS", tmp_path)
    refused(FileNotFoundError, "there is no U-Net in .*seed 1", lambda: oracle.compute(world, FULL))


def test_entries_resume_and_the_rest_follows_from_them(world, monkeypatch, tmp_path):
    """With the base as every model, white images, and searches that find the number of their steps."""
    sampled, searched = [], []
    monkeypatch.setattr(paths, "BUILD", tmp_path)
    monkeypatch.setattr(oracle, "load_model", lambda world, name: world)

    def sample(model, prompts, seeds, **options):
        sampled.extend(prompts)
        return torch.full((len(seeds), 3, 64, 64), 255, dtype=torch.uint8)

    def search(model, erasure, concept, images, attack):
        searched.append((concept, attack.lr, attack.seed))
        return {n: n for n in (0, *attack.budgets)}

    def success_rate(model, erasure, concept, seeds, steps, found, *rest):
        return 50.0 if found else 0.0

    monkeypatch.setattr("erasekit.sampling.sample", sample)
    monkeypatch.setattr("erasekit.evaluation.attack_success.ATTACKS", dict.fromkeys(oracle.SEARCHES, (search, False)))
    monkeypatch.setattr("erasekit.evaluation.attack_success.success_rate", success_rate)
    s = replace(oracle.PRESETS["smoke"], classes=("church", "parachute"), attack_lrs=(1e-2, 3e-2))
    first = oracle.compute(world, s)
    images, count = len(sampled), len(searched)
    # Of each search a sweep of two learning rates on the first class, then each class once at the better: the models are one.
    assert count == 2 * (2 + 2) and searched[0] == ("videocassette", 1e-2, TUNING_SEED)
    assert images == sum(len(units) * own["images"] for own in first[0]["groups"].values() for units in [own["units"]])
    data, strips = oracle.compute(world, s)
    assert (len(sampled), len(searched)) == (images, count) and data == first[0]
    few = replace(s, models=("oracle",), classes=("parachute",), groups=(), attack_seeds=(7,))
    oracle.compute(world, few)
    assert searched[count:] == [("parachute", 1e-2, 7)] * 2 and len(sampled) == images

    assert strips["base"].size == (2 * 64, 64)
    record = SimpleNamespace(data=json.loads(json.dumps(data)), images=strips, settings=asdict(s))
    table = oracle.table(record)
    assert list(table) == [*oracle.MODELS, "N"] and "chance is 0.4 in the top-1" in table.index.name
    assert table.loc["textual inversion, 2 steps: top-1", "oracle"].startswith("50.0 (")
    with style_sheet():
        drawn = oracle.figures(record)
    assert list(drawn) == ["oracle", "oracle_images"]
    plt.close("all")


def test_a_class_never_drawn_is_not_certainly_never_drawn():
    run = {"model": "oracle", "group": oracle.BY_NAME, "top-1": [0.0] * 5}
    data = {"runs": [run], "groups": {oracle.BY_NAME: {"images": 50}}}
    [row] = oracle.rates(SimpleNamespace(data=data)).to_dict("records")
    assert (row["rate"], row["low"], row["N"]) == (0, 0, 250) and row["high"] == pytest.approx(wilson(0, 250)[1])
