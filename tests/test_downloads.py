"""Weights that are missing, gated or not a Stable Diffusion: one sentence each; other errors propagate."""

import errno

import httpx
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from erasekit.worlds import judges, load
from erasekit.worlds.hub import fetched


def response(status):
    return httpx.Response(status, request=httpx.Request("GET", "hub"))


@pytest.mark.parametrize(
    "error, expected",
    [
        (GatedRepoError("gated", response=response(403)), "gated"),
        (RepositoryNotFoundError("404", response=response(404)), "renamed or removed"),
        (RevisionNotFoundError("404", response=response(404)), "revision 'v9'"),
        (LocalEntryNotFoundError("offline"), "could not be fetched"),
        (httpx.ConnectError("no route"), "could not be fetched"),
        (OSError("x/y does not appear to have a file named model_index.json."), "it has no model_index.json"),
    ],
)
def test_download_errors_are_one_sentence(error, expected, monkeypatch, sentence):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(FileNotFoundError, match=expected) as refusal, fetched("sd14", "CompVis/sd", "v9"):
        raise error
    assert sentence(refusal) and refusal.value.__cause__ is error
    with pytest.raises(FileNotFoundError, match=expected) as refusal, fetched("sd14", "CompVis/sd", "v9"):
        try:
            raise error
        except Exception as inner:
            raise OSError("diffusers wraps the hub's error") from inner
    sentence(refusal)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a shape mismatch"), torch.OutOfMemoryError("out of memory"), OSError(errno.ENOSPC, "disk full")],
)
def test_other_errors_propagate(error):
    with pytest.raises(type(error)) as raised, fetched("sd14", "CompVis/sd"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("name", ["sd14", "somebody/a-fine-tuned-sd"])
def test_offline_without_weights_is_one_sentence(name, monkeypatch, tmp_path, sentence):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="not on this machine") as error:
        load(name, device="cpu")
    assert name in sentence(error)


@pytest.mark.parametrize("sd", ["1"], indirect=True)
def test_a_folder_without_weights_names_the_missing_file(sd, tmp_path, sentence):
    sd.pipe.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="it has no diffusion_pytorch_model") as error:
        load(str(tmp_path), device="cpu")
    sentence(error)


def test_a_hub_id_is_read_from_the_hub(sd, monkeypatch):
    """Its records lie under its own name. A local pipeline stands in for the hub's answer."""
    requests = []

    def from_pretrained(source, **options):
        requests.append((source, options.get("revision")))
        return sd.pipe

    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda source, **how: {"_class_name": type(sd.pipe).__name__})
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    world = load("somebody/a-fine-tuned-sd", device="cpu", precision="fp32", revision="v2")
    assert requests == [("somebody/a-fine-tuned-sd", "v2")]
    assert world.name == "somebody--a-fine-tuned-sd"


def test_wrong_options_are_refused(sd, sentence, tmp_path):
    for call, accepted in (
        (lambda: load("sd13"), "sd14"),
        (lambda: load(str(tmp_path)), "folder"),
        (lambda: load("emojinette", revision="x"), "revision"),
        (lambda: load("sd14", device="cpu", precision="fp16"), "bf16"),
        (lambda: sd.unsafe_prompts(1), "i2p"),
        (lambda: judges.load_clip("ViT-H", "cpu"), "ViT-B/32"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert accepted in sentence(error)
