"""The other ways a prompt may enter attention, the weight of a key, and erasures that follow one another."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from erasekit import training
from erasekit.artifacts import Erasure
from erasekit.attention import Prompt, augment
from erasekit.baselines import erase
from erasekit.conditioning import encode, predict_noise
from erasekit.kpop import KPOP, kpop
from erasekit.mechanisms import CHOICES, MECHANISMS, PromptNetwork, TimedPrompt
from erasekit.sampling import sample

module = sys.modules[kpop.__module__]  # `erasekit.kpop` is the function
SHORT = {"steps": 2, "batch_size": 2, "m": 3, "num_trajectories": 2, "trajectory_steps": 5}


def prediction(pipe, prompt, layers="all", concepts=("church", "dog")):
    """Predicted noise of two latents with a prompt."""
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    cond, t = encode(pipe, [f"a picture of a {concept}" for concept in concepts]), torch.tensor([10, 900])
    with torch.no_grad(), augment(pipe.unet, layers) as state, state.use(prompt.at(t, 1000) if prompt else None):
        return predict_noise(pipe.unet, z, t, cond)


def initial(toy, mechanism, layers="all", concept="church"):
    length = encode(toy.pipe, [concept]).tokens.shape[1]
    return MECHANISMS[mechanism].initial(toy.pipe.unet, layers, toy.concept_tokens(concept).float(), 3, length)


@pytest.mark.parametrize("layers", ["mid", "mid+up", "all"])
@pytest.mark.parametrize("mechanism", ["layers", "projected", "timed"])
def test_before_training_every_concatenation_is_the_same(toy, mechanism, layers):
    shared, other = (prediction(toy.pipe, initial(toy, m, layers), layers) for m in ("shared", mechanism))
    assert torch.allclose(shared, other, atol=1e-6)
    assert not torch.allclose(shared, prediction(toy.pipe, None), atol=1e-4)


def test_an_added_prompt_is_neutral_before_training(toy):
    assert torch.allclose(prediction(toy.pipe, initial(toy, "added")), prediction(toy.pipe, None), atol=1e-6)


def test_a_timed_prompt_blends_its_neighbours_in_time():
    pairs = torch.arange(4.0).reshape(4, 1, 1).expand(4, 2, 5)
    prompt = TimedPrompt(pairs, -pairs).at(torch.tensor([0, 333, 500, 999]), 1000)
    assert prompt.k[:, 0, 0].tolist() == pytest.approx([0.0, 1.0, 1.5015, 3.0], abs=1e-4)
    assert torch.equal(prompt.k, -prompt.v) and prompt.mechanism == "shared"


def test_a_log_weight_is_a_number_of_copies(toy, prompt):
    """Tokens given twice are the same tokens with log 2 more; at weight zero the layers' own processors run."""
    twice, pipe = Prompt(*(torch.cat([side, side]) for side in (prompt.k, prompt.v))), toy.pipe
    assert torch.allclose(prediction(pipe, twice), prediction(pipe, replace(prompt, log_weight=math.log(2))), atol=1e-5)
    assert torch.equal(prediction(pipe, replace(prompt, log_weight=-math.inf)), prediction(pipe, None))
    assert torch.allclose(prediction(pipe, replace(prompt, log_weight=-40.0)), prediction(pipe, None), atol=1e-5)
    assert torch.equal(prediction(pipe, replace(prompt, log_weight=0.0)), prediction(pipe, prompt))


@pytest.mark.parametrize("mechanism", CHOICES)
def test_a_key_of_any_mechanism_is_trained_saved_and_loaded(toy, tmp_path, mechanism):
    erasure = kpop(toy, ["church", "dog"], KPOP(mechanism=mechanism, **SHORT), progress=False)
    erasure.save(tmp_path)
    loaded = Erasure.load(tmp_path, toy)
    prompts, seeds, key = ["a picture of a church"] * 2, [0, 1], erasure.key("church")
    public = sample(toy.pipe, prompts, seeds, erasure=erasure, num_inference_steps=2)
    with erasure.applied(toy):
        ours, theirs = (
            sample(toy.pipe, prompts, seeds, key=e.key("church"), num_inference_steps=2) for e in (erasure, loaded)
        )
        alone = sample(toy.pipe, prompts[1:], seeds[1:], key=key, num_inference_steps=2)
    assert torch.equal(ours, theirs) and not torch.equal(ours, public)
    assert (ours[1:].int() - alone.int()).abs().max() <= 1  # whatever the batch size
    assert loaded.key("church").mechanism == ("shared" if mechanism == "network" else mechanism)
    if mechanism != "added":
        Erasure(erasure.delta, {"church": replace(key, log_weight=-3.0)}, erasure.info).save(tmp_path / "weak")
        assert Erasure.load(tmp_path / "weak").key("church").log_weight == -3.0


@pytest.mark.parametrize("mechanism", ["timed", "network"])
def test_an_interrupted_training_resumes_to_the_same_keys(toy, tmp_path, mechanism, monkeypatch):
    config, checkpoint = KPOP(mechanism=mechanism, **SHORT), tmp_path / "training.safetensors"
    whole = kpop(toy, ["church"], config, progress=False)
    optimizer_step, done = module.optimizer_step, []

    def stop_at_the_third_of_four(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(optimizer_step(*arguments))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "SAVE_EVERY", -1)
        patch.setattr(module, "optimizer_step", stop_at_the_third_of_four)
        kpop(toy, ["church"], config, checkpoint, progress=False)
    resumed = kpop(toy, ["church"], config, checkpoint, progress=False)
    assert torch.equal(whole.key("church").k, resumed.key("church").k)
    assert all(torch.equal(whole.delta[n], resumed.delta[n]) for n in whole.delta)


def test_a_network_starts_from_the_tokens_and_also_makes_untrained_concepts_keys(toy):
    tokens = [toy.concept_tokens(c).float() for c in ("church", "dog")]
    start = {c: initial(toy, "shared", concept=c).k for c in ("church", "dog")}
    assert torch.equal(PromptNetwork(toy.pipe.unet, "all", tokens, 3, seed=0).prompt(1).k, start["dog"])
    for mechanism, moves in {"shared": False, "network": True}.items():
        config = KPOP(mechanism=mechanism, train_keys_for=("church",), **SHORT)
        erasure = kpop(toy, ["church", "dog"], config, progress=False)
        assert torch.allclose(erasure.key("dog").k, start["dog"], atol=1e-7) != moves
        assert not torch.allclose(erasure.key("church").k, start["church"], atol=1e-7)


def refusals(toy, prompt):
    projected = initial(toy, "projected")
    narrow = replace(projected, k=projected.k[..., :5], v=projected.v[..., :5])
    return {
        "unknown mechanism 'stapled': .*network": lambda: KPOP(mechanism="stapled"),
        "unknown concept in train_keys_for 'dog'": lambda: kpop(toy, ["church"], KPOP(train_keys_for=("dog",))),
        "log_weight=1.0 is not possible": lambda: replace(initial(toy, "added"), log_weight=1.0),
        r"prompt.at\(t, total\)": lambda: prediction(toy.pipe, Static(initial(toy, "timed"))),
        "5 wide but this model takes 32": lambda: augment(toy.pipe.unet, "all", narrow).__enter__(),
    }


class Static:
    """A prompt used without regard to the time step."""

    def __init__(self, prompt):
        self.at = lambda t, total: prompt


@pytest.mark.parametrize("number", range(5))
def test_impossible_prompts_are_refused(toy, prompt, number, sentence):
    message, call = list(refusals(toy, prompt).items())[number]
    with pytest.raises(ValueError, match=message) as error:
        call()
    sentence(error)


# -------------------------------------------------------------------------------------------------- continual erasure


def test_a_world_with_an_erasure_starts_from_its_public_model(toy):
    first = kpop(toy, ["church"], KPOP(**SHORT), progress=False)
    later = toy.with_erasure(first)
    assert later.fingerprint != toy.fingerprint and later.root is toy
    request = {"prompts": ["a picture of a church"], "seeds": [0], "num_inference_steps": 2}
    public = sample(toy.pipe, erasure=first, **request)  # it can still be applied to its own base
    assert torch.equal(sample(later.pipe, **request), public)
    second = kpop(later, ["dog"], KPOP(**SHORT), progress=False)
    assert second.info["base"] == later.fingerprint
    assert later.with_erasure(second).root is toy


def test_rehearsal_keeps_an_old_key_closer_to_the_original(toy):
    config = KPOP(**SHORT | {"steps": 5, "batch_size": 4, "lr": 2e-3})
    first = kpop(toy, ["church"], config, progress=False)
    later, key = toy.with_erasure(first), first.key("church")
    original = prediction(toy.pipe, None, concepts=("church", "church"))

    def distance(erasure):
        found = prediction(later.with_erasure(erasure).pipe, key, concepts=("church", "church"))
        return (found - original).square().mean().item()

    alone = kpop(later, ["dog"], config, progress=False)
    rehearsed = kpop(later, ["dog"], config, progress=False, rehearse=first.keys)
    assert list(rehearsed.info["rehearsed"]) == ["church"] and "rehearsal" in rehearsed.info["history"][0]
    assert distance(rehearsed) < distance(alone)


def test_what_cannot_be_continued_is_refused(toy, sentence):
    with pytest.raises(ValueError, match="'np' does not end in weights") as error:
        toy.with_erasure(erase(toy, ["church"], "np"))
    sentence(error)
    first = kpop(toy, ["church"], KPOP(mechanism="layers", **SHORT), progress=False)
    with pytest.raises(ValueError, match="key of 'church' is 'layers'") as error:
        kpop(toy.with_erasure(first), ["dog"], KPOP(**SHORT), progress=False, rehearse=first.keys)
    sentence(error)
