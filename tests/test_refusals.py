"""A number is never false in silence: each kind of impossible input is refused in one sentence, or comes back right."""

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SHORT, reconfigured
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from erasekit.artifacts import Erasure, key_path, load_key
from erasekit.baselines import METHODS, erase, method_config
from erasekit.baselines.masks import concept_positions
from erasekit.baselines.sld import SLD
from erasekit.conditioning import encode
from erasekit.kpop import KPOP, kpop
from erasekit.provenance import fingerprint
from erasekit.sampling import sample, scheduler_for
from erasekit.world import World, as_world
from erasekit.worlds.distributed import rank_and_count
from erasekit.worlds.emojinette.networks import make_scheduler


def draw(model, prompt="a church", **how):
    return sample(model, [prompt], [0], num_inference_steps=2, **how)


# ------------------------------------------------------------------------------------------------------------- one handle


@pytest.mark.parametrize("method", ["kpop", "esd-x", "uce", "np"])
def test_a_pipeline_is_taken_where_a_world_is(toy, method):
    short = SHORT if method in ("kpop", "esd-x") else {}
    by_pipe, by_world = (
        erase(model, ["church"], method, method_config(method, **short), progress=False) for model in (toy.pipe, toy)
    )
    assert by_pipe.digest() == by_world.digest()
    assert torch.equal(draw(toy.pipe, erasure=by_pipe), draw(toy, erasure=by_world))
    assert World(toy.pipe, template="a photo of a {}").prompt("dog") == "a photo of a dog"


def test_what_is_no_model_is_refused(toy, refused):
    refused(ValueError, "str is not a model", lambda: as_world("toy"))
    refused(ValueError, "str is not a model", lambda: kpop("toy", ["church"]))
    refused(ValueError, "has no unet", lambda: draw(SimpleNamespace(vae=None)))


# ----------------------------------------------------------------------------------------------------------------- numbers


def test_a_weight_that_is_not_finite_stops_sampling_by_name(own, refused):
    own.pipe.unet.conv_out.bias.data[0] = math.nan
    refused(FloatingPointError, "latents of 'a church' are not finite from step 1 of 2", lambda: draw(own))


def test_an_image_that_is_not_finite_stops_sampling(own, refused):
    own.pipe.vae.decoder.conv_out.bias.data[0] = math.inf
    refused(FloatingPointError, "VAE's images are not finite", lambda: draw(own))


def test_a_key_or_delta_that_is_not_finite_is_not_used_saved_or_loaded(toy, erasure, tmp_path, refused, monkeypatch):
    key = erasure.keys["church"]
    broken = replace(key, k=key.k * math.nan)
    refused(ValueError, "prompt is not finite", lambda: draw(toy, key=broken))
    name = next(iter(erasure.delta))
    bad = {"delta": Erasure(erasure.delta | {name: erasure.delta[name] * math.inf}, {}, erasure.info)}
    bad["key"] = Erasure(erasure.delta, {"church": broken}, erasure.info)
    refused(ValueError, f"this erasure is not finite: {name}", lambda: bad["delta"].apply(toy))
    for each in bad.values():
        refused(ValueError, "is not finite", lambda each=each: each.save(tmp_path / "refused"))
        assert not list((tmp_path / "refused").rglob("*.safetensors"))
    monkeypatch.setattr("erasekit.artifacts.check_finite", lambda *_: None)
    for kind, each in bad.items():
        each.save(tmp_path / kind)
    monkeypatch.undo()
    for kind in bad:
        refused(ValueError, "is not finite", lambda kind=kind: Erasure.load(tmp_path / kind))


IMPOSSIBLE = [
    ("kpop", "lr", (0, -1e-4, math.inf, math.nan, "fast")),
    ("kpop", "lam", (-1, math.nan)),
    ("kpop", "eta", (-5, math.inf)),
    ("kpop", "retain_weight", (-1,)),
    ("kpop", "prompt_lr", (0,)),
    ("kpop", "steps", (0, 1.5, True)),
    ("kpop", "batch_size", (0, -1)),
    ("kpop", "m", (0,)),
    ("kpop", "seed", (0.5, "0")),
    ("uce", "alpha", (math.nan,)),
    ("rece", "rho", (0,)),
    ("sld", "sampling_steps", (0,)),
    ("eap", "temperature", (0,)),
    ("receler", "inner_lr", (math.inf,)),
    ("mace", "mask_threshold", (math.nan,)),
]


@pytest.mark.parametrize("method, name, values", IMPOSSIBLE)
def test_impossible_numbers_of_every_config_are_refused(toy, method, name, values, refused):
    for value in values:
        refused(ValueError, f"{name}=.* is not possible", lambda value=value: method_config(method, **{name: value}))
    assert all(method_config(other) for other in METHODS)
    refused(ValueError, "sampling_steps=0", lambda: erase(toy, ["dog"], "sld", SLD(sampling_steps=0)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seeds": [0.5]}, "seed=0.5 is not possible: it is a whole number"),
        ({"seeds": ["1"]}, "seed='1'"),
        ({"sampler": "euler"}, "unknown sampler 'euler': accepted are ddim, dpm-solver"),
    ],
)
def test_impossible_numbers_of_sampling_are_refused(toy, changes, message, refused):
    refused(ValueError, message, lambda: sample(toy.pipe, **{"prompts": ["a dog"], "seeds": [0]} | changes))


def test_an_impossible_scale_is_refused(toy, erasure, refused):
    refused(ValueError, "scale=nan", lambda: erasure.scaled(toy, math.nan))


# ------------------------------------------------------------------------------------------------------- what is hashed


def test_pools_follow_a_changed_text_encoder(own):
    kpop(own, ["church"], KPOP(m=2, **SHORT), progress=False)
    count, before = len(own.trajectories), own.pipeline_hash
    assert own.pipeline_hash == before
    next(own.pipe.text_encoder.parameters()).data += 1
    assert own.pipeline_hash != before
    kpop(own, ["church"], KPOP(m=2, **SHORT), progress=False)
    assert len(own.trajectories) == 2 * count


def with_scheduler(pipe, kind, **changes):
    """Swap a pipeline's scheduler for another with the toy's noise schedule, as users do."""
    pipe.scheduler = kind.from_config(dict(make_scheduler().config) | changes)


def test_files_name_every_part_and_warn_of_another(erasure, own, tmp_path):
    erasure.save(tmp_path)
    assert set(erasure.info["components"]) == {"text_encoder", "vae", "scheduler"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Erasure.load(tmp_path, own)
        with_scheduler(own.pipe, EulerDiscreteScheduler, timestep_spacing="trailing")  # solvers are free
        Erasure.load(tmp_path, own)
    with_scheduler(own.pipe, DDIMScheduler, beta_end=0.02)
    with pytest.warns(UserWarning, match="made beside another noise schedule"):
        Erasure.load(tmp_path, own)
    with_scheduler(own.pipe, DDIMScheduler)
    next(own.pipe.text_encoder.parameters()).data += 1
    for load in (lambda: Erasure.load(tmp_path, own), lambda: load_key(key_path(tmp_path, "dog"), own)):
        with pytest.warns(UserWarning, match="made beside another text_encoder"):
            load()


# ----------------------------------------------------------------------------------------------------------------- texts


def test_a_prompt_longer_than_the_context_is_named(toy):
    with pytest.warns(UserWarning, match=r"is 2\d tokens, this model reads 24: '(dog ?)+' is cut off"):
        encode(toy.pipe, [" ".join(["dog"] * 26)])


def test_concepts_that_are_equal_after_the_cut_or_not_written_alike_are_refused(toy, refused):
    long = " ".join(["dog"] * 30)
    cases = (["dog", "Dog"], [f"{long} church", f"{long} fish"])
    for concepts in cases:
        refused(ValueError, "are the same to this model", lambda concepts=concepts: erase(toy, concepts, "kpop"))
    refused(ValueError, "'dog' is to be erased and 'Dog' retained", lambda: kpop(toy, ["dog"], KPOP(retain=["Dog"])))


@pytest.mark.parametrize("method", ["np", "sld"])
def test_more_concepts_than_one_text_holds_are_refused(toy, method, refused):
    names = [("church", "dog", "fish")[n // 9] + " dog" * (n % 9) for n in range(27)]
    refused(ValueError, r"\d+ of 27 fit its 24 tokens", lambda: erase(toy, names[::-1], method))


def test_a_word_the_tokeniser_splits_is_named(toy):
    with pytest.warns(UserWarning, match="reads 'dgo' as 'd-g-o': is it spelled right"):
        World.check_names(toy, ["dgo"])


def test_words_of_several_vectors_are_expanded(own):
    tokenizer, encoder = own.pipe.tokenizer, own.pipe.text_encoder
    tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2"])
    encoder.resize_token_embeddings(len(tokenizer))
    assert concept_positions(own.pipe, "a picture of a <cat>", "<cat>") == [5, 6, 7]
    assert len(own.concept_tokens("<cat>")) == 3


# --------------------------------------------------------------------------------------------------- methods and their names


@pytest.mark.parametrize(
    "method, config, message",
    [
        ("kpop-anchor", KPOP(), "target='neutral' is not 'kpop-anchor', which has 'anchor'"),
        ("esd-u", method_config("esd-x"), "train_method='xattn' is not 'esd-u'"),
        ("kpop-adversarial", KPOP(), "prompted_target='concept'"),
    ],
)
def test_settings_that_contradict_the_method_are_refused(toy, method, config, message, refused):
    refused(ValueError, message, lambda: erase(toy, ["dog"], method, config))


# ---------------------------------------------------------------------------------------------------- effect, and its lack


def test_effect_has_the_distance_and_a_pair_of_images(toy, erasure):
    found = erasure.effect(toy, num_inference_steps=2)
    assert 0 < found["moved"] == erasure.info["moved"] < 1 and found["images"].shape == (2, 3, 16, 16)
    assert (found["difference"] == 0) == torch.equal(*found["images"])
    assert erase(toy, ["dog"], "np").effect(toy, num_inference_steps=2)["moved"] is None


def test_an_erasure_that_moves_nothing_is_named_when_saved(toy, erasure, tmp_path):
    base = dict(toy.pipe.unet.named_parameters())
    still = Erasure({name: base[name].detach().clone() for name in erasure.delta}, {}, erasure.info)
    still.info = erasure.info | {"moved": still.moved(toy)}
    with pytest.warns(UserWarning, match="changes nothing"):
        still.save(tmp_path)


# ------------------------------------------------------------------------------------------------------------------ chains


def test_a_chained_erasure_names_the_chain(toy, erasure, refused):
    later = toy.with_erasure(erasure)
    second = kpop(later, ["fish"], KPOP(m=2, **SHORT), progress=False)
    [link] = second.info["chain"]
    assert link == {
        "method": "kpop",
        "concepts": ["church", "dog"],
        "base": toy.fingerprint,
        "digest": erasure.digest(),
    }
    assert "chain" not in erasure.info
    refused(ValueError, r"\(toy after kpop of church, dog\)", lambda: second.apply(toy))


# --------------------------------------------------------------------------------------------------------- other pipelines


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler with prediction type None"),
        (DDIMScheduler(prediction_type="sample"), "prediction type 'sample'"),
    ],
)
def test_a_scheduler_that_ddim_cannot_honour_is_refused(toy, scheduler, message, refused):
    pipe = type(toy.pipe)(**toy.pipe.components | {"scheduler": scheduler}, requires_safety_checker=False)
    for call in (lambda: draw(pipe), lambda: erase(pipe, ["dog"], "uce"), lambda: World(pipe)):
        refused(ValueError, message, call)


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, LCMScheduler, TCDScheduler, EulerDiscreteScheduler])
def test_sampling_takes_the_noise_schedule_of_any_scheduler(own, kind):
    """Its class's own defaults too, which are not DDIM's: they were Stable Diffusion's betas, and became others."""
    given = {} if kind is not EulerDiscreteScheduler else {"beta_start": 0.00085, "beta_schedule": "scaled_linear"}
    own.pipe.scheduler = kind(**given)
    assert torch.allclose(scheduler_for(own.pipe).alphas_cumprod, own.pipe.scheduler.alphas_cumprod)
    images = draw(own)
    own.pipe.scheduler = DDIMScheduler(
        **{n: own.pipe.scheduler.config[n] for n in ("beta_start", "beta_end", "beta_schedule")}
    )
    assert torch.equal(images, draw(own))
    own.pipe.scheduler = CogVideoXDDIMScheduler()
    with pytest.raises(ValueError, match="no noise schedule that DDIM can follow"):
        draw(own)


def test_ddim_beside_a_scheduler_of_another_kind_is_named(own):
    plain = draw(own.pipe)
    with_scheduler(own.pipe, EulerDiscreteScheduler)
    with pytest.warns(UserWarning, match="^drawn by DDIM, not by EulerDiscreteScheduler: say sampler='ddim'"):
        assert torch.equal(draw(own.pipe), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(draw(own.pipe, sampler="ddim"), plain) and torch.equal(draw(own), plain)


def test_an_ip_adapter_or_an_inpainting_unet_is_refused(own, toy, refused):
    own.pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    for call in (lambda: draw(own), lambda: erase(own, ["dog"], "uce")):
        refused(ValueError, "has an IP-Adapter loaded", call)
    unet = reconfigured(toy.pipe.unet, in_channels=9)
    pipe = type(toy.pipe)(**toy.pipe.components | {"unet": unet}, requires_safety_checker=False)
    refused(ValueError, "takes 9 channels", lambda: draw(pipe))


@pytest.mark.parametrize("method", ["np", "sld", "spm"])
def test_guidance_is_refused_in_a_pipelines_own_call(toy, method, refused):
    erasure = erase(toy, ["dog"], method, method_config(method, **SHORT if method == "spm" else {}), progress=False)
    expected = draw(toy, erasure=erasure)
    with erasure.applied(toy.pipe):
        refused(
            RuntimeError, f"'{method}' erases by guidance.*ek.sample", lambda: toy.pipe("a dog", num_inference_steps=1)
        )
    toy.pipe("a dog", num_inference_steps=1)
    assert torch.equal(draw(toy, erasure=erasure), expected)


def test_only_a_launchers_world_size_counts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rank_and_count() == (0, 1)


def test_the_base_is_the_same_after_all(toy, trained):
    assert fingerprint(toy.pipe.unet) == trained.info["base"]
