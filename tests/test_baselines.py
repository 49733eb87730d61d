"""Each baseline's identity tests, and closed forms against independent derivations."""

import copy

import pytest
import torch

from erasekit import training
from erasekit.adapters import Adapter
from erasekit.artifacts import fingerprint
from erasekit.baselines import METHODS, erase, settings
from erasekit.baselines.mace import shared_tokens
from erasekit.baselines.uce import ridge
from erasekit.checkpoints import seeded
from erasekit.guidance import Guidance, NegativePrompt, SafeLatentDiffusion
from erasekit.sampling import sample
from erasekit.text import encode
from erasekit.trajectories import ROLL, roll

TRAINED = ["esd-x", "esd-u", "ca", "mace", "spm", "receler", "eap", "age", "kpop", "kpop-anchor"]
TRAINED += ["kpop-adversarial"]
PROMPTS, SEEDS = ["a picture of a church", "a picture of a dog"], [0, 1]


@pytest.fixture(scope="module")
def small(toy):
    """The toy with retained objects, which some methods choose from."""
    world = copy.copy(toy)
    world.groups = toy.groups | {"retained": ("fish", "dog")}
    world.trajectories = {}
    return world


def made(world, method, **changes):
    few = {"steps": 2, "batch": 2, "retain": ("fish", "")} if method in TRAINED else {}
    return erase(world, ["church"], method, settings(method, **few | changes), progress=False)


def drawn(world, erasure=None):
    return sample(world.pipe, PROMPTS, SEEDS, erasure=erasure, steps=3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_erases_repeats_itself_and_leaves_the_base_alone(small, method, tmp_path):
    base, hashed = drawn(small), fingerprint(small.pipe.unet)
    erasure = made(small, method)
    images = drawn(small, erasure)
    assert fingerprint(small.pipe.unet) == hashed and torch.equal(drawn(small), base)
    assert torch.equal(drawn(small, made(small, method)), images), "same seed, same result"
    erasure.save(tmp_path)
    assert torch.equal(drawn(small, type(erasure).load(tmp_path, small.pipe.unet)), images), "as saved"


def test_esd_with_eta_minus_one_has_nothing_to_do_at_first(small):
    assert made(small, "esd-x", eta=-1.0).info["history"][0]["removal"] < 1e-9


def test_kpop_towards_an_anchor_has_nothing_to_do_at_first_when_that_is_the_concept(small, monkeypatch):
    assert made(small, "kpop-anchor").info["history"][0]["removal"] > 1e-6
    monkeypatch.setattr(type(small), "anchor", lambda self, concept: concept)
    assert made(small, "kpop-anchor").info["history"][0]["removal"] < 1e-12


def test_without_transport_every_adapter_of_spm_is_open_for_every_prompt(small):
    gated, always = (made(small, "spm", transport=transport) for transport in (True, False))
    assert all(torch.equal(tensor, always.adapters[name]) for name, tensor in gated.adapters.items()), "trained alike"
    for erasure, everywhere in ((gated, False), (always, True)):
        with erasure.applied(small.pipe.unet):
            guide = erasure.guide(5.0)
            guide.begin(small.pipe, PROMPTS)
            assert bool((guide.adapter.multiplier == 1).all()) == everywhere


@pytest.mark.parametrize("method", ["esd-x", "uce", "spm", "receler", "kpop"])
def test_a_scaled_erasure_goes_from_the_base_at_0_to_itself_at_1(small, method, tmp_path):
    erasure = made(small, method)
    images = [drawn(small, erasure.scaled(small.pipe.unet, scale)) for scale in (0.0, 1.0)]
    assert torch.equal(images[0], drawn(small))
    assert (images[1].float() - drawn(small, erasure).float()).abs().max() <= 1  # rounding
    half = erasure.scaled(small.pipe.unet, 0.5)
    half.save(tmp_path)
    again = type(half).load(tmp_path, small.pipe.unet)
    assert again.info["scale"] == 0.5 and again.keys.keys() == erasure.keys.keys()
    assert again.scaled(small.pipe.unet, 0.5).info["scale"] == 0.25


def test_what_works_by_guidance_alone_cannot_be_scaled(small):
    with pytest.raises(ValueError, match="'sld' works by guidance alone"):
        made(small, "sld").scaled(small.pipe.unet, 0.5)


@pytest.mark.parametrize("method", ["eap", "age"])
def test_what_is_retained_is_kept_exactly_at_first(small, method):
    assert made(small, method).info["history"][0]["retain"] < 1e-9


def test_uce_is_the_published_rank_one_update_for_one_vector():
    generator = torch.Generator().manual_seed(0)
    W, c, v = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((5, 7), (1, 7), (1, 5)))
    expected = W + torch.outer(v[0] - W @ c[0], c[0]) / (c[0] @ c[0] + 0.5)  # Sherman and Morrison
    assert torch.allclose(ridge(W, [(1.0, c, v)], 0.5), expected, atol=1e-12)
    assert torch.allclose(ridge(W, [(1.0, c, c @ W.T)], 0.5), W, atol=1e-12), "edited to itself"
    assert torch.allclose(ridge(W, [(1.0, c, v)], 1e12), W, atol=1e-9), "an infinite lambda"


def test_uce_minimises_its_objective_by_gradient_descent_too():
    generator = torch.Generator().manual_seed(1)
    W, C, V, P = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((4, 3), (2, 3), (2, 4), (2, 3)))
    found = W.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([found], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def objective():
        optimizer.zero_grad()
        loss = (C @ found.T - V).square().sum() + 0.3 * (P @ (found - W).T).square().sum()
        loss = loss + 0.5 * (found - W).square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    assert torch.allclose(ridge(W, [(1.0, C, V), (0.3, P, P @ W.T)], 0.5), found.detach(), atol=1e-6)


@pytest.mark.parametrize("rule", [{"s_S": 0.0, "threshold": 1.0}, {"s_S": 5.0, "threshold": -float("inf")}])
def test_sld_without_scale_or_threshold_is_plain_guidance(small, rule):
    sld = SafeLatentDiffusion(5.0, "church", warmup=0, s_m=0.0, beta_m=0.0, **rule)
    assert torch.equal(guided(small, sld), guided(small, Guidance(5.0)))


def test_sld_by_hand(small):
    sld = SafeLatentDiffusion(2.0, "church", warmup=1, s_S=10.0, threshold=0.5, s_m=0.5, beta_m=0.25)
    sld.begin(small.pipe, PROMPTS[:1])
    said = {id(sld.null): 0.0, id(sld.c): 1.0, id(sld.unsafe): 0.95}

    def predict(z, t, text, conditional):
        return torch.full_like(z, said[id(text)])

    z = torch.zeros(1, 1, 1, 1)
    # D = 0.05, mu = 0.5: gamma = 0.475, unused in the warm-up; then nu = 0.35625 adds half of itself.
    assert sld(predict, z, z, 0).item() == pytest.approx(2.0, abs=1e-5)
    assert sld(predict, z, z, 1).item() == pytest.approx(2 * (1 - (0.475 + 0.5 * 0.35625)), abs=1e-5)


def guided(world, guide):
    guide.begin(world.pipe, PROMPTS)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return guide(lambda z, t, text, _: world.pipe.unet(z, t, text).sample, z, torch.tensor([500, 500]), 20)


def test_ca_teaches_nothing_when_target_and_anchor_are_the_same(small, monkeypatch):
    monkeypatch.setattr(type(small), "anchor", lambda self, concept: concept)
    assert made(small, "ca").info["history"][0]["removal"] < 1e-12


def test_ca_s_first_loss_by_hand_with_diffusers_own_noising(small, unet):
    ours = made(small, "ca", retain=()).info["history"][0]["removal"]
    clean = roll(small, [(small.prompt(small.anchor("church")), "")], 0, **ROLL).clean
    generator = seeded("ablation", 0, 0)
    which = torch.randint(clean.shape[-4], (2,), generator=generator)
    t = torch.randint(1000, (2,), generator=generator)
    noise = torch.randn(2, *clean.shape[-3:], generator=generator)
    noised = small.pipe.scheduler.add_noise(clean.reshape(-1, *clean.shape[-3:])[which], noise, t)
    with torch.no_grad():
        said, wanted = (
            unet(noised, t, encode(small.pipe, [f"a picture of a {name}"]).expand(2, -1, -1)).sample
            for name in ("church", small.anchor("church"))
        )
    assert ours == pytest.approx((said - wanted).square().mean().item(), rel=1e-4)


def test_age_as_printed_runs_and_its_adversary_sees_more_than_as_released(small):
    # Two candidates and one step of ascent: what differs is the adversary's gradient, and so the choices that follow.
    few = {"steps": 6, "adversary_lr": 1.0, "lr": 1e-2, "temperature": 2.0}
    printed, again, released = (made(small, "age", detached=d, **few) for d in (False, False, True))
    assert printed.info["history"] == again.info["history"]
    assert printed.info["history"] != released.info["history"]


def test_rece_without_rounds_is_uce(small):
    ours, theirs = made(small, "rece", rounds=0), made(small, "uce")
    assert all(torch.equal(tensor, theirs.delta[name]) for name, tensor in ours.delta.items())


def test_the_empty_negative_prompt_is_plain_guidance(small):
    assert torch.equal(guided(small, NegativePrompt(5.0, "")), guided(small, Guidance(5.0)))


@pytest.mark.parametrize("method", TRAINED)
def test_a_killed_training_goes_on_to_the_same_result(small, method, tmp_path, monkeypatch):
    config = settings(method, steps=2, batch=2, retain=("fish", ""))
    straight, predict, calls = erase(small, ["church"], method, config, progress=False), training.Bench.predict, []

    def counted(self, *arguments):
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return predict(self, *arguments)

    monkeypatch.setattr(training, "SAVE_EVERY", -1)
    monkeypatch.setattr(training.Bench, "predict", counted)
    limit = 0
    erase(small, ["church"], method, config, progress=False)
    limit = len(calls)  # the last prediction of the second step
    calls.clear()
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        erase(small, ["church"], method, config, path, progress=False)
    limit = 0
    resumed = erase(small, ["church"], method, config, path, progress=False)
    assert resumed.info["history"] == straight.info["history"]
    assert all(torch.equal(tensor, straight.delta[name]) for name, tensor in resumed.delta.items())
    assert all(torch.equal(tensor, straight.adapters[name]) for name, tensor in resumed.adapters.items())


def test_mace_shares_every_token_of_equal_sentences_and_none_of_the_word(small):
    old, new = shared_tokens(small.pipe, "a picture of a church", "a picture of a church")
    assert torch.equal(old, new)
    whole = encode(small.pipe, ["a picture of a church"])[0]
    old, _ = shared_tokens(small.pipe, "a picture of a church", "a picture of a dog")
    assert len(old) == len(whole) - 1


@pytest.mark.parametrize("method", ["spm", "receler"])
def test_a_fresh_adapter_changes_nothing(small, method):
    erasure = made(small, method)
    for name, tensor in erasure.adapters.items():
        if name.endswith((".up", ".U")):
            tensor.zero_()
    assert torch.equal(drawn(small, erasure), drawn(small))


def test_a_closed_low_rank_adapter_changes_nothing(small, unet):
    adapter = Adapter("low-rank", made(small, "spm").adapters)
    z, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), encode(small.pipe, PROMPTS[:1])
    with torch.no_grad(), adapter.attached(unet):
        closed = unet(z, t, text).sample
        adapter.multiplier = torch.zeros(1, 1)
        assert torch.allclose(unet(z, t, text).sample, closed, atol=1e-7)


def test_wrong_names_are_refused_in_one_sentence(small, sentence):
    for call in (
        lambda: erase(small, ["church"], "esd"),
        lambda: settings("uce", lr=1.0),
        lambda: erase(small, ["church"], "uce", settings("esd-x")),
        lambda: settings("eap", retain=()),
    ):
        with pytest.raises(ValueError) as error:
            call()
        sentence(error)
