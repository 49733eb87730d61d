"""KPOP's anchors, secret start and robust removal, each neutral at its neutral value; and what the study `lock` selects."""

import copy
from types import SimpleNamespace

import pytest
import torch

from erasekit.attention import augment
from erasekit.baselines import method_config
from erasekit.checkpoints import seeded
from erasekit.kpop import kpop, make_prompts
from erasekit.robust import KEPT, KINDS, Adversary
from erasekit.studies import lock
from erasekit.studies.kit.cache import settings_dict
from erasekit.studies.lock_aims import KEYS, PROBES
from erasekit.training import Trainer

SHORT = {"steps": 3, "batch_size": 2, "lr": 1e-2, "m": 3, "num_trajectories": 2, "trajectory_steps": 4}


@pytest.fixture(scope="module")
def small(toy):
    """The toy world with three retained objects."""
    world = copy.copy(toy)
    world.retained, world.trajectories = ("fish", "cat", "bird"), {}
    return world


def erased(world, method="kpop-anchor", checkpoint=None, **changes):
    config = method_config(method, **SHORT | {"retain": ("fish", "")} | changes)
    return kpop(world, ["church", "dog"], config, checkpoint=checkpoint, progress=False)


def digests(erasure):
    return erasure.digest(), {c: key.digest() for c, key in erasure.keys.items()}, erasure.info["history"]


def test_anchors_that_are_all_neutral_are_the_neutral_target(small):
    neutral = digests(erased(small, "kpop", eta=0.0))
    for anchors in (1, 3):
        assert digests(erased(small, anchors=anchors, neutral_share=1.0)) == neutral
    half, own = digests(erased(small, neutral_share=0.5)), digests(erased(small))
    assert len({neutral[0], half[0], own[0], digests(erased(small, anchors=3))[0]}) == 4


def test_several_anchors_that_are_the_same_are_one(small, monkeypatch):
    one, nearest = digests(erased(small)), type(small).anchor
    monkeypatch.setattr(type(small), "anchor", lambda self, concept, rank=0: nearest(self, concept))
    assert digests(erased(small, anchors=3)) == one


def test_anchors_are_the_nearest_in_turn(small, refused):
    assert sorted(small.anchor("church", rank) for rank in range(3)) == sorted(small.retained)
    refused(ValueError, "4 other concepts", lambda: small.anchor("church", 3))
    for changes in ({"anchors": 2}, {"neutral_share": 0.5}):
        refused(ValueError, "need target='anchor'", lambda c=changes: method_config("kpop", **c))
    refused(ValueError, "a share", lambda: method_config("kpop-anchor", neutral_share=1.5))


def test_a_search_that_never_comes_changes_nothing(small):
    assert digests(erased(small, robust_every=3)) == digests(erased(small))
    assert digests(erased(small, robust_every=2))[0] != digests(erased(small))[0]


@pytest.mark.parametrize("taken", [2, 3])
def test_a_robust_training_resumes_with_what_it_found(small, tmp_path, taken):
    robust = {"robust_every": 1, "robust_steps": 2}
    erased(small, checkpoint=tmp_path / "c", **robust | {"steps": taken})
    resumed = erased(small, checkpoint=tmp_path / "c", **robust | {"steps": 4})
    assert digests(resumed) == digests(erased(small, **robust | {"steps": 4}))


def test_a_search_finds_what_brings_the_prediction_back(small):
    """On a model with other weights in attention, after more steps the transfer loss is smaller; the oldest find goes."""
    config = method_config("kpop-anchor", **SHORT, robust_every=1, robust_steps=30)
    trainer = Trainer(small, ["church", "dog"], config, "kpop")
    changed = {n: p for n, p in trainer.unet.named_parameters() if ".attn2.to_v." in n}
    before = {n: p.data for n, p in changed.items()}
    try:
        for n, p in changed.items():
            p.data = p.data + 0.3 * torch.randn(p.shape, generator=seeded(n))
        with augment(trainer.unet) as state:
            adversary, b = Adversary(trainer, state), trainer.batch("test", 0)

            def error(kind, tensors):
                with adversary.attached(kind, tensors) as predict, torch.no_grad():
                    return (predict(b) - b.eps[: b.n]).square().mean().item()

            adversary.search(1)
            found = {name: x[0].clone() for name, x in adversary.found.items()}
            for kind in KINDS:
                assert error(kind, found) < 0.98 * error(kind, adversary.start)
            assert torch.equal(adversary.found["k"][1], adversary.start["k"])
            adversary.search(1 + KEPT)
            assert not torch.equal(adversary.found["k"][0], found["k"])
    finally:
        for n, p in changed.items():
            p.data = before[n]


def test_a_secret_start_is_the_secret_s_alone_and_is_not_saved(small, tmp_path, refused):
    one, again, other = (erased(small, secret=secret) for secret in (5, 5, 6))
    assert digests(one) == digests(again) and digests(one)[1] != digests(other)[1]
    assert one.info["config"]["secret"] == "withheld" and erased(small).info["config"]["secret"] is None
    starts = [
        make_prompts(Trainer(small, ["church"], method_config("kpop", **SHORT, secret=secret), "kpop")).prompt(0).k
        for secret in (None, 5, 6)
    ]
    own = small.concept_tokens("church").float()
    assert torch.equal(starts[0], own[torch.arange(3) % len(own)])
    assert not any(torch.equal(starts[n], starts[m]) for n, m in ((0, 1), (1, 2), (0, 2)))
    refused(ValueError, "start from zero", lambda: method_config("kpop", secret=1, mechanism="added"))


def test_later_settings_that_are_off_leave_the_keys_of_the_cache(small):
    assert not {"anchors", "secret", "robust_every", "diverse_prompts"} & set(settings_dict(method_config("kpop")))
    assert settings_dict(method_config("kpop-anchor", anchors=3))["anchors"] == 3


# ----------------------------------------------------------------------------------------------------------------- the study


def candidate(name, esr, psr, key=100.0, synonyms=90.0, resistance=50.0):
    rates = {"ESR-1": esr, "PSR-1": psr, "right key": key, "synonyms": synonyms, "resistance": resistance}
    return {"variant": name, "factor": 1.0} | rates


def test_the_rule_takes_the_best_score_of_what_erases_and_opens():
    weak, shut, good, best = (
        candidate("weak", 90, 100, synonyms=100, resistance=100),
        candidate("shut", 99, 100, key=50, resistance=100),
        candidate("good", 98, 90),
        candidate("best", 97, 90, resistance=80),
    )
    assert (lock.select([weak, shut, good, best])["variant"], lock.select([best])["tier"]) == ("best", "rule")
    assert lock.select([weak, shut])["variant"] == "shut"
    assert lock.select([weak, candidate("weaker", 80, 100)])["tier"] == "none erases as much"


def test_an_evaluation_without_its_search_is_refused(refused):
    settings = lock.Settings(variants=(), models=("selected",), parts=("keys",))
    refused(ValueError, "name the variants", lambda: lock.check(None, settings))
    lock.check(None, lock.Settings(variants=(), models=("kpop",)))
    refused(ValueError, "unknown variant", lambda: lock.check(None, lock.Settings(variants=("esd",))))


@pytest.mark.parametrize("enough, tried", [(1.3, [1.0, 1.3]), (1.6, [1.0, 1.3, 1.6]), (9.0, [1.0, 1.3, 1.6, 2.0])])
def test_a_variant_goes_further_while_it_erases_too_little(enough, tried, monkeypatch):
    def candidates(world, s, points, variant, factors):
        return [candidate(variant, 97 if factor >= enough else 90, 99) | {"factor": factor} for factor in factors]

    monkeypatch.setattr(lock, "candidates", candidates)
    assert [row["factor"] for row in lock.searched(None, lock.Settings(), {}, "x")] == tried


def made_record(attack_rate=10.0, oracle=10.0, opponent=97.0):
    """A record in which the selected variant erases all and keeps 96 % of two classes."""
    steps, s = (10,), {"seeds": 50, "word_seeds": 10, "other_seeds": 1, "budgets": [10], "factors": [1.0, 1.3]}
    s |= {"compared": 1.3}

    def rates(model, factor, erased, kept):
        about = {"model": model, "split": "S1"} | ({"factor": factor} if factor else {})
        return about | {"erased": [erased] * 2, "kept": [kept] * 2, "others": [100.0] * 9, "synonyms": [5.0]}

    rows = [rates("selected", 1.6, 0.0, 96.0), rates("ca", 1.0, 40.0, 100.0), rates("ca", 1.3, 1.0, opponent)]
    keys = {"model": "selected", "split": "S1", "factor": 1.6} | dict(zip(KEYS, ([100.0], [0.0], [0.0], [30.0])))

    attacks = [
        {"model": model, "concept": "church", "attack": attack, "steps": n, "rate": rate}
        for model, rate in (("selected", attack_rate), ("oracle", oracle))
        for attack in lock.SEARCHES
        for n in steps
    ]
    data = {"rates": [*rows, rates("oracle", None, 0.0, 100.0)], "keys": [keys], "attacks": attacks}
    data |= {"selected": {"variant": "x", "factor": 1.6}}
    shown = {"selected": [90.0, 80.0], "ca": [100.0, 98.0], "oracle": [0.0, 4.0]}
    data["probes"] = [{"model": m, "split": "S1", "probe": PROBES[0], "shown": own} for m, own in shown.items()]
    data |= {"search": [candidate("x", 98, 90) | {"factor": 1.6}, candidate("y", 99, 80)]}
    s |= {"models": ["selected", "ca", "oracle"], "attack_images": 5}
    return SimpleNamespace(data=data, settings=s)


def test_the_table_says_of_each_aim_whether_it_is_reached():
    """The bound of what is kept is an opponent's that erases as much: one that erases less, and keeps all, sets none."""
    table = lock.table(made_record())
    assert table["reached?"].to_dict() == {
        "ESR-1": "reached",
        "PSR-1": "reached",
        "unseen synonyms erased": "reached",
        "right key": "reached",
        "another concept's key": "reached",
        "random key": "reached",
        "key of another seed": "not reached",
        "textual inversion, 10 steps": "reached",
        "optimized key, 10 steps": "reached",
        "first steps by the base": "not reached",
        "fine-tuning on others": "not measured",
        "other objects kept": "",
    }
    assert table["selected"]["first steps by the base"].startswith("85.0 (")
    assert table["ca, × 1.3"]["first steps by the base"].startswith("99.0 (")
    assert table["aim"]["first steps by the base"] == "at most 2"
    assert table["aim"]["PSR-1"] == "at least 96" and table["ca, × 1.3"]["ESR-1"].startswith("99.0 (")
    table = lock.table(made_record(attack_rate=60.0, opponent=98.0))
    assert table["reached?"]["PSR-1"] == "within its interval"
    assert table["reached?"]["textual inversion, 10 steps"] == "not reached"


def test_figures_have_the_selected_candidate_and_the_floor():
    figures = lock.figures(made_record())
    labels = [label.get_text() for label in figures["lock_search"].axes[0].get_yticklabels()]
    assert labels == ["x, × 1.6 (selected)", "y, × 1"]
    assert len(figures["lock_attacks"].axes) == len(lock.SEARCHES)
