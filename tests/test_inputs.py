"""What is of the wrong kind is refused in one sentence before anything is spent: texts, numbers, models, keys, templates."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import SHORT

from erasekit.artifacts import Erasure, load_key
from erasekit.attention import Prompt, augment
from erasekit.baselines import erase, method_config
from erasekit.kpop import KPOP, kpop
from erasekit.mechanisms import PerLayerPrompt, TimedPrompt
from erasekit.pipelines.unlocked import unlocked
from erasekit.sampling import sample
from erasekit.world import World
from erasekit.worlds import load


def enter(context):
    with context:
        pass


NO_TEXTS = ("dog", None, 3, ["dog", None], [3], [["dog"]], [b"dog"], {"dog"}, {"dog": 1})


@pytest.mark.parametrize("texts", NO_TEXTS, ids=repr)
def test_what_is_no_list_of_texts_is_refused(toy, texts, refused):
    """A set has no order, on which the result would depend."""
    calls = [
        lambda: kpop(toy, texts),
        lambda: erase(toy, texts, "uce"),
        lambda: KPOP(retain=texts),
        lambda: KPOP(train_keys_for=texts),
        lambda: method_config("uce", retain=texts),
        lambda: World(toy.pipe, retained=texts),
        lambda: World(toy.pipe, styles=texts),
        lambda: World(toy.pipe, train_templates=texts),
        lambda: sample(toy, texts, [0]),
    ]
    for call in calls:
        refused(ValueError, "is one text|is not possible: it is a list of texts", call)


def test_a_generator_is_read_once(toy):
    names = (name for name in ["dog", "fish"])
    assert kpop(toy, names, KPOP(m=2, **SHORT), progress=False).info["concepts"] == ["dog", "fish"]


@pytest.mark.parametrize("seeds", [None, 0, "0", [True], [2**64], [-(2**63) - 1], [0.5]], ids=repr)
def test_impossible_seeds_are_refused(toy, seeds, refused):
    refused(ValueError, r"seeds?=.* is not possible", lambda: sample(toy, ["a dog"], seeds))


def test_more_steps_than_the_schedule_has_are_refused(toy, refused):
    refused(
        ValueError, "sampling steps=1000 .* at most 999", lambda: sample(toy, ["a dog"], [0], num_inference_steps=1000)
    )
    config = KPOP(**SHORT | {"trajectory_steps": 1000})
    refused(ValueError, "sampling steps=1000 .* at most 999", lambda: kpop(toy, ["dog"], config))


@pytest.mark.parametrize("method, name", [("spm", "transport"), ("age", "detached")])
def test_a_switch_is_true_or_false(method, name, refused):
    for value in ("False", "no", 0, None):
        refused(ValueError, f"{name}=.*True or False", lambda value=value: method_config(method, **{name: value}))


@pytest.mark.parametrize("template", [None, ["a {}"], "a picture", "{} {}", "{x}", "a {", "{0}", "}{"], ids=repr)
def test_a_template_without_one_place_for_the_concept_is_refused(toy, template, refused):
    refused(ValueError, "template .* has one {}", lambda: World(toy.pipe, template=template))
    if isinstance(template, str):
        refused(ValueError, "template .* has one {}", lambda: World(toy.pipe, train_templates=[template]))


def test_a_world_without_wordings_or_with_another_precision_is_refused(toy, refused):
    refused(ValueError, "template None", lambda: World(toy.pipe, train_templates=()))
    for precision in (None, "half", "auto", torch.float16):
        refused(ValueError, "unknown precision", lambda precision=precision: World(toy.pipe, precision=precision))


@pytest.mark.parametrize("method", ["kpop-anchor", "ca", "mace"])
def test_an_anchor_needs_a_retained_concept(toy, method, refused):
    for retained in ((), ("dog",)):
        world = World(toy.pipe, retained=retained)
        refused(
            ValueError, "'dog' needs another concept as its anchor", lambda world=world: erase(world, ["dog"], method)
        )
        assert not world.trajectories


@pytest.mark.parametrize("method", ["kpop", "esd-x", "uce", "sld"])
def test_a_style_needs_retained_objects(toy, method, refused):
    world = World(toy.pipe, styles=("dog",))
    refused(ValueError, "'dog' is a style, erased on retained objects", lambda: erase(world, ["dog"], method))


def test_a_retained_word_is_checked_like_an_erased_one(toy):
    with pytest.warns(UserWarning, match="reads 'dgo' as"):
        kpop(toy, ["church"], KPOP(m=2, retain=["dgo"], **SHORT), progress=False)


@pytest.mark.parametrize("model", [None, "toy", [], torch.nn.Linear(2, 2), torch.nn.Module], ids=repr)
def test_what_is_no_model_is_refused_everywhere(toy, erasure, tmp_path, model, refused):
    erasure.save(tmp_path)
    calls = [
        lambda: enter(erasure.applied(model)),
        lambda: erasure.apply(model),
        lambda: erasure.scaled(model, 0.5),
        lambda: erasure.moved(model),
        lambda: enter(augment(model)),
    ]
    if model is not None:
        calls += [lambda: Erasure.load(tmp_path, model), lambda: load_key(next((tmp_path / "keys").iterdir()), model)]
    for call in calls:
        refused(ValueError, "is not a model: accepted are worlds", call)


def test_a_world_and_a_pipeline_are_taken_where_a_unet_is(toy, prompt):
    for model in (toy, toy.pipe, toy.pipe.unet):
        enter(augment(model, "all", prompt))
    enter(unlocked(toy, prompt))


def wrong_keys(prompt):
    long = torch.cat([prompt.k, prompt.k])
    yield "it is a Prompt", ["dog", 3, {}, prompt.k, (prompt.k, prompt.v), False]
    yield "differ in shape", [replace(prompt, v=long), replace(prompt, v=prompt.v[:, :8])]
    flat, none = (Prompt(side, side) for side in (prompt.k[0], prompt.k[:0]))
    yield "dimensions, real numbers", [flat, none, Prompt(prompt.k.long(), prompt.v.long())]
    yield "dimensions, real numbers", [TimedPrompt(prompt.k, prompt.v), PerLayerPrompt(prompt.k, prompt.v)]
    yield "unknown layers", [replace(prompt, layers="x")]
    yield "not finite", [replace(prompt, k=prompt.k * math.nan)]


def test_what_is_no_key_is_refused(toy, prompt, refused):
    for message, keys in wrong_keys(prompt):
        for key in keys:
            for call in (
                lambda key=key: sample(toy, ["a dog"], [0], key=key),
                lambda key=key: enter(unlocked(toy.pipe, key)),
                lambda key=key: enter(augment(toy, "all", key)),
                lambda key=key: kpop(toy, ["dog"], KPOP(m=2, **SHORT), rehearse={"church": key}),
            ):
                refused(ValueError, message, call)
    refused(ValueError, "key is not possible as NoneType", lambda: enter(unlocked(toy.pipe, None)))


def test_other_things_of_the_wrong_kind(toy, erasure, tmp_path, refused):
    for wrong in ("church", tmp_path, [erasure], False):
        refused(ValueError, "erasure is not possible as", lambda wrong=wrong: sample(toy, ["a"], [0], erasure=wrong))
    for wrong in ({"steps": 1}, KPOP, "fast", False, method_config("esd-x")):
        refused(ValueError, "config is not possible as .*KPOP", lambda wrong=wrong: kpop(toy, ["dog"], wrong))
    refused(ValueError, "rehearse is not possible", lambda: kpop(toy, ["dog"], rehearse=["church"]))
    for wrong in (["kpop"], None, KPOP()):
        refused(ValueError, "unknown method", lambda wrong=wrong: erase(toy, ["dog"], wrong, KPOP()))
    refused(ValueError, "is a folder: give the file", lambda: load_key(tmp_path))


def test_a_world_that_is_no_name_and_a_device_that_is_not_there(toy, refused):
    for wrong in (None, 3, toy.pipe, ["emojinette"], b"emojinette"):
        refused(ValueError, f"unknown world of type {type(wrong).__name__}", lambda wrong=wrong: load(wrong))
    for wrong in ("gpu", "meta", "", "cuda:99"):
        refused(ValueError, f"device '{wrong}' is not possible", lambda wrong=wrong: load("emojinette", device=wrong))
    assert str(load("emojinette", device=torch.device("cpu"), precision="fp32").pipe.device) == "cpu"
