"""Every method on the toy world; identity tests of each; closed forms against independent derivations."""

import copy

import pytest
import torch

from erasekit import training
from erasekit.baselines import METHODS, erase, method_config
from erasekit.baselines.adapters import LowRank
from erasekit.baselines.guidance import NegativePrompt, SafeLatentDiffusion
from erasekit.baselines.mace import shared_tokens
from erasekit.baselines.uce import ridge
from erasekit.checkpoints import seeded
from erasekit.conditioning import encode, predict_noise, token_embeddings
from erasekit.sampling import Guidance, guidance_for, sample
from erasekit.training import Trainer
from erasekit.trajectories import make_pool

UNTRAINED = ("uce", "sld", "np", "rece", "speed", "oce", "adavd")
TRAINED = [name for name in METHODS if name not in UNTRAINED]
POOL = {"num_trajectories": 2, "trajectory_steps": 5}
OWN = {"stereo": {"rounds": 1, "round_steps": 1, "inner": 2}}  # a short search
PROMPTS, SEEDS = ["a picture of a church", "a picture of a dog"], [0, 1]


@pytest.fixture(scope="module")
def small(toy):
    """The toy world with retained concepts, which some methods choose from."""
    world = copy.copy(toy)
    world.retained, world.trajectories = ("fish", "dog"), {}
    return world


def erased(world, method, **changes):
    short = {"steps": 2, "batch_size": 2, "retain": ("fish", ""), **POOL} if method in TRAINED else {}
    short |= OWN.get(method, {})
    return erase(world, ["church"], method, method_config(method, **short | changes), progress=False)


def first_losses(world, method, **changes):
    return erased(world, method, **changes).info["history"][0]


def images(world, erasure=None):
    return sample(world.pipe, PROMPTS, SEEDS, erasure=erasure, num_inference_steps=3)


def test_the_methods_are_in_the_order_of_tables():
    baselines = ["esd-x", "esd-u", "uce", "ca", "sld", "np", "mace", "rece", "spm", "receler", "eap", "age"]
    opponents = ["speed", "oce", "adavd", "ace", "ant", "stereo", "race"]
    assert list(METHODS) == [*baselines, *opponents, "kpop", "kpop-anchor", "kpop-adversarial"]
    for name, entry in METHODS.items():
        for changes in entry.sweep:
            method_config(name, **changes)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_deterministic_saved_and_leaves_the_base_unchanged(small, method, tmp_path):
    base, hashed = images(small), small.fingerprint
    erasure = erased(small, method)
    found = images(small, erasure)
    assert not torch.equal(found, base)
    assert small.fingerprint == hashed and torch.equal(images(small), base)
    assert torch.equal(images(small, erased(small, method)), found), "same seed, same result"
    erasure.save(tmp_path)
    assert torch.equal(images(small, type(erasure).load(tmp_path, small)), found), "as saved"


@pytest.mark.parametrize("method", TRAINED)
def test_an_interrupted_training_resumes_to_the_same_result(small, method, tmp_path, monkeypatch):
    config = method_config(method, steps=2, batch_size=2, retain=("fish", ""), **POOL, **OWN.get(method, {}))
    predict, calls = Trainer.predict, []

    def count(self, *arguments):
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return predict(self, *arguments)

    monkeypatch.setattr(training, "SAVE_EVERY", -1)
    monkeypatch.setattr(Trainer, "predict", count)
    limit = 0
    straight = erase(small, ["church"], method, config, progress=False)
    limit = len(calls)  # the last prediction of the second step
    calls.clear()
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        erase(small, ["church"], method, config, path, progress=False)
    limit = 0
    resumed = erase(small, ["church"], method, config, path, progress=False)
    assert resumed.info["history"] == straight.info["history"] and resumed.digest() == straight.digest()


# -------------------------------------------------------------------------------------------------------- scaled erasures


@pytest.mark.parametrize("method", ["esd-x", "spm", "receler", "kpop"])
def test_a_scaled_erasure_is_the_base_at_0_and_itself_at_1(small, method, tmp_path):
    erasure = erased(small, method)
    zero, one = (images(small, erasure.scaled(small, scale)) for scale in (0.0, 1.0))
    assert torch.equal(zero, images(small))
    assert (one.float() - images(small, erasure).float()).abs().max() <= 1  # rounding
    half = erasure.scaled(small, 0.5)
    half.save(tmp_path)
    again = type(half).load(tmp_path, small)
    assert again.info["scale"] == 0.5 and again.keys.keys() == erasure.keys.keys()
    assert again.scaled(small, 0.5).info["scale"] == 0.25


def test_guidance_alone_cannot_be_scaled(small, sentence):
    with pytest.raises(ValueError, match="'sld' works by guidance alone") as error:
        erased(small, "sld").scaled(small, 0.5)
    sentence(error)


# ---------------------------------------------------------------------------------------------------- identities at the start


def test_esd_with_eta_minus_one_starts_at_its_target(small):
    assert first_losses(small, "esd-x", eta=-1.0)["removal"] < 1e-9


@pytest.mark.parametrize("method", ["ca", "kpop-anchor"])
def test_with_the_concept_as_its_own_anchor_there_is_nothing_to_remove(small, method, monkeypatch):
    assert first_losses(small, method)["removal"] > 1e-6
    monkeypatch.setattr(type(small), "anchor", lambda self, concept, rank=0: concept)
    assert first_losses(small, method)["removal"] < 1e-12


@pytest.mark.parametrize("method", ["eap", "age"])
def test_at_the_start_candidates_are_preserved_exactly(small, method):
    assert first_losses(small, method)["retain"] < 1e-9


@pytest.mark.parametrize("method", ["spm", "receler"])
def test_a_fresh_adapter_changes_nothing(small, method):
    erasure = erased(small, method)
    for name, tensor in erasure.adapters.items():
        if name.endswith((".up", ".U")):
            tensor.zero_()
    assert torch.equal(images(small, erasure), images(small))


def test_a_low_rank_adapter_with_multiplier_zero_changes_nothing(small, unet):
    adapter = LowRank(erased(small, "spm").adapters)
    z, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), encode(small.pipe, PROMPTS[:1]).tokens
    with torch.no_grad():
        base = unet(z, t, text).sample
        with adapter.attached(unet):
            for multiplier in (None, torch.zeros(1, 1)):
                adapter.multiplier = multiplier
                assert torch.allclose(unet(z, t, text).sample, base, atol=1e-7)
            adapter.multiplier = torch.ones(1, 1)
            assert not torch.allclose(unet(z, t, text).sample, base, atol=1e-7)


def test_without_transport_every_adapter_of_spm_is_on_for_every_prompt(small):
    gated, ungated = (erased(small, "spm", transport=transport) for transport in (True, False))
    assert all(torch.equal(tensor, ungated.adapters[name]) for name, tensor in gated.adapters.items()), "trained alike"
    for erasure, everywhere in ((gated, False), (ungated, True)):
        with erasure.applied(small) as public:
            guide = guidance_for(public, 5.0)
            guide.prepare(small.pipe, PROMPTS)
            assert bool((public.adapter.multiplier == 1).all()) == everywhere


# ------------------------------------------------------------------------------------------------------------- closed forms


def test_uce_is_the_published_rank_one_update_for_one_vector():
    generator = torch.Generator().manual_seed(0)
    W, c, v = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((5, 7), (1, 7), (1, 5)))
    expected = W + torch.outer(v[0] - W @ c[0], c[0]) / (c[0] @ c[0] + 0.5)  # Sherman and Morrison
    assert torch.allclose(ridge(W, [(1.0, c, v)], 0.5), expected, atol=1e-12)
    assert torch.allclose(ridge(W, [(1.0, c, c @ W.T)], 0.5), W, atol=1e-12), "edited to itself"
    assert torch.allclose(ridge(W, [(1.0, c, v)], 1e12), W, atol=1e-9), "an infinite lambda"


def test_uce_minimises_its_objective_as_gradient_descent_does():
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


def test_rece_without_rounds_is_uce(small):
    assert erased(small, "rece", rounds=0).digest() == erased(small, "uce").digest()


def test_mace_shares_every_token_of_equal_sentences_and_none_of_the_word(small):
    whole = token_embeddings(small.pipe, PROMPTS[:1])[0]
    old, new = shared_tokens(small.pipe, PROMPTS[0], PROMPTS[0])
    assert torch.equal(old, new) and len(old) == len(whole)
    old, new = shared_tokens(small.pipe, *PROMPTS)
    assert len(old) == len(new) == len(whole) - 1


# ----------------------------------------------------------------------------------------------------------------- guidance


def guided(world, guide):
    guide.prepare(world.pipe, PROMPTS)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return guide(lambda z, t, cond, _: predict_noise(world.pipe.unet, z, t, cond), z, torch.tensor([500, 500]), 20)


@pytest.mark.parametrize("rule", [{"s_S": 0.0, "threshold": 1.0}, {"s_S": 5.0, "threshold": -float("inf")}])
def test_sld_without_scale_or_threshold_is_plain_guidance(small, rule):
    sld = SafeLatentDiffusion(5.0, "church", warmup=0, s_m=0.0, beta_m=0.0, **rule)
    assert torch.equal(guided(small, sld), guided(small, Guidance(5.0)))


def test_the_empty_negative_prompt_is_plain_guidance(small):
    assert torch.equal(guided(small, NegativePrompt(5.0, "")), guided(small, Guidance(5.0)))


def test_sld_by_hand(small):
    sld = SafeLatentDiffusion(2.0, "church", warmup=1, s_S=10.0, threshold=0.5, s_m=0.5, beta_m=0.25)
    sld.prepare(small.pipe, PROMPTS[:1])
    values = {id(sld.null): 0.0, id(sld.c): 1.0, id(sld.unsafe): 0.95}

    def predict(z, t, cond, conditional):
        return torch.full_like(z, values[id(cond)])

    z = torch.zeros(1, 1, 1, 1)
    # D = 0.05, mu = 0.5: gamma = 0.475, unused in the warm-up; then half of nu = 0.35625 is added.
    assert sld(predict, z, z, 0).item() == pytest.approx(2.0, abs=1e-5)
    assert sld(predict, z, z, 1).item() == pytest.approx(2 * (1 - (0.475 + 0.5 * 0.35625)), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- single methods


def test_ca_s_first_loss_by_hand_with_diffusers_own_noising(small, unet):
    ours = first_losses(small, "ca", retain=())["removal"]
    anchor = small.prompt(small.anchor("church"))
    clean = make_pool(small, [(anchor, "")], 0, count=2, steps=5, guidance=3.0).clean
    generator = seeded("ablation", 0, 0)
    which = torch.randint(clean.shape[1], (2,), generator=generator)
    t = torch.randint(1000, (2,), generator=generator)
    noise = torch.randn(2, *clean.shape[2:], generator=generator)
    noised = small.pipe.scheduler.add_noise(clean[0, which], noise, t)
    with torch.no_grad():
        prediction, wanted = (
            unet(noised, t, encode(small.pipe, [prompt] * 2).tokens).sample for prompt in (PROMPTS[0], anchor)
        )
    assert ours == pytest.approx((prediction - wanted).square().mean().item(), rel=1e-4)


def test_age_as_printed_gives_its_adversary_another_gradient_than_as_released(small):
    # Two candidates and one step of ascent: what differs is the adversary's gradient, and so the choices that follow.
    how = {"steps": 6, "adversary_lr": 1.0, "lr": 1e-2, "temperature": 2.0}
    printed, again, released = (erased(small, "age", detached=d, **how) for d in (False, False, True))
    assert printed.info["history"] == again.info["history"]
    assert printed.info["history"] != released.info["history"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda world: erase(world, ["church"], "esd"), "unknown method 'esd': accepted are esd-x"),
        (lambda world: method_config("uce", lr=1.0), "unknown setting of uce 'lr'"),
        (lambda world: erase(world, ["church"], "uce", method_config("esd-x")), "the config of 'uce' is a UCE"),
        (lambda world: method_config("eap", retain=()), r"retain=\(\) is not possible"),
    ],
)
def test_wrong_names_and_configs_are_refused(small, call, message, sentence):
    with pytest.raises(ValueError, match=message) as error:
        call(small)
    sentence(error)
