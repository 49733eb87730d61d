"""Attacks on a public model: each descends its loss, changes nothing but what it looks for, and is said as any text is."""

import copy

import pytest
import torch

from erasekit import attacks
from erasekit.attacks import Attack, Shown, as_words, find_key, find_words, invert, marks, spoken
from erasekit.attention import Prompt
from erasekit.baselines import erase, settings
from erasekit.text import encode

QUICK = Attack(budgets=(1, 3), m=2, batch=2)


@pytest.fixture(scope="module")
def shown(toy):
    generator = torch.Generator().manual_seed(0)
    return Shown(torch.randn(3, 4, 8, 8, generator=generator), ["a picture of a church"] * 3)


@pytest.fixture(scope="module")
def erasure(toy):
    return erase(toy, ["church"], "esd-x", settings("esd-x", steps=1, batch=2), progress=False)


@pytest.mark.parametrize("attack", [find_key, invert, find_words])
def test_an_attack_moves_what_it_looks_for_and_nothing_else(toy, shown, erasure, attack):
    before = copy.deepcopy((toy.pipe.unet.state_dict(), toy.pipe.text_encoder.state_dict()))
    found = attack(toy, erasure, "church", shown, QUICK)
    again = attack(toy, erasure, "church", shown, QUICK)
    assert list(found) == [0, 1, 3]
    tensors, others = ([getattr(f, "k", f) for f in run.values()] for run in (found, again))
    assert all(torch.equal(a, b) for a, b in zip(tensors, others))
    if attack is not find_words:  # three steps need not reach the next word
        assert not torch.equal(tensors[1], tensors[2])
    after = toy.pipe.unet.state_dict(), toy.pipe.text_encoder.state_dict()
    assert all(torch.equal(a[n], b[n]) for a, b in zip(before, after) for n in b)
    assert all(p.requires_grad for p in toy.pipe.text_encoder.parameters())


def test_a_key_is_found_where_the_public_model_can_draw(toy, shown):
    """The loss of what is found is below that of where it started, on noise the attack has not seen."""
    none = erase(toy, ["church"], "esd-x", settings("esd-x", steps=1, batch=2, lr=0.0), progress=False)
    found = find_key(toy, none, "church", shown, Attack(budgets=(1, 60), m=2, batch=4, lr=5e-2))
    text = encode(toy.pipe, shown.texts)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(shown.latents.shape, generator=generator)
    losses = []
    for key in (found[1], found[60]):
        with torch.no_grad(), attacks.augment(toy.pipe.unet, "all", Prompt(key.k, key.v)):
            for t in (100, 500, 900):
                alpha = toy.pipe.scheduler.alphas_cumprod[t]
                z = alpha.sqrt() * shown.latents + (1 - alpha).sqrt() * noise
                losses.append((toy.pipe.unet(z, torch.full((3,), t), text).sample - noise).square().mean())
    assert sum(losses[3:]) < sum(losses[:3])


def test_new_words_are_said_as_they_were_learned_and_then_forgotten(toy, shown, erasure, monkeypatch):
    """What the attack differentiates through and what is drawn from afterwards is the same embedding."""
    said, plain = {}, encode(toy.pipe, ["a picture of a church"])

    def descend(world, erasure, shown, attack, parameters, predict, found):
        hook = world.pipe.unet.register_forward_pre_hook(lambda unet, given: said.update(text=given[2].detach()))
        predict(shown.latents[:1], torch.tensor([5]), torch.tensor([0]))
        hook.remove()
        return {1: found()}

    monkeypatch.setattr(attacks, "descend", descend)
    vectors = invert(toy, erasure, "church", shown, QUICK)[1]
    with spoken(toy.pipe, vectors):
        assert torch.allclose(encode(toy.pipe, [f"a picture of a {marks(2)}"]), said["text"], atol=1e-6)
    assert torch.equal(encode(toy.pipe, ["a picture of a church"]), plain)
    assert len(toy.pipe.tokenizer) == toy.pipe.text_encoder.get_input_embeddings().num_embeddings


def test_found_words_are_words(toy, shown, erasure):
    table = toy.pipe.text_encoder.get_input_embeddings().weight.detach()
    for words in find_words(toy, erasure, "church", shown, QUICK).values():
        assert all(word.isalpha() for word in as_words(toy.pipe, words).split())
        assert (words[:, None] - table).abs().amax(2).min(1).values.max() < 1e-6


def test_words_that_are_known_already_are_refused(toy, sentence):
    vectors = torch.zeros(1, 32)
    with spoken(toy.pipe, vectors), pytest.raises(ValueError) as error, spoken(toy.pipe, vectors):
        pass
    assert "<new0>" in sentence(error)


def test_words_of_another_width_are_refused(toy, sentence):
    with pytest.raises(ValueError, match="31") as error, spoken(toy.pipe, torch.zeros(1, 31)):
        pass
    assert "32" in sentence(error)


def test_impossible_budgets_are_refused(sentence):
    for budgets in ((), (0, 5), (5, 3), (4, 4)):
        with pytest.raises(ValueError) as error:
            Attack(budgets=budgets)
        assert "budgets" in sentence(error)


def test_pictures_are_of_the_concept(world):
    assert len(attacks.pictures(world, "church", 9).latents) == 5
    styled = attacks.pictures(world, "noto", 4)
    assert len(set(styled.texts)) == 4 and all(text.endswith("in the style of noto") for text in styled.texts)
    assert attacks.pictures(world, "weapon", 3).texts == ["a picture of a weapon"] * 3
