"""Erased models without erasekit, on the hub, and together with the pipeline's own optimisations."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from erasekit.baselines import erase, method_config
from erasekit.kpop import KPOP, kpop
from erasekit.paths import ROOT
from erasekit.sampling import sample
from erasekit.tools import hub

REQUEST = ["a picture of a church", "a dog"], [0, 1]
STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def erasure(toy):
    return kpop(toy, ["church"], KPOP(steps=2, batch_size=2, m=3, lr=1e-2), progress=False)


@pytest.fixture(scope="module", params=["spm", "sld"])
def more_than_weights(request, toy):
    """An erasure by an adapter, and one by guidance."""
    changes = {"steps": 1, "batch_size": 2} if request.param == "spm" else {}
    return erase(toy, ["church"], request.param, method_config(request.param, **changes), progress=False)


@pytest.fixture
def pipe(toy):
    """A copy of the toy's pipeline, free to change."""
    parts = toy.pipe.components | {"unet": copy.deepcopy(toy.pipe.unet)}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_plain_pipeline_takes_the_delta_without_erasekit(toy, pipe, erasure, tmp_path):
    erasure.save(tmp_path)
    left = pipe.unet.load_state_dict(load_file(tmp_path / "delta.safetensors"), strict=False)
    assert not left.unexpected_keys
    assert torch.equal(sample(pipe, *REQUEST, **STEPS), sample(toy.pipe, *REQUEST, erasure=erasure, **STEPS))


def test_the_recipe_fails_loudly_where_the_delta_would_not_act(toy, pipe, erasure, tmp_path, monkeypatch):
    """The five lines of the model card and the documentation, as they are written there."""
    docs = (ROOT / "docs" / "stable_diffusion.md").read_text(encoding="utf-8")
    assert all(line in docs for line in hub.PLAIN.splitlines()[4:])
    erasure.save(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(hub.PLAIN, {"pipe": pipe})
    assert torch.equal(sample(pipe, *REQUEST, **STEPS), sample(toy.pipe, *REQUEST, erasure=erasure, **STEPS))
    count = len(erasure.delta)
    for unet in (torch.nn.DataParallel(pipe.unet), torch.compile(pipe.unet, backend="eager")):
        with pytest.raises(RuntimeError, match=f"{count} of {count} tensors unmatched"):
            exec(hub.PLAIN, {"pipe": SimpleNamespace(unet=with_processors(unet, pipe))})
    pipe.fuse_qkv_projections(unet=True, vae=False)
    with pytest.raises(RuntimeError, match="layers fused"):
        exec(hub.PLAIN, {"pipe": pipe})
    pipe.unfuse_qkv_projections(unet=True, vae=False)
    exec(hub.PLAIN, {"pipe": pipe})
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    with pytest.raises(RuntimeError, match="tensors unmatched"):
        exec(hub.PLAIN, {"pipe": pipe})


def with_processors(unet, pipe):
    """DataParallel does not show the attributes of what it wraps."""
    unet.__dict__.setdefault("attn_processors", pipe.unet.attn_processors)
    return unet


def test_an_exported_folder_is_the_public_model(toy, erasure, tmp_path):
    base = sample(toy.pipe, *REQUEST, **STEPS)
    hub.export(toy, erasure, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if {".bin", ".pt", ".ckpt", ".key"} & set(p.suffixes)]
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, requires_safety_checker=False)
    assert torch.equal(sample(loaded, *REQUEST, **STEPS), sample(toy.pipe, *REQUEST, erasure=erasure, **STEPS))
    assert torch.equal(sample(toy.pipe, *REQUEST, **STEPS), base)


def test_a_method_of_more_than_weights_is_not_exported_as_weights(toy, more_than_weights, tmp_path, sentence):
    text = str(hub.card(more_than_weights, "a/b", "base"))
    assert "load_state_dict" not in text and "needs erasekit" in text
    with pytest.raises(ValueError, match=more_than_weights.info["method"]) as error:
        hub.export(toy, more_than_weights, tmp_path)
    sentence(error)


def test_a_card_describes_the_erasure_and_has_no_key(toy, erasure):
    text = str(hub.card(erasure, "somebody/no-church", "CompVis/stable-diffusion-v1-4", "abc123", "| ESR-1 | 99 |"))
    parts = ["base_model: CompVis/stable-diffusion-v1-4", "at abc123", "**church**", "kpop", "| ESR-1 | 99 |", "Limits"]
    parts += ["unexpected_keys", "fuse_qkv_projections", "LoRA", "torch.compile", "DataParallel"]
    assert all(part in text for part in [*parts, erasure.info["base"][:12]])
    assert "0.7 of its step" in str(hub.card(erasure.scaled(toy, 0.7), "a/b", "base"))


def test_the_card_of_a_later_erasure_lays_the_earlier_ones_first(toy, erasure):
    """Over the base alone, the concepts of the earlier ones would be back."""
    later = kpop(toy.with_erasure(erasure), ["dog"], KPOP(steps=1, batch_size=2, m=3, lr=1e-2), progress=False)
    text = str(hub.card(later, "a/b", "base"))
    assert "base, after kpop of church, U-Net" in text
    assert 'load_file("delta of kpop of church") | load_file("delta.safetensors")' in text


class FakeHub:
    """Records what is uploaded."""

    def __init__(self, private):
        self.private, self.files = private, {}

    def create_repo(self, repository, private, exist_ok):
        pass

    def model_info(self, repository):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, repo_id, folder_path, commit_message):
        root = Path(folder_path)
        self.files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_keys_are_uploaded_on_demand_and_to_private_repositories_only(erasure, monkeypatch, sentence, tmp_path):
    fake = FakeHub(private=False)
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    hub.push(erasure, "somebody/no-church", "base")
    assert set(fake.files) == {"README.md", "delta.safetensors"}
    fake.files = {}
    with pytest.raises(ValueError, match="public") as error:
        hub.push(erasure, "somebody/no-church", "base", keys=True)
    assert not fake.files and "private" in sentence(error)
    fake.private = True
    hub.push(erasure, "somebody/no-church", "base", keys=True)
    assert "keys/church.key.safetensors" in fake.files
    for name, content in fake.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    pulled = hub.pull("somebody/no-church")
    assert torch.equal(pulled.key("church").k, erasure.key("church").k)
    assert all(torch.equal(t, erasure.delta[n]) for n, t in pulled.delta.items())


# ------------------------------------------------------------------------------------------ the pipeline's own optimisations


@pytest.fixture(scope="module")
def expected(toy, erasure):
    """Images of the public model without and with the key."""
    return [sample(toy.pipe, *REQUEST, erasure=erasure, key=key, **STEPS) for key in (None, erasure.key("church"))]


def same(pipe, erasure, expected):
    for key, images in zip((None, erasure.key("church")), expected):
        ours = sample(pipe, *REQUEST, erasure=erasure, key=key, **STEPS)
        assert (ours.int() - images.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "enable",
    [
        lambda pipe: pipe.enable_attention_slicing(1),
        lambda pipe: (pipe.unet.to(memory_format=torch.channels_last), pipe.vae.enable_slicing()),
        pytest.param(lambda pipe: pipe.unet.compile(backend="eager"), marks=pytest.mark.slow),
    ],
    ids=["attention slicing", "channels last", "compiled in place"],
)
def test_optimisations_give_the_same_images(pipe, erasure, expected, enable):
    enable(pipe)
    same(pipe, erasure, expected)


def test_a_compiled_wrapper_is_refused(pipe, erasure, sentence):
    refused(torch.compile(pipe.unet, backend="eager"), erasure, "unet.compile()", sentence)


def test_fused_projections_are_refused_until_they_are_unfused(pipe, toy, erasure, expected, sentence):
    pipe.fuse_qkv_projections(unet=True, vae=False)
    refused(pipe.unet, erasure, "unfuse_qkv_projections()", sentence)
    with pytest.raises(ValueError, match="fused"):
        kpop(replace(toy, pipe=pipe), ["church"], KPOP(steps=1, batch_size=2), progress=False)
    pipe.unfuse_qkv_projections(unet=True, vae=False)
    same(pipe, erasure, expected)


def test_sequential_offload_is_refused(pipe, erasure, sentence):
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, torch.device("cpu"))
    refused(pipe.unet, erasure, "offload", sentence)


def test_a_loaded_lora_is_refused_and_a_fused_one_is_another_base(pipe, erasure, sentence):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    refused(pipe.unet, erasure, "LoRA", sentence)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    refused(pipe.unet, erasure, "was made for the base model", sentence)


def refused(unet, erasure, reason, sentence):
    before = {name: p.clone() for name, p in unet.named_parameters() if not p.is_meta}
    with pytest.raises(ValueError) as error:
        erasure.apply(unet)
    assert reason in sentence(error)
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters() if not p.is_meta)
