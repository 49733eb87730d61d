"""Attacks: each lowers its loss, changes nothing but its own parameters, and its tokens are encoded like any text."""

import copy

import pytest
import torch

from erasekit.attention import Prompt, augment
from erasekit.baselines import erase, method_config
from erasekit.conditioning import encode
from erasekit.evaluation import attack_success, attacks
from erasekit.evaluation.attacks import (
    Attack,
    AttackImages,
    add_tokens,
    attack_images,
    hard_prompt_search,
    nearest_words,
    optimize_key,
    placeholder_tokens,
    textual_inversion,
)

SHORT = Attack(budgets=(1, 3), m=2, batch_size=2)


@pytest.fixture(scope="module")
def images(toy):
    generator = torch.Generator().manual_seed(0)
    return AttackImages(torch.randn(3, 4, 8, 8, generator=generator), ["a picture of a church"] * 3)


@pytest.fixture(scope="module")
def erasure(toy):
    return erase(toy, ["church"], "esd-x", method_config("esd-x", steps=1, batch_size=2), progress=False)


@pytest.mark.parametrize("search", [optimize_key, textual_inversion, hard_prompt_search])
def test_an_attack_changes_its_own_parameters_and_nothing_else(toy, images, erasure, search):
    before = copy.deepcopy((toy.pipe.unet.state_dict(), toy.pipe.text_encoder.state_dict()))
    results = search(toy, erasure, "church", images, SHORT)
    again = search(toy, erasure, "church", images, SHORT)
    assert list(results) == [0, 1, 3]
    tensors, others = ([getattr(r, "k", r) for r in run.values()] for run in (results, again))
    assert all(torch.equal(a, b) for a, b in zip(tensors, others))
    if search is not hard_prompt_search:  # three steps need not cross to the next word
        assert not torch.equal(tensors[1], tensors[2])
    after = toy.pipe.unet.state_dict(), toy.pipe.text_encoder.state_dict()
    assert all(torch.equal(a[n], b[n]) for a, b in zip(before, after) for n in b)
    assert all(p.requires_grad for p in toy.pipe.text_encoder.parameters())


def test_an_optimized_key_lowers_the_loss_on_new_noise(toy, images):
    nothing = erase(toy, ["church"], "esd-x", method_config("esd-x", steps=1, batch_size=2, lr=1e-12), progress=False)
    results = optimize_key(toy, nothing, "church", images, Attack(budgets=(1, 60), m=2, batch_size=4, lr=5e-2))
    tokens = encode(toy.pipe, images.prompts).tokens
    noise = torch.randn(images.latents.shape, generator=torch.Generator().manual_seed(5))
    losses = []
    for key in (results[1], results[60]):
        with torch.no_grad(), augment(toy.pipe.unet, "all", Prompt(key.k, key.v)):
            for t in (100, 500, 900):
                alpha = toy.pipe.scheduler.alphas_cumprod[t]
                z = alpha.sqrt() * images.latents + (1 - alpha).sqrt() * noise
                losses.append((toy.pipe.unet(z, torch.full((3,), t), tokens).sample - noise).square().mean())
    assert sum(losses[3:]) < sum(losses[:3])


def test_new_tokens_are_encoded_as_in_training_and_then_removed(toy, images, erasure, monkeypatch):
    """The embedding the attack differentiates through is the one that is sampled with."""
    seen, plain = {}, encode(toy.pipe, ["a picture of a church"]).tokens

    def descend(world, erasure, images, attack, parameters, predict, result):
        hook = world.pipe.unet.register_forward_pre_hook(lambda unet, inputs: seen.update(tokens=inputs[2].detach()))
        predict(images.latents[:1], torch.tensor([5]), torch.tensor([0]))
        hook.remove()
        return {1: result()}

    monkeypatch.setattr(attacks, "descend", descend)
    vectors = textual_inversion(toy, erasure, "church", images, SHORT)[1]
    with add_tokens(toy.pipe, vectors):
        tokens = encode(toy.pipe, [f"a picture of a {placeholder_tokens(2)}"]).tokens
    assert torch.allclose(tokens, seen["tokens"], atol=1e-6)
    assert torch.equal(encode(toy.pipe, ["a picture of a church"]).tokens, plain)
    assert len(toy.pipe.tokenizer) == toy.pipe.text_encoder.get_input_embeddings().num_embeddings


def test_a_hard_prompt_consists_of_words(toy, images, erasure):
    table = toy.pipe.text_encoder.get_input_embeddings().weight.detach()
    for vectors in hard_prompt_search(toy, erasure, "church", images, SHORT).values():
        assert all(word.isalpha() for word in nearest_words(toy.pipe, vectors).split())
        assert (vectors[:, None] - table).abs().amax(2).min(1).values.max() < 1e-6


def test_tokens_that_exist_already_are_refused(toy, sentence):
    vectors = torch.zeros(1, 32)
    with add_tokens(toy.pipe, vectors), pytest.raises(ValueError) as error, add_tokens(toy.pipe, vectors):
        pass
    assert "<new0>" in sentence(error)


def test_embeddings_of_another_width_are_refused(toy, sentence):
    with pytest.raises(ValueError, match="31") as error, add_tokens(toy.pipe, torch.zeros(1, 31)):
        pass
    assert "32" in sentence(error)


def test_impossible_budgets_are_refused(sentence):
    for budgets in ((), (0, 5), (5, 3), (4, 4)):
        with pytest.raises(ValueError) as error:
            Attack(budgets=budgets)
        assert "budgets" in sentence(error)


def test_attack_images_show_the_concept(world):
    assert len(attack_images(world, "church", 9).latents) == 5
    styled = attack_images(world, "noto", 4)
    assert len(set(styled.prompts)) == 4 and all(prompt.endswith("in the style of noto") for prompt in styled.prompts)
    assert attack_images(world, "weapon", 3).prompts == ["a picture of a weapon"] * 3


def test_success_is_high_on_the_untouched_model_and_follows_the_tokens(world):
    base = attack_success.untouched(world)
    assert attack_success.success_rate(world, base, "church", 4, 8) >= 75
    zeros = torch.zeros(2, world.pipe.text_encoder.get_input_embeddings().embedding_dim)
    assert attack_success.success_rate(world, base, "church", 4, 8, zeros) <= 25  # in place of the name
    assert attack_success.success_rate(world, base, "noto", 2, 8) >= 50
    assert attack_success.success_rate(world, base, "weapon", 2, 8) >= 50


def test_an_attack_is_compared_with_the_base_and_the_oracle(toy, monkeypatch):
    assert list(attack_success.references(toy, ("church",))) == ["base"]
    oracle = attack_success.untouched(toy)
    monkeypatch.setattr(type(toy), "oracle", lambda self, concepts: oracle if concepts == ("church",) else None)
    found = attack_success.references(toy, ("church",))
    assert list(found) == ["base", "oracle"] and found["oracle"] is oracle and found["base"].delta == {}
    assert list(attack_success.references(toy, ("dog",))) == ["base"]
