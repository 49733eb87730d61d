"""Other projects' artefacts: what is read, as what, and what is refused by name."""

import json

import pytest
import torch
from conftest import make_toy
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from test_files import REQUEST, STEPS, changed, cross_attention, lora_images, make_pipe, with_unet

from erasekit.artifacts import Erasure
from erasekit.baselines import erase, method_config
from erasekit.pipelines import peers
from erasekit.sampling import sample
from erasekit.tools import hub
from erasekit.world import World


@pytest.fixture(scope="module", params=["1", "2", "XL"])
def pipe(request):
    """Do not change it."""
    return make_pipe(request.param)


def write_theirs(kind: str, pipe, delta, folder):
    """The artefact of another project that makes these changes."""
    path, edited = folder / "theirs.safetensors", with_unet(pipe, delta)
    state = edited.unet.state_dict()
    if kind == "esd":
        save_file(delta, path)
    elif kind == "uce":  # every layer it looked at, changed or not
        same = {name: state[name] for name in state if "attn1.to_k" in name}
        save_file({f"unet.{name}": tensor for name, tensor in (delta | same).items()}, path)
    elif kind == "half":
        save_file({name: tensor.half() for name, tensor in state.items()}, path)
    elif kind == "mace":
        edited.save_pretrained(folder / "mace")
        return folder / "mace"
    elif kind == "unet":
        edited.unet.save_pretrained(folder / "unet")
        return folder / "unet"
    return path


@pytest.mark.parametrize("kind", ["esd", "uce", "half", "mace", "unet"])
def test_edited_weights_are_read(pipe, kind, tmp_path):
    delta = changed(pipe.unet, cross_attention(pipe.unet))
    world = World(pipe, name="toy")
    theirs = peers.read(write_theirs(kind, pipe, delta, tmp_path), world, f"{kind}, theirs", ["church"])
    assert theirs.delta.keys() == delta.keys() and not theirs.keys
    assert all(torch.allclose(t, delta[n], atol=1e-3 if kind == "half" else 0) for n, t in theirs.delta.items())
    assert theirs.info["method"] == f"{kind}, theirs" and theirs.info["concepts"] == ["church"]
    images = sample(pipe, *REQUEST, erasure=theirs, **STEPS)
    if kind != "half":
        assert torch.equal(images, sample(with_unet(pipe, delta), *REQUEST, **STEPS))
    theirs.save(tmp_path / "saved")
    assert Erasure.load(tmp_path / "saved", world).digest() == theirs.digest()
    assert peers.read(tmp_path / "saved", world).digest() == theirs.digest()
    assert "church" in str(hub.card(theirs, "a/b", "base"))


@pytest.mark.parametrize("layout", ["kohya", "kohya with alpha", "peft", "peft folder", "diffusers", "old diffusers"])
def test_loras_are_read(layout, tmp_path):
    """Each gives W + scale * up @ down."""
    pipe = make_pipe("1")
    layers = [name.removesuffix(".weight") for name in cross_attention(pipe.unet)]
    layers += [layer.replace("to_k", "to_out.0") for layer in layers if "to_k" in layer]
    state, generator = pipe.unet.state_dict(), torch.Generator().manual_seed(0)
    tensors, expected, path = {}, {}, tmp_path / "adapter_model.safetensors"
    scale = 0.5 if layout in ("kohya with alpha", "peft folder") else 1.0
    for layer in layers:
        weight = state[f"{layer}.weight"]
        up, down = (torch.randn(s, generator=generator) for s in ((len(weight), 2), (2, weight.shape[1])))
        expected[f"{layer}.weight"] = weight + scale * up @ down
        kohya = "lora_unet_" + layer.replace(".", "_")
        old = layer.replace("attn2.", "attn2.processor.").replace("to_out.0", "to_out") + "_lora"
        a, b = {
            "peft": (f"unet.{layer}.lora_A.weight", f"unet.{layer}.lora_B.weight"),
            "peft folder": (f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"),
            "diffusers": (f"unet.{layer}.lora.down.weight", f"unet.{layer}.lora.up.weight"),
            "old diffusers": (f"unet.{old}.down.weight", f"unet.{old}.up.weight"),
        }.get(layout, (f"{kohya}.lora_down.weight", f"{kohya}.lora_up.weight"))
        tensors |= {a: down, b: up}
        if layout == "kohya with alpha":
            tensors[f"{kohya}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    if layout == "peft folder":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
        path = tmp_path
    delta = peers.read(path, pipe, "spm, theirs").delta
    assert delta.keys() == expected.keys() and all(torch.allclose(t, expected[n], atol=1e-6) for n, t in delta.items())


def test_diffusers_own_lora_with_an_alpha_is_read_as_diffusers_reads_it(tmp_path):
    peft = pytest.importorskip("peft")
    pipe, tuned = make_pipe("1"), make_pipe("1")
    torch.manual_seed(0)
    tuned.unet.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_k", "to_out.0"], init_lora_weights=False)
    )
    config = {"unet": tuned.unet.peft_config["default"]}
    layers = peft.get_peft_model_state_dict(tuned.unet)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config["unet"].to_dict()
    )
    expected = lora_images(pipe, tmp_path)
    ours = sample(pipe, *REQUEST, erasure=peers.read(tmp_path, pipe), **STEPS)
    assert (ours.int() - expected.int()).abs().max() <= 1


def bad_file(name: str, pipe, folder):
    """(path, word of the refusal) of a file that is no erasure of this base."""
    path, unet = folder / "bad.safetensors", pipe.unet
    delta = changed(unet, cross_attention(unet))
    first = next(iter(delta))
    if name == "a pickle":
        torch.save(delta, folder / "esd.pt")
        return folder / "esd.pt", "pickle"
    if name == "a renamed pickle":
        torch.save(delta, path)
        return path, "pickle"
    if name == "a folder of pickles":
        (folder / "bins").mkdir()
        torch.save(delta, folder / "bins" / "diffusion_pytorch_model.bin")
        return folder / "bins", "diffusion_pytorch_model.bin"
    save_file(delta, path)
    content = path.read_bytes()
    if name == "another text encoder":
        encoder = make_pipe("1").text_encoder
        encoder.final_layer_norm.bias.data += 1
        parts = with_unet(pipe, delta)
        parts.text_encoder = encoder
        parts.save_pretrained(folder / "advunlearn")
        return folder / "advunlearn", "text encoder"
    if name == "a text encoder's folder":
        pipe.text_encoder.save_pretrained(folder / "te")
        return folder / "te", "text encoder"
    states = {
        "another base": ({n: torch.zeros(3, 3) for n in delta}, "does not fit this base"),
        "another model": ({"transformer_blocks.0.attn.weight": torch.zeros(2)}, "does not fit this base"),
        "nothing changed": ({n: unet.state_dict()[n] for n in delta}, "changes nothing"),
        "NaN": (delta | {first: delta[first] * torch.nan}, "not finite"),
        "a text encoder": ({"text_model.final_layer_norm.bias": torch.zeros(2)}, "text encoder"),
        "a LoRA of a text encoder": ({"lora_te_text_model_mlp.lora_up.weight": torch.zeros(2, 2)}, "text encoder"),
        "a LoHa": ({"lora_unet_x.hada_w1_a": torch.zeros(2)}, "LoHa"),
        "a LoRA of other layers": (
            {f"lora_unet_x.lora_{s}.weight": torch.zeros(2, 2) for s in ("up", "down")},
            "no layer",
        ),
        "half a LoRA": ({"unet.conv_in.lora_A.weight": torch.zeros(2, 2)}, "lacks a factor"),
        "a textual inversion": ({"emb_params": torch.zeros(2)}, "textual inversion"),
    }
    if name in states:
        save_file(states[name][0], path)
        return path, states[name][1]
    contents = {
        "empty": (b"", "empty"),
        "cut short": (content[: len(content) // 2], "cut short"),
        "cut in its header": (content[:100], "cut short"),
        "a damaged header": (content[:8] + b"{" + b"\xff" * 20 + content[29:], "damaged"),
        "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "a web page": (b"<!DOCTYPE html><html>404</html>", "web page"),
        "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "not a safetensors file"),
    }
    path.write_bytes(contents[name][0])
    return path, contents[name][1]


BAD = (
    "a pickle|a renamed pickle|a folder of pickles|another text encoder|a text encoder's folder|another base|another model|"
    "nothing changed|NaN|a text encoder|a LoRA of a text encoder|a LoHa|a LoRA of other layers|half a LoRA|a textual inversion|"
    "empty|cut short|cut in its header|a damaged header|a pointer|a web page|a picture"
)


@pytest.mark.parametrize("name", BAD.split("|"))
def test_what_is_no_erasure_is_called_what_it_is(name, tmp_path, sentence):
    pipe = make_pipe("1")
    path, word = bad_file(name, pipe, tmp_path)
    with pytest.raises(ValueError, match=word) as error:
        peers.read(path, pipe)
    assert str(path) in sentence(error).replace("\\\\", "\\") and "truncated" not in str(error.value)


def test_a_key_and_a_missing_file(toy, tmp_path, sentence):
    erasure = erase(toy, ["church"], "kpop", method_config("kpop", steps=1, batch_size=2, m=2), progress=False)
    erasure.save(tmp_path)
    assert peers.read(tmp_path, toy).keys.keys() == {"church"}, "an erasure of ours, with its keys"
    with pytest.raises(ValueError, match="load_key") as error:
        peers.read(next((tmp_path / "keys").iterdir()), toy)
    sentence(error)
    with pytest.raises(FileNotFoundError, match="nothing"):
        peers.read(tmp_path / "nothing", toy)


def test_a_bare_unet_is_not_enough_where_the_text_encoder_may_differ(pipe, tmp_path, sentence):
    delta = changed(pipe.unet, cross_attention(pipe.unet))
    assert peers.read(write_theirs("esd", pipe, delta, tmp_path), pipe.unet).delta.keys() == delta.keys()
    with pytest.raises(ValueError, match="text encoder may differ") as error:
        peers.read(write_theirs("mace", pipe, delta, tmp_path), pipe.unet)
    sentence(error)


def test_an_edit_of_another_base_is_suspected(tmp_path):
    pipe = make_pipe("1")
    make_toy(seed=4).pipe.unet.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="from another base"):
        peers.read(tmp_path, pipe)


@pytest.mark.parametrize("kind", ["esd", "half", "mace"])
def test_edits_of_a_base_in_bf16_are_what_was_edited(kind, tmp_path):
    """Rounding is no edit: by way of fp16 it moves some weights by a whole step of bf16."""
    pipe = make_pipe("1")
    delta = changed(pipe.unet, cross_attention(pipe.unet))
    path = write_theirs(kind, pipe, delta, tmp_path)
    rounded = World(pipe.to(torch.bfloat16), "toy")
    theirs = peers.read(path, rounded)
    assert theirs.delta.keys() == delta.keys()
    theirs.save(tmp_path / "saved")
    with Erasure.load(tmp_path / "saved", make_pipe("1")).applied(rounded):
        assert not torch.equal(
            pipe.unet.state_dict()[next(iter(delta))], make_pipe("1").unet.state_dict()[next(iter(delta))]
        )
