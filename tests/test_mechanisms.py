"""Other ways for a prompt to enter attention, a key's strength, and erasures that follow one another."""

import importlib
import math
from dataclasses import replace

import pytest
import torch

from erasekit import training
from erasekit.artifacts import Erasure
from erasekit.attention import MECHANISMS, Prompt, augment
from erasekit.kpop import KPOP, kpop
from erasekit.mechanisms import CHOICES, Network, start
from erasekit.sampling import sample
from erasekit.text import encode

module = importlib.import_module("erasekit.kpop")  # the package's `kpop` is the function
SHORT = {"steps": 2, "batch": 2, "m": 3}


def predicted(toy, prompt, place="all"):
    """The U-Net's prediction for two images with a prompt."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 4, 8, 8, generator=generator)
    text = encode(toy.pipe, ["a picture of a church", "a picture of a dog"])
    t = torch.tensor([10, 900])
    with torch.no_grad(), augment(toy.pipe.unet, place) as slot, slot.holding(prompt.at(t, 1000) if prompt else None):
        return toy.pipe.unet(z, t, text).sample


def predicted_plainly(toy):
    text = encode(toy.pipe, ["a picture of a church"])
    return toy.pipe.unet(torch.zeros(1, 4, 8, 8), torch.tensor([10]), text).sample


def started(toy, mechanism, place="all"):
    tokens = toy.concept_tokens("church").float()
    said = encode(toy.pipe, ["church"]).shape[1]
    return start(toy.pipe.unet, mechanism, place, tokens, 3, said)


@pytest.mark.parametrize("place", ["mid", "mid+up", "all"])
@pytest.mark.parametrize("mechanism", ["layers", "projected", "timed"])
def test_before_training_every_way_of_joining_is_the_same(toy, mechanism, place):
    shared, other = (predicted(toy, started(toy, m, place), place) for m in ("shared", mechanism))
    assert torch.allclose(shared, other, atol=1e-6)
    assert not torch.allclose(shared, predicted(toy, None), atol=1e-4)


def test_an_added_prompt_starts_as_none(toy):
    assert torch.allclose(predicted(toy, started(toy, "added")), predicted(toy, None), atol=1e-6)


def test_a_timed_prompt_blends_its_neighbours_in_time():
    rings = torch.arange(4.0).reshape(4, 1, 1).expand(4, 2, 5)
    timed = Prompt(rings, -rings, mechanism="timed")
    there = timed.at(torch.tensor([0, 333, 500, 999]), 1000)
    assert there.k[:, 0, 0].tolist() == pytest.approx([0.0, 1.0, 1.5015, 3.0], abs=1e-4)
    assert torch.equal(there.k, -there.v) and there.mechanism == "shared"


def test_a_log_weight_is_a_number_of_copies(toy, prompt):
    """Tokens twice are the same tokens with log 2 more; without any weight the layers' own processors run."""
    twice = Prompt(*(torch.cat([side, side]) for side in (prompt.k, prompt.v)))
    assert torch.allclose(predicted(toy, twice), predicted(toy, replace(prompt, log_weight=math.log(2))), atol=1e-5)
    assert torch.equal(predicted(toy, replace(prompt, log_weight=-math.inf)), predicted(toy, None))
    assert torch.allclose(predicted(toy, replace(prompt, log_weight=-40.0)), predicted(toy, None), atol=1e-5)
    assert torch.equal(predicted(toy, replace(prompt, log_weight=0.0)), predicted(toy, prompt))


@pytest.mark.parametrize("mechanism", CHOICES)
def test_a_key_of_any_mechanism_is_trained_saved_and_loaded(toy, tmp_path, mechanism):
    made = kpop(toy, ["church", "dog"], KPOP(mechanism=mechanism, **SHORT), progress=False)
    made.save(tmp_path)
    loaded = Erasure.load(tmp_path, toy.pipe.unet)
    asked = ["a picture of a church"] * 2, [0, 1]
    with made.applied(toy.pipe.unet):
        hidden = sample(toy.pipe, *asked, steps=2)
        ours, theirs = (sample(toy.pipe, *asked, key=e.key("church"), steps=2) for e in (made, loaded))
        alone = sample(toy.pipe, *(part[1:] for part in asked), key=made.key("church"), steps=2)
    assert torch.equal(ours, theirs) and not torch.equal(ours, hidden)
    assert (ours[1:].int() - alone.int()).abs().max() <= 1  # whatever the batch size
    weak = replace(made.key("church"), log_weight=-3.0) if mechanism != "added" else None
    if mechanism != "added":
        Erasure(made.delta, {"church": weak}, made.info).save(tmp_path / "weak")
        assert Erasure.load(tmp_path / "weak").key("church").log_weight == -3.0
    assert loaded.key("church").mechanism == ("shared" if mechanism == "network" else mechanism)


@pytest.mark.parametrize("mechanism", ["timed", "network"])
def test_an_interrupted_training_goes_on_to_the_same_keys(toy, tmp_path, mechanism, monkeypatch):
    config, checkpoint = KPOP(mechanism=mechanism, **SHORT), tmp_path / "training.safetensors"
    whole = kpop(toy, ["church"], config, progress=False)
    monkeypatch.setattr(training, "SAVE_EVERY", -1)
    stop_at(monkeypatch, 3)  # of four updates
    with pytest.raises(KeyboardInterrupt):
        kpop(toy, ["church"], config, checkpoint, progress=False)
    monkeypatch.undo()
    again = kpop(toy, ["church"], config, checkpoint, progress=False)
    assert torch.equal(whole.key("church").k, again.key("church").k)
    assert all(torch.equal(whole.delta[n], again.delta[n]) for n in whole.delta)


def stop_at(monkeypatch, at):
    update, done = module.update, []

    def stop(*arguments):
        if len(done) == at - 1:
            raise KeyboardInterrupt
        done.append(update(*arguments))

    monkeypatch.setattr(module, "update", stop)


def test_a_network_starts_from_the_tokens_and_makes_keys_for_concepts_it_was_not_taught(toy):
    tokens = [toy.concept_tokens(c).float() for c in ("church", "dog")]
    network = Network(toy.pipe.unet, "all", tokens, 3, seed=0)
    assert torch.equal(network.prompt(1).k, started_for(toy, "dog"))
    moved = {}
    for mechanism in ("shared", "network"):
        config = KPOP(mechanism=mechanism, taught=("church",), **SHORT)
        made = kpop(toy, ["church", "dog"], config, progress=False)
        moved[mechanism] = not torch.allclose(made.key("dog").k, started_for(toy, "dog"), atol=1e-7)
        assert not torch.allclose(made.key("church").k, started_for(toy, "church"), atol=1e-7)
    assert moved == {"shared": False, "network": True}


def started_for(toy, concept):
    return start(toy.pipe.unet, "shared", "all", toy.concept_tokens(concept).float(), 3, 0).k


def test_unknown_mechanisms_and_concepts_are_refused(toy, prompt, sentence):
    with pytest.raises(ValueError) as error:
        KPOP(mechanism="stapled")
    assert "'stapled'" in sentence(error) and "network" in sentence(error)
    with pytest.raises(ValueError) as error:
        replace(prompt, mechanism="network")
    assert all(name in sentence(error) for name in MECHANISMS)
    with pytest.raises(ValueError) as error:
        kpop(toy, ["church"], KPOP(taught=("dog",), **SHORT), progress=False)
    assert "'dog'" in sentence(error)
    with pytest.raises(ValueError) as error:
        replace(prompt, mechanism="added", log_weight=1.0)
    assert "log_weight" in sentence(error)
    first = kpop(toy, ["church"], KPOP(mechanism="layers", **SHORT), progress=False)
    with pytest.raises(ValueError) as error:
        kpop(toy.after(first), ["dog"], KPOP(**SHORT), progress=False, rehearse=first.keys)
    assert "'church'" in sentence(error) and "layers" in sentence(error)
    timed = started(toy, "timed")
    with augment(toy.pipe.unet) as slot, slot.holding(timed), pytest.raises(ValueError) as error:
        predicted_plainly(toy)
    assert "at(t" in sentence(error)
    narrow = Prompt(prompt.k[:, :5], prompt.v[:, :5], mechanism="projected")
    with pytest.raises(ValueError) as error, augment(toy.pipe.unet, "all", narrow):
        pass
    assert "5 wide" in sentence(error) and "widest" in sentence(error)


def test_a_world_after_an_erasure_starts_from_its_public_model(toy):
    first = kpop(toy, ["church"], KPOP(**SHORT), progress=False)
    later = toy.after(first)
    assert later.fingerprint != toy.fingerprint and later.origin is toy
    asked = ["a picture of a church"], [0]
    hidden = sample(toy.pipe, *asked, erasure=first, steps=2)  # it can still be applied to its own base
    assert torch.equal(sample(later.pipe, *asked, steps=2), hidden)
    second = kpop(later, ["dog"], KPOP(**SHORT), progress=False)
    assert second.info["base"] == later.fingerprint
    assert later.after(second).origin is toy


def test_rehearsing_keeps_an_old_key_closer_to_what_it_drew(toy):
    config = KPOP(steps=20, batch=4, m=3, lr=1e-3)
    first = kpop(toy, ["church"], config, progress=False)
    later, key = toy.after(first), first.key("church")

    def off(made):
        """How far the old key's prediction is from the original model's."""
        end = later.after(made)
        with torch.no_grad(), augment(end.pipe.unet) as slot, slot.holding(key):
            z, t = (
                torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
                torch.tensor([50, 300, 600, 900]),
            )
            text = encode(toy.pipe, ["a picture of a church"] * 4)
            said = end.pipe.unet(z, t, text).sample
        with torch.no_grad():
            return (said - toy.pipe.unet(z, t, text).sample).square().mean().item()

    alone = kpop(later, ["dog"], config, progress=False)
    rehearsed = kpop(later, ["dog"], config, progress=False, rehearse=first.keys)
    assert list(rehearsed.info["rehearsed"]) == ["church"] and "rehearsal" in rehearsed.info["history"][0]
    assert off(rehearsed) < off(alone)


def test_no_world_follows_an_erasure_that_is_guidance_alone(toy, sentence):
    from erasekit.baselines import erase

    with pytest.raises(ValueError) as error:
        toy.after(erase(toy, ["church"], "np"))
    assert "'np'" in sentence(error)
