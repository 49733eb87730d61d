"""Erased models in other hands: without erasekit, as a whole pipeline, on the hub, and beside what users switch on."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from erasekit import sharing
from erasekit.baselines import erase, settings
from erasekit.kpop import KPOP, kpop
from erasekit.sampling import sample

ASKED = ["a picture of a church", "a dog"], [0, 1]


@pytest.fixture(scope="module")
def erasure(toy):
    return kpop(toy, ["church"], KPOP(steps=2, batch=2, m=3, lr=1e-2), progress=False)


@pytest.fixture
def pipe(toy):
    """A copy of the toy's pipeline, to do with as you like."""
    parts = toy.pipe.components | {"unet": copy.deepcopy(toy.pipe.unet)}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_plain_pipeline_takes_the_delta_without_erasekit(toy, pipe, erasure, tmp_path):
    erasure.save(tmp_path)
    left = pipe.unet.load_state_dict(load_file(tmp_path / "delta.safetensors"), strict=False)
    assert not left.unexpected_keys
    assert torch.equal(sample(pipe, *ASKED, steps=2), sample(toy.pipe, *ASKED, erasure=erasure, steps=2))


def test_an_exported_folder_is_the_public_model(toy, erasure, tmp_path):
    base = sample(toy.pipe, *ASKED, steps=2)
    sharing.export(toy, erasure, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if {".bin", ".pt", ".ckpt", ".key"} & set(p.suffixes)]
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, requires_safety_checker=False)
    assert torch.equal(sample(loaded, *ASKED, steps=2), sample(toy.pipe, *ASKED, erasure=erasure, steps=2))
    assert torch.equal(sample(toy.pipe, *ASKED, steps=2), base)


@pytest.mark.parametrize("method", ["spm", "sld"])
def test_the_card_of_what_is_more_than_weights_does_not_say_that_weights_are_enough(toy, erasure, method):
    short = {"steps": 1, "batch": 2} if method == "spm" else {}
    made = erase(toy, ["church"], method, settings(method, **short), progress=False)
    assert "load_state_dict" not in str(sharing.card(made, "a/b", "base")) and "needs erasekit" in str(
        sharing.card(made, "a/b", "base")
    )
    scaled = erasure.scaled(toy.pipe.unet, 0.7)
    assert "0.7 of its step" in str(sharing.card(scaled, "a/b", "base"))


@pytest.mark.parametrize("method", ["spm", "sld"])
def test_what_is_more_than_weights_is_not_exported(toy, tmp_path, sentence, method):
    short = {"steps": 1, "batch": 2} if method == "spm" else {}
    made = erase(toy, ["church"], method, settings(method, **short), progress=False)
    with pytest.raises(ValueError, match=method) as error:
        sharing.export(toy, made, tmp_path)
    sentence(error)


def test_a_card_says_what_was_done_and_holds_no_key(erasure):
    text = str(sharing.card(erasure, "somebody/no-church", "CompVis/stable-diffusion-v1-4", "abc123", "| ESR-1 | 99 |"))
    for part in (
        "base_model: CompVis/stable-diffusion-v1-4",
        "at abc123",
        "**church**",
        "kpop",
        "| ESR-1 | 99 |",
        "Limits",
    ):
        assert part in text
    assert erasure.info["base"][:12] in text and "key" in text


class Hub:
    """What a hub would be given."""

    def __init__(self, private):
        self.private, self.files = private, {}

    def create_repo(self, repository, private, exist_ok):
        pass

    def model_info(self, repository):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, repo_id, folder_path, commit_message):
        from pathlib import Path

        root = Path(folder_path)
        self.files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_keys_are_uploaded_on_demand_and_to_private_places_only(erasure, monkeypatch, sentence, tmp_path):
    hub = Hub(private=False)
    monkeypatch.setattr(sharing, "HfApi", lambda: hub)
    sharing.push(erasure, "somebody/no-church", "base")
    assert set(hub.files) == {"README.md", "delta.safetensors"}
    hub.files = {}
    with pytest.raises(ValueError, match="public") as error:
        sharing.push(erasure, "somebody/no-church", "base", keys=True)
    assert not hub.files and "private" in sentence(error)
    hub.private = True
    sharing.push(erasure, "somebody/no-church", "base", keys=True)
    assert "keys/church.key.safetensors" in hub.files
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sharing, "snapshot_download", lambda *a, **k: str(tmp_path))
    pulled = sharing.pull("somebody/no-church")
    assert torch.equal(pulled.key("church").k, erasure.key("church").k)
    assert all(torch.equal(t, erasure.delta[n]) for n, t in pulled.delta.items())


# ---------------------------------------------------------------------------------------------- beside what users switch on


def same(pipe, erasure, expected):
    for key, images in expected.items():
        ours = sample(pipe, *ASKED, erasure=erasure, key=erasure.key("church") if key else None, steps=2)
        assert (ours.int() - images.int()).abs().max() <= 1


@pytest.fixture(scope="module")
def expected(toy, erasure):
    keys = {False: None, True: erasure.key("church")}
    return {k: sample(toy.pipe, *ASKED, erasure=erasure, key=key, steps=2) for k, key in keys.items()}


def test_attention_slicing_draws_the_same(pipe, erasure, expected):
    pipe.enable_attention_slicing(1)
    same(pipe, erasure, expected)


def test_channels_last_and_vae_slicing_draw_the_same(pipe, erasure, expected):
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.enable_slicing()
    same(pipe, erasure, expected)


def test_compiled_in_place_it_draws_the_same(pipe, erasure, expected):
    pipe.unet.compile(backend="eager")
    same(pipe, erasure, expected)


def test_a_compiled_wrapper_is_refused(pipe, erasure, sentence):
    refused(torch.compile(pipe.unet, backend="eager"), erasure, "unet.compile()", sentence)


def test_fused_projections_are_refused_and_unfused_are_not(pipe, erasure, expected, sentence):
    pipe.fuse_qkv_projections(unet=True, vae=False)
    refused(pipe.unet, erasure, "unfuse_qkv_projections()", sentence)
    pipe.unfuse_qkv_projections(unet=True, vae=False)
    same(pipe, erasure, expected)


def test_sequential_offload_is_refused(pipe, erasure, sentence):
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, torch.device("cpu"))
    refused(pipe.unet, erasure, "offload", sentence)


def test_a_loaded_lora_is_refused_and_a_fused_one_is_another_base(pipe, toy, erasure, sentence):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    refused(pipe.unet, erasure, "LoRA", sentence)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    refused(pipe.unet, erasure, "was made for the base model", sentence)


def refused(unet, erasure, says, sentence):
    before = {name: p.clone() for name, p in unet.named_parameters() if not p.is_meta}
    with pytest.raises(ValueError) as error:
        erasure.apply(unet)
    assert says in sentence(error)
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters() if not p.is_meta)


def test_training_refuses_it_too(toy, pipe, sentence):
    from dataclasses import replace

    pipe.fuse_qkv_projections(unet=True, vae=False)
    with pytest.raises(ValueError, match="fused") as error:
        kpop(replace(toy, pipe=pipe), ["church"], KPOP(steps=1, batch=2), progress=False)
    sentence(error)
