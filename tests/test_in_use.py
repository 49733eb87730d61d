"""A model in use: what happens to it, and what else is asked of it, while an erasure is applied or a key is in place."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import SHORT, make_toy
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline

from erasekit.attention import Prompt, augment, one_thread
from erasekit.baselines import erase, method_config
from erasekit.kpop import KPOP, kpop
from erasekit.pipelines.unlocked import unlocked
from erasekit.sampling import sample
from erasekit.world import World


def draw(model, prompt="a church", **how):
    return sample(model, [prompt], [0], num_inference_steps=2, **how)


def test_a_second_erasure_is_refused_and_the_first_comes_off(own, erasure, refused):
    before = own.fingerprint
    public = erasure.apply(own)
    refused(ValueError, "remove the erasure that is applied", lambda: erasure.apply(own))
    public.remove()
    assert own.fingerprint == before


def test_a_model_moved_to_another_precision_meanwhile_comes_back_in_it(own, erasure):
    expected = {name: p.detach().to(torch.bfloat16) for name, p in own.pipe.unet.named_parameters()}
    with erasure.applied(own):
        own.pipe.unet.to(torch.bfloat16)
    found = dict(own.pipe.unet.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def load_lora(unet):
    from peft import LoraConfig

    config = LoraConfig(r=1, target_modules=["to_k", "to_q"], init_lora_weights=False)
    unet.add_adapter(config)


def test_a_lora_loaded_meanwhile_stays_on_the_base(own, erasure):
    before = {name: p.detach().clone() for name, p in own.pipe.unet.named_parameters()}
    with erasure.applied(own):
        load_lora(own.pipe.unet)
    found = {name.replace(".base_layer.", "."): p for name, p in own.pipe.unet.named_parameters()}
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


def test_a_lora_fused_meanwhile_is_refused_until_it_is_taken_off(own, erasure, refused):
    before = {name: p.detach().clone() for name, p in own.pipe.unet.named_parameters()}
    public = erasure.apply(own)
    load_lora(own.pipe.unet)
    own.pipe.unet.fuse_lora()
    refused(RuntimeError, "a LoRA was fused into it meanwhile", public.remove)
    own.pipe.unet.unfuse_lora()
    found = {name.replace(".base_layer.", "."): p for name, p in own.pipe.unet.named_parameters()}
    for name in before.keys() - erasure.delta.keys():  # unfusing rounds
        found[name].data.copy_(before[name])
    public.remove()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


def test_projections_fused_meanwhile_are_refused(own, erasure, refused):
    public = erasure.apply(own)
    own.pipe.unet.fuse_qkv_projections()
    refused(RuntimeError, "projections were fused meanwhile", public.remove)
    own.pipe.unet.unfuse_qkv_projections()
    public.remove()


def test_other_weights_changed_meanwhile_are_refused(own, erasure, refused):
    public = erasure.apply(own)
    own.pipe.unet.conv_out.bias.data += 1
    refused(RuntimeError, r"conv_out\.bias was changed meanwhile", public.remove)
    own.pipe.unet.conv_out.load_state_dict(make_toy(seed=0).pipe.unet.conv_out.state_dict())
    public.remove()


# ------------------------------------------------------------------------------------------------- threads and processes


def in_thread(call):
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_a_second_thread_on_one_unet_is_refused(toy, erasure):
    calls = [lambda: draw(toy), lambda: draw(toy, erasure=erasure), lambda: kpop(toy, ["fish"], KPOP(m=2, **SHORT))]
    for hold in (lambda: augment(toy.pipe.unet), lambda: erasure.applied(toy), lambda: one_thread(toy.pipe.unet)):
        with hold(), one_thread(toy.pipe.unet):
            for call in calls:
                error = in_thread(call)
                assert isinstance(error, RuntimeError) and "has a key, an erasure or a training" in str(error)
    assert isinstance(in_thread(calls[0]), torch.Tensor)


# ------------------------------------------------------------------------------------------------------- a key in place


@pytest.fixture
def key(prompt) -> Prompt:
    """Large tokens, so that a key always shows."""
    return Prompt(8 * prompt.k, 8 * prompt.v)


KEYED = (lambda toy, key: unlocked(toy.pipe, key), lambda toy, key: augment(toy, "all", key))


@pytest.mark.parametrize("hold", KEYED, ids=["unlocked", "augment"])
def test_what_would_draw_with_the_key_unasked_is_refused(toy, key, hold, refused):
    esd = method_config("esd-x", **SHORT)
    calls = [
        lambda: draw(toy),
        lambda: draw(toy.pipe, key=key),
        lambda: kpop(toy, ["dog"], KPOP(m=2, **SHORT)),
        lambda: erase(toy.pipe, ["dog"], "esd-x", esd),
        lambda: World(toy.pipe),
        lambda: unlocked(toy.pipe, key).__enter__(),
    ]
    before = draw(toy)
    with hold(toy, key):
        for call in calls:
            refused(RuntimeError, "a key is in use on this U-Net", call)
    assert torch.equal(draw(toy), before)


@pytest.mark.parametrize("hold", KEYED, ids=["unlocked", "augment"])
def test_a_copy_would_keep_the_key(toy, key, hold, refused):
    with hold(toy, key):
        for call in (copy.deepcopy, pickle.dumps):
            refused(RuntimeError, "cannot be copied or pickled", lambda call=call: call(toy.pipe.unet))
    assert torch.equal(copy.deepcopy(toy.pipe.unet).conv_out.bias, toy.pipe.unet.conv_out.bias)


def test_a_call_from_another_thread_does_not_get_the_key(toy, key):
    with unlocked(toy, key):
        error = in_thread(lambda: toy.pipe("a dog", num_inference_steps=1))
    assert isinstance(error, RuntimeError) and "has a key, an erasure or a training" in str(error)


def img2img(pipe, **options):
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    how = {"num_inference_steps": 2, "strength": 1.0, "output_type": "np"} | options
    images = pipe(["a dog"] * 2, image=image, generator=torch.Generator().manual_seed(0), **how).images
    return torch.from_numpy(images)


def test_another_pipeline_on_the_same_unet_is_refused_where_it_would_be_keyed_wrongly(toy, key, refused):
    """`pipe` has guidance from its latest call; the other has none, and a scheduler of its own."""
    parts = toy.pipe.components | {"scheduler": EulerDiscreteScheduler.from_config(toy.pipe.scheduler.config)}
    other = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    toy.pipe("a dog", num_inference_steps=1, guidance_scale=7.0)

    def call(**options):
        with unlocked(toy.pipe, key):
            img2img(other, guidance_scale=1.0, **options)

    for steps in (2, 1):
        refused(RuntimeError, "another pipeline called it", lambda steps=steps: call(num_inference_steps=steps))


def test_a_pipeline_that_was_never_called_and_a_scheduler_set_inside(own, key):
    other = StableDiffusionImg2ImgPipeline(**own.pipe.components, requires_safety_checker=False)
    with unlocked(other, key):
        other.scheduler = EulerDiscreteScheduler.from_config(own.pipe.scheduler.config)
        keyed = img2img(other)
    assert not torch.allclose(keyed, img2img(other), atol=1e-3)
    assert "step" not in vars(other.scheduler) and "step" not in vars(own.pipe.scheduler)


# ------------------------------------------------------------------------------------- what the weights do not show


@pytest.mark.parametrize("method", ["np", "sld", "spm", "receler"])
def test_adapters_and_guidance_act_in_sample_and_refuse_what_they_would_spoil(toy, erasure, method, refused):
    config = method_config(method, **SHORT if method in ("spm", "receler") else {})
    public = erase(toy, ["church"], method, config, progress=False)
    expected, base = draw(toy, erasure=public), draw(toy)
    calls = [
        lambda: erasure.apply(toy),
        lambda: public.apply(toy),
        lambda: erase(toy, ["dog"], "uce"),
        lambda: kpop(toy, ["dog"], KPOP(m=2, **SHORT)),
        lambda: draw(toy, erasure=public),
    ]
    with public.applied(toy):
        assert torch.equal(draw(toy), expected)
        for call in calls:
            refused(ValueError, "has an adapter or guidance applied", call)
    assert torch.equal(draw(toy), base)


def test_the_distance_from_the_base_is_not_measured_from_the_public_model(toy, erasure, refused):
    with erasure.applied(toy):
        refused(ValueError, "remove the erasure that is applied", lambda: erasure.moved(toy))
