"""What the studies of the prompt rest on."""

import math

import pytest
import torch

from erasekit.artifacts import Erasure
from erasekit.baselines import erase, settings
from erasekit.sampling import sample
from erasekit.studies.clip_study import auc, ranks
from erasekit.studies.continual import together


def test_the_area_under_the_curve_is_the_chance_to_rank_right():
    assert auc([3, 2, 1, 0], [True, True, False, False]) == 1.0
    assert auc([0, 1, 2, 3], [True, True, False, False]) == 0.0
    assert auc([1, 1, 1], [True, False, False]) == 0.5
    assert auc([0.9, 0.4, 0.6, 0.1], [True, True, False, False]) == 0.75
    assert math.isnan(auc([1.0, 2.0], [True, True]))


def test_a_drop_from_the_base_ranks_where_styles_differ_in_level():
    """One style scores high with or without it, so raw scores rank worse than drops do."""

    def run(method, erased, scores, there):
        forms = {form: scores for form in ("whole prompt", "name only", "without the name")}
        return {"method": method, "erased": erased, "judge": [float(t) for t in there], "there": there} | forms

    runs = [
        run("base", "a", [90.0, 91.0], [True, True]),
        run("base", "b", [50.0, 51.0], [True, True]),
        run("m", "a", [80.0, 91.0], [False, True]),
        run("m", "b", [40.0, 51.0], [False, True]),
    ]
    found = ranks(runs)["whole prompt"]
    assert found["drop from the base"] == 1.0 == found["within a style"]
    assert found["all"] == pytest.approx(1 - 3 / 12)
    assert found["by method"] == {"m": 0.75}  # of its own four images


def test_spm_adapters_side_by_side_do_what_each_does(toy):
    config = settings("spm", steps=2, batch=2)
    made = [erase(toy, [c], "spm", config, progress=False) for c in ("church", "dog")]
    both = together(made)
    asked = ["a picture of a church"], [0]
    with both.applied(toy.pipe.unet):
        both.guide(5.0).begin(toy.pipe, asked[0])
        assert both._adapter.multiplier.shape == (1, 2)
    for layer in {name.rsplit(".", 1)[0] for name in both.adapters}:
        whole = both.adapters[f"{layer}.up"] @ both.adapters[f"{layer}.down"]
        parts = sum(m.adapters[f"{layer}.up"] @ m.adapters[f"{layer}.down"] for m in made)
        assert torch.allclose(whole, parts, atol=1e-6)
    zero = torch.zeros_like
    alone = Erasure(
        {},
        {},
        both.info,
        {n: torch.cat([t, zero(t)], 1 if n.endswith(".up") else 0) for n, t in made[0].adapters.items()},
    )
    twice = together([made[0], made[0]])
    assert not torch.equal(
        sample(toy.pipe, *asked, erasure=twice, steps=2), sample(toy.pipe, *asked, erasure=alone, steps=2)
    )
    assert torch.equal(
        sample(toy.pipe, *asked, erasure=alone, steps=2), sample(toy.pipe, *asked, erasure=made[0], steps=2)
    )
