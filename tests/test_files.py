"""Files for others: text encoders for any transformers, checkpoints in the original layout, LoRAs."""

import copy
import json
import os
import subprocess

import pytest
import torch
from conftest import make_toy, make_v2, reconfigured
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from erasekit.artifacts import Erasure
from erasekit.baselines import erase, method_config
from erasekit.pipelines import files, peers
from erasekit.sampling import sample
from erasekit.tools import hub
from erasekit.world import World

REQUEST, STEPS = (["a picture of a church", "a dog"], [0, 1]), {"num_inference_steps": 2}
OTHER_PYTHON = os.environ.get("ERASEKIT_OTHER_PYTHON")
TEXT_PARTS = ("text_encoder", "text_encoder_2")


def encoder(like, kind=CLIPTextModel, **changes):
    return kind(CLIPTextConfig(**like.config.to_dict() | changes)).eval()


def make_pipe(kind: str):
    """As published: Stable Diffusion 2's encoder and the second of XL are open_clip's, and XL's two differ in width."""
    toy = make_toy(seed=3).pipe
    with torch.random.fork_rng():
        torch.manual_seed(5)
        if kind == "1":
            return toy
        if kind == "2":
            pipe = make_v2(toy)
            pipe.text_encoder = encoder(toy.text_encoder, hidden_act="gelu")
            return pipe
        small = {"hidden_size": 16, "intermediate_size": 32, "eos_token_id": 2}
        large = {
            "hidden_size": 24,
            "intermediate_size": 48,
            "projection_dim": 24,
            "hidden_act": "gelu",
            "eos_token_id": 2,
        }
        changes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "cross_attention_dim": 40}
        changes |= {"projection_class_embeddings_input_dim": 48, "use_linear_projection": True}
        parts = {name: getattr(toy, name) for name in ("vae", "scheduler", "tokenizer")}
        parts |= {"tokenizer_2": toy.tokenizer, "unet": reconfigured(toy.unet, **changes)}
        parts["text_encoder"] = encoder(toy.text_encoder, **small)
        parts["text_encoder_2"] = encoder(toy.text_encoder, CLIPTextModelWithProjection, **large)
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(scope="module", params=["1", "2", "XL"])
def pipe(request):
    """Do not change it."""
    return make_pipe(request.param)


def changed(unet, names, rank=None, seed=0) -> dict[str, torch.Tensor]:
    """The U-Net's tensors of these names with something added, of a low rank for two-dimensional ones if it is given."""
    generator = torch.Generator().manual_seed(seed)
    state = unet.state_dict()
    if rank is None:
        return {n: state[n] + 0.1 * torch.randn(state[n].shape, generator=generator) for n in names}
    flat = {n: state[n].flatten(1) for n in names}
    steps = {
        n: torch.randn(len(w), rank, generator=generator) @ torch.randn(rank, w.shape[1], generator=generator)
        for n, w in flat.items()
    }
    return {n: state[n] + 0.02 * step.view_as(state[n]) for n, step in steps.items()}


def cross_attention(unet) -> list[str]:
    return [name for name in unet.state_dict() if "attn2" in name and name.endswith(("to_k.weight", "to_v.weight"))]


def an_erasure(pipe, delta) -> Erasure:
    world = World(pipe)
    info = {"method": "test", "concepts": ["church"], "base": world.fingerprint, "world": world.name, "config": {}}
    return Erasure(delta, {}, info)


def with_unet(pipe, delta):
    """A copy of the pipeline with these weights in its U-Net."""
    parts = pipe.components | {"unet": copy.deepcopy(pipe.unet)}
    unchecked = {} if "text_encoder_2" in parts else {"requires_safety_checker": False}
    other = type(pipe)(**parts, **unchecked)
    assert not other.unet.load_state_dict(delta, strict=False).unexpected_keys
    other.set_progress_bar_config(disable=True)
    return other


# ------------------------------------------------------------------------------------------------------- diffusers' folder


def test_text_encoders_keep_the_names_of_earlier_transformers(pipe, tmp_path):
    files.save_pipeline(pipe, tmp_path)
    for part in [name for name in TEXT_PARTS if getattr(pipe, name, None)]:
        names = set(load_file(tmp_path / part / "model.safetensors"))
        assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
        assert not [name for name in names if "text_model.text_model." in name]
        tokenizer = tmp_path / part.replace("text_encoder", "tokenizer")
        vocabulary = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
        assert vocabulary == pipe.tokenizer.get_vocab()
        assert (tokenizer / "merges.txt").read_text(encoding="utf-8").startswith("#version")
    loaded = type(pipe).from_pretrained(tmp_path)
    assert torch.equal(sample(loaded, *REQUEST, **STEPS), sample(pipe, *REQUEST, **STEPS))
    assert not list(tmp_path.rglob("*.part"))


def test_a_large_text_encoder_in_several_files_and_a_safety_checker(tmp_path):
    toy = make_toy(seed=3).pipe
    tiny = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = tiny | {"image_size": 8, "patch_size": 4}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=tiny, vision_config=vision, projection_dim=8))
    original, encoder = CLIPTextModel.save_pretrained, toy.text_encoder
    encoder.save_pretrained = lambda folder, **how: original(encoder, folder, **how | {"max_shard_size": "20KB"})
    parts = toy.components | {"safety_checker": checker, "feature_extractor": CLIPImageProcessor()}
    files.save_pipeline(StableDiffusionPipeline(**parts, requires_safety_checker=False), tmp_path)
    assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 1
    loaded = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in encoder.state_dict().items())
    names = load_file(tmp_path / "safety_checker" / "model.safetensors")
    assert [n for n in names if n.startswith("vision_model.vision_model.")]
    loaded = StableDiffusionSafetyChecker.from_pretrained(tmp_path / "safety_checker").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in checker.state_dict().items())


READ_ELSEWHERE = """
import sys
import torch, transformers
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
ids = pipe.tokenizer(["a picture of a church", "Ünknown  WORDS, don't 12!", ""], padding="max_length", truncation=True,
                     max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids
found = {"ids": ids}
for name in ("text_encoder", "text_encoder_2"):
    if getattr(pipe, name, None) is not None:
        with torch.no_grad():
            found[name] = getattr(pipe, name)(ids, output_hidden_states=True).hidden_states[-2]
found["image"] = pipe("a picture of a church", num_inference_steps=2, height=16, width=16, output_type="pt",
                      generator=torch.Generator().manual_seed(0)).images
save_file({name: tensor.contiguous() for name, tensor in found.items()}, sys.argv[2])
print(transformers.__version__)
"""


@pytest.mark.skipif(not OTHER_PYTHON, reason="ERASEKIT_OTHER_PYTHON names no interpreter with another transformers")
def test_another_transformers_reads_the_same(pipe, tmp_path):
    """By hand with transformers 5.5.4 (diffusers 0.42.1) and 4.57.6 (0.39.0): equal bit for bit."""
    files.save_pipeline(pipe, tmp_path / "pipe")
    found = []
    for python in (os.sys.executable, OTHER_PYTHON):
        out = tmp_path / f"{len(found)}.safetensors"
        subprocess.run([python, "-c", READ_ELSEWHERE, tmp_path / "pipe", out], check=True, cwd=tmp_path)
        found.append(load_file(out))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(t.float(), found[1][n].float(), atol=1e-5) for n, t in found[0].items())


# ----------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_bit_for_bit(pipe, tmp_path):
    files.to_single_file(pipe, tmp_path / "one.safetensors")
    pipe.save_pretrained(tmp_path / "folder")
    loaded = type(pipe).from_single_file(
        tmp_path / "one.safetensors", config=str(tmp_path / "folder"), local_files_only=True
    )
    for name in ("unet", "vae", *TEXT_PARTS):
        if getattr(pipe, name, None) is not None:
            ours, theirs = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
            assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert (
            file.metadata()["modelspec.prediction_type"] == "epsilon" or pipe.scheduler.config.prediction_type[0] == "v"
        )


DOWN = {"1": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "XL": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2}
XL_LAYER = "transformer_blocks.9.attn2.to_k.weight"
KNOWN = {
    "1": {
        "down_blocks.2.attentions.1.proj_in.weight": "input_blocks.8.1.proj_in.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
    },
    "XL": {
        f"up_blocks.0.attentions.2.{XL_LAYER}": f"output_blocks.2.1.{XL_LAYER}",
        "add_embedding.linear_2.bias": "label_emb.0.2.bias",
        "down_blocks.1.resnets.0.norm1.weight": "input_blocks.4.0.in_layers.0.weight",
    },
}


@pytest.mark.parametrize("kind", DOWN)
def test_names_at_the_published_depth(kind):
    """All blocks of the published U-Nets and VAE, through diffusers' own converters."""
    up = tuple(name.replace("Down", "Up") for name in reversed(DOWN[kind]))
    xl = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 8, "addition_time_embed_dim": 4}
    xl |= {"transformer_layers_per_block": (1, 2, 10)}
    sizes = {
        "block_out_channels": (8,) * len(up),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 8,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=DOWN[kind], up_block_types=up, **sizes, **xl if kind == "XL" else {}
        )
    names = files.original_unet_names(unet)
    assert len(set(names.values())) == len(names) and KNOWN[kind].items() <= names.items()
    back = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{new}": old for old, new in names.items()}, dict(unet.config)
    )
    assert all(back[name] == name for name in names) and len(back) == len(names)
    with torch.device("meta"):
        vae = type(make_toy(0).pipe.vae)(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4,) * 4,
            layers_per_block=2,
            norm_num_groups=4,
        )
    names = files.original_vae_names(vae)
    tensors = {f"first_stage_model.{new}": torch.full((1,), n) for n, new in enumerate(names.values())}
    back = convert_ldm_vae_checkpoint(tensors, dict(vae.config))
    assert all(int(back[name]) == n for n, name in enumerate(names)) and len(back) == len(names)


def test_an_erased_checkpoint_and_wrong_names(pipe, tmp_path, sentence):
    delta = changed(pipe.unet, cross_attention(pipe.unet))
    hub.export(pipe, an_erasure(pipe, delta), tmp_path / "one.safetensors")
    theirs = peers.read(tmp_path / "one.safetensors", pipe)
    assert theirs.delta.keys() == delta.keys() and all(torch.equal(t, delta[n]) for n, t in theirs.delta.items())
    with pytest.raises(ValueError, match=r"one\.ckpt") as error:
        files.to_single_file(pipe, tmp_path / "one.ckpt")
    sentence(error)


# ------------------------------------------------------------------------------------------------------------------ LoRA


def lora_images(pipe, path):
    other = with_unet(pipe, {})
    other.load_lora_weights(str(path))
    other.fuse_lora()
    other.unload_lora_weights()
    return sample(other, *REQUEST, **STEPS)


@pytest.mark.parametrize("layout", files.LAYOUTS)
def test_a_lora_of_full_rank_draws_what_the_delta_draws(pipe, layout, tmp_path):
    pytest.importorskip("peft")
    names = [n for n, p in pipe.unet.named_parameters() if p.ndim > 1 and ("attentions" in n or "resnets.0.conv1" in n)]
    erasure = an_erasure(pipe, changed(pipe.unet, names))
    error = files.to_lora(erasure, pipe, tmp_path / "lora.safetensors", rank=160, layout=layout)
    assert error < 1e-4
    base, ours = sample(pipe, *REQUEST, **STEPS), sample(pipe, *REQUEST, erasure=erasure, **STEPS)
    theirs = lora_images(pipe, tmp_path / "lora.safetensors")
    assert (ours.int() - base.int()).abs().max() > 4
    assert (ours.int() - theirs.int()).abs().max() <= 2
    back = peers.read(tmp_path / "lora.safetensors", pipe, "lora, ours").delta
    assert back.keys() == erasure.delta.keys()
    assert all(torch.allclose(t, erasure.delta[n], atol=1e-5) for n, t in back.items())


def test_the_error_of_a_lora_is_what_is_missing(tmp_path, sentence):
    pipe = make_pipe("1")
    names, bias = cross_attention(pipe.unet), "conv_in.bias"
    low = an_erasure(pipe, changed(pipe.unet, names, rank=2))
    path = tmp_path / "lora.safetensors"
    assert files.to_lora(low, pipe, path, rank=2) < 1e-4 < files.to_lora(low, pipe, path, rank=1)
    erasure = an_erasure(pipe, changed(pipe.unet, [*names, bias]))
    error = files.to_lora(erasure, pipe, path, rank=4)
    back = peers.read(path, pipe).delta
    state = pipe.unet.state_dict()
    step = {n: t - state[n] for n, t in erasure.delta.items()}
    rest = {n: erasure.delta[n] - back.get(n, state[n]) for n in step}
    norm = [torch.cat([t.flatten() for t in x.values()]).norm().item() for x in (rest, step)]
    assert error == pytest.approx(norm[0] / norm[1], rel=1e-4)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["erasekit"])
    assert about["relative_error"] == error and about["left_out"] == [bias] and about["concepts"] == ["church"]
    for call, word in (
        (lambda: files.to_lora(erasure, pipe, path, rank=0), "rank=0"),
        (lambda: files.to_lora(erasure, pipe, path, rank=4, layout="lycoris"), "kohya"),
        (lambda: files.to_lora(erasure, pipe, tmp_path / "lora.pt", rank=4), "lora.pt"),
        (lambda: files.to_lora(an_erasure(pipe, changed(pipe.unet, [bias])), pipe, path, rank=4), "biases"),
        (lambda: files.to_lora(erasure, make_pipe("2"), path, rank=4), "base"),
    ):
        with pytest.raises(ValueError, match=word) as refusal:
            call()
        sentence(refusal)


def test_what_is_more_than_weights_becomes_no_file(toy, tmp_path, sentence):
    erasure = erase(toy, ["church"], "sld", method_config("sld"), progress=False)
    for call in (
        lambda: files.to_lora(erasure, toy, tmp_path / "x.safetensors", rank=2),
        lambda: hub.export(toy, erasure, tmp_path / "x.safetensors"),
    ):
        with pytest.raises(ValueError, match="'sld' is more than weights") as error:
            call()
        sentence(error)
    assert not list(tmp_path.iterdir())
