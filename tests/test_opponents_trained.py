"""ACE, ANT, STEREO and RACE by identities and by hand; errors on x0 of EAP, AGE and KPOP; KPOP's retain prompt."""

import copy
from importlib import import_module

import pytest
import torch
from conftest import make_v2

from erasekit import training
from erasekit.baselines import erase, method_config, stereo
from erasekit.baselines.ant import largest
from erasekit.baselines.race import RACE, starting_noise
from erasekit.checkpoints import seeded
from erasekit.conditioning import encode
from erasekit.training import Trainer

SHORT = {"steps": 2, "batch_size": 4, "lr": 1e-3, "num_trajectories": 2, "trajectory_steps": 5}
CHURCH = "a picture of a church"


@pytest.fixture(scope="module")
def small(toy):
    """The toy world with retained concepts."""
    world = copy.copy(toy)
    world.retained, world.trajectories = ("fish", "dog"), {}
    return world


@pytest.fixture(scope="module")
def small_v(small):
    """The same, predicting v."""
    world = copy.copy(small)
    world.pipe, world.trajectories = make_v2(small.pipe), {}
    return world


def erased(world, method, checkpoint=None, **changes):
    return erase(world, ["church"], method, method_config(method, **SHORT | changes), checkpoint, progress=False)


def first(world, method, **changes):
    return erased(world, method, **{"steps": 1} | changes).info["history"][0]


def first_batch(world, **changes):
    """The first batch of a training, the scheduler's alpha bar at it, and eps_c - eps_null's mean square per sample."""
    trainer = Trainer(world, ["church"], method_config("esd-x", **SHORT | changes), "esd")
    b = trainer.batch("removal", 0, retained=False)
    return b, trainer.alphas[b.t][:, None, None, None], (b.eps - b.eps_null).square().flatten(1).mean(1)


# --------------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize(
    "method, changes, eta",
    [
        ("ant", {"early_share": 0.0, "saliency": 1.0, "gradients": 1}, 1.0),
        ("race", {"box": 0.0, "inner": 1}, 1.0),
        ("stereo", {"rounds": 0, "s": 1.0}, 2.0),
    ],
)
def test_without_what_is_its_own_each_is_esd(small, method, changes, eta):
    ours = erased(small, method, retain=("fish", ""), **changes)
    esd = erased(small, "esd-x", retain=("fish", ""), eta=eta)
    assert ours.info["history"] == esd.info["history"] and ours.digest() == esd.digest()


def test_ace_of_the_concept_alone_is_esd(small):
    ours = erased(small, "ace", retain=("dog",), null_weight=0.0, retain_weight=0.0, eta=1.0).info["history"]
    esd = erased(small, "esd-x").info["history"]
    assert [h["removal"] for h in ours] == pytest.approx([h["removal"] for h in esd], rel=1e-4)


def test_ace_without_guidance_keeps_the_empty_prompt(small):
    losses = first(small, "ace", retain=("dog",), eta=0.0, s=0.0)
    assert losses["null"] < 1e-12 and losses["retain"] < 1e-12
    assert losses["removal"] == pytest.approx(first(small, "esd-x", eta=0.0)["removal"], rel=1e-4)


def test_stereo_with_the_concept_as_its_own_anchor_is_esd_with_eta_2(small):
    world = copy.copy(small)
    world.train_templates = (world.template,)
    found = first(world, "stereo", rounds=0, s=3.0)["removal"]
    assert found == pytest.approx(first(world, "esd-x", eta=2.0)["removal"], rel=1e-4)


# ------------------------------------------------------------------------------------------------------------------ by hand


def test_ace_s_empty_prompt_by_hand(small, unet):
    b, _, _ = first_batch(small)
    with torch.no_grad():
        eps_a = unet(b.z, b.t, encode(small.pipe, ["a picture of a dog"]).tokens.expand(b.n, -1, -1)).sample
    # At the start eps_theta'(z, "") is eps(z, ""), so what is left is the guidance itself.
    guidance = 2.0 * (b.eps - b.eps_null) - 3.0 * (eps_a - b.eps_null)
    found = first(small, "ace", retain=("dog", ""), eta=2.0, s=3.0)["null"]
    assert found == pytest.approx(guidance.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("retain", [(), ("",)])
def test_ace_without_anchors_is_not_corrected(small, retain):
    _, _, difference = first_batch(small)
    losses = first(small, "ace", retain=retain, eta=2.0)
    assert losses["retain"] == 0 and losses["null"] == pytest.approx(4 * difference.mean().item(), rel=1e-4)


def test_ant_keeps_early_steps_and_erases_late_ones(small):
    b, _, difference = first_batch(small)
    early = b.t >= 500
    assert early.any() and not early.all()
    # eta 2: eps_c is 1 from the early target, eps_null + 2 d, and 3 from the late one, eps_null - 2 d.
    expected = (torch.where(early, 1.0, 9.0) * difference).mean().item()
    found = first(small, "ant", eta=2.0, early_share=0.5, gradients=1)["removal"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert first(small, "ant", eta=1.0, early_share=0.99, gradients=1)["removal"] < 9 * difference.mean()


def test_ant_trains_salient_weights_alone(small):
    values = torch.tensor([[0.1, 3.0], [0.2, 2.0]])
    assert torch.equal(largest(values, 0.5), torch.tensor([[False, True], [False, True]]))
    assert largest(values, 1.0).all() and largest(values, 0.0).sum() == 1
    one, five = (erased(small, "ant", saliency=0.25, gradients=count) for count in (1, 5))
    base = dict(small.pipe.unet.named_parameters())
    for erasure in (one, five):
        moved = sum(int((tensor != base[name]).sum()) for name, tensor in erasure.delta.items())
        share = moved / sum(tensor.numel() for tensor in erasure.delta.values())
        assert 0 < share <= erasure.info["trained"] + 1e-9
    assert five.info["trained"] < one.info["trained"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("kind", ["small", "small_v"])
def test_race_finds_the_noise_a_trajectory_began_from(kind, request):
    world = request.getfixturevalue(kind)
    trainer = Trainer(world, ["church", "dog"], RACE(**SHORT), "race")
    b, generator = trainer.batch("removal", 0), seeded("removal", 0, 0)
    index = torch.randint(2, (b.n,), generator=generator)
    number = torch.randint(2, (b.n,), generator=generator)
    noise, found = trainer.pool.latents[index, number, 0], starting_noise(trainer, b)
    a = trainer.alphas[b.t][:, None, None, None]
    if kind == "small_v":  # eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) z
        found = a.sqrt() * found + (1 - a).sqrt() * b.z
    assert torch.allclose(found, noise, atol=1e-5)


def test_race_s_box_bounds_the_attack_which_brings_the_noise_closer(small, monkeypatch):
    predict, seen = Trainer.predict, []

    def spy(self, z, t, cond):
        prediction = predict(self, z, t, cond)
        seen.append((cond.tokens.detach(), prediction.detach()))
        return prediction

    monkeypatch.setattr(Trainer, "predict", spy)
    first(small, "race", box=0.5)
    trainer = Trainer(small, ["church"], RACE(**SHORT), "race")
    b = trainer.batch("removal", 0)
    wanted = starting_noise(trainer, b)
    assert len(seen) == 11 and all((tokens - b.cond.tokens).abs().max() <= 0.5 + 1e-6 for tokens, _ in seen)
    start, end = ((prediction - wanted).square().mean() for _, prediction in (seen[0], seen[-1]))
    assert end < start


# ------------------------------------------------------------------------------------------------------------------- search


def test_stereo_s_word_says_what_the_concept_said(small, monkeypatch):
    lost = []
    step = stereo.optimizer_step
    monkeypatch.setattr(stereo, "optimizer_step", lambda o, loss, p: (lost.append(loss.item()), step(o, loss, p)))
    tokenizer, hashed = small.pipe.tokenizer, small.pipeline_hash
    erased(small, "stereo", steps=1, lr=4e-2, rounds=1, round_steps=10, inner=40, word_lr=5e-2)
    inversion = lost[10:50]
    assert sum(inversion[-10:]) < sum(inversion[:10])
    assert small.pipe.tokenizer is tokenizer and small.pipeline_hash == hashed


def test_stereo_resumes_without_a_second_search(small, tmp_path, monkeypatch):
    how = {"rounds": 2, "round_steps": 1, "inner": 1, "retain": ("fish",)}
    straight = erased(small, "stereo", **how)
    assert straight.digest() != erased(small, "stereo", **how | {"rounds": 0}).digest()
    erased(small, "stereo", tmp_path / "run.safetensors", **how | {"steps": 1})
    monkeypatch.setattr(stereo, "search", None)
    resumed = erased(small, "stereo", tmp_path / "run.safetensors", **how)
    assert resumed.digest() == straight.digest()


# ------------------------------------------------------------------------------------------------------------- errors on x0


@pytest.mark.parametrize("kind", ["small", "small_v"])
@pytest.mark.parametrize("method, changes", [("eap", {}), ("age", {}), ("kpop", {"lam": 0.0, "retain": ()})])
def test_gradients_of_errors_on_x0_are_those_of_the_predicted_clean_latents(
    kind, method, changes, request, monkeypatch
):
    world = request.getfixturevalue(kind)
    gradients, module = [], import_module("erasekit.kpop" if method == "kpop" else f"erasekit.baselines.{method}")

    def spy(optimizer, loss, parameters, *clip):
        parameters = list(parameters)
        gradients.append(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        return training.optimizer_step(optimizer, loss, parameters, *clip)

    monkeypatch.setattr(module, "optimizer_step", spy)
    # The one candidate is the empty prompt, whose own term is 0 at the start: what is left is the removal's.
    erased(world, method, **{"steps": 1, "retain": ("",), "loss_space": "x0"} | changes)

    b, a, _ = first_batch(world)
    unet = world.pipe.unet
    names = [name for name, _ in unet.named_parameters() if ".attn2." in name]
    theta = [dict(unet.named_parameters())[name] for name in names]

    def x0(prediction):
        if kind == "small_v":
            return a.sqrt() * b.z - (1 - a).sqrt() * prediction
        return (b.z - (1 - a).sqrt() * prediction) / a.sqrt()

    target = 2 * x0(b.eps_null) - x0(b.eps)
    required = [p.requires_grad for p in theta]
    for p in theta:
        p.requires_grad_(True)
    loss = (x0(unet(b.z, b.t, b.cond.tokens).sample) - target).square().mean()
    expected = torch.autograd.grad(loss, theta)
    for p, before in zip(theta, required):
        p.requires_grad_(before)
    for found, wanted in zip(gradients[-1], expected):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())


# ------------------------------------------------------------------------------------------------------- KPOP's retain prompt


@pytest.mark.parametrize("changes", [{}, {"schedule": "joint"}, {"mechanism": "network"}, {"mechanism": "timed"}])
def test_a_retain_prompt_is_trained_and_dropped(small, changes):
    how = {"retain": ("fish", ""), "m": 3} | changes
    plain, kept = (erased(small, "kpop", retain_prompt=on, **how) for on in (False, True))
    assert plain.info["history"][0]["retain"] < 1e-9 < kept.info["history"][0]["retain"]
    assert list(kept.keys) == ["church"] and kept.digest() != plain.digest()


# ---------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "method, changes, message",
    [
        ("ace", {"null_weight": 1.5}, "null_weight=1.5 is not possible: it is at most 1"),
        ("ant", {"early_share": 2.0}, "early_share=2.0 is not possible: it is at most 1"),
        ("ant", {"saliency": -0.5}, "saliency=-0.5 is not possible: it is at least 0"),
        ("stereo", {"word_lr": 0.0}, "word_lr=0.0 is not possible: it is above 0"),
        ("race", {"inner": 1.5}, "inner=1.5 is not possible"),
        ("kpop", {"retain_prompt": True}, r"retain_prompt=True is not possible with retain=\(\)"),
    ],
)
def test_impossible_settings_are_refused(method, changes, message, refused):
    refused(ValueError, message, lambda: method_config(method, **changes))
