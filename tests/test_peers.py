"""Other projects' artefacts: what is read, as what, and what is refused by name."""

import copy
import json

import pytest
import torch
from conftest import make_toy
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from test_files import REQUEST, STEPS, changed, cross_attention, lora_images, make_pipe, with_unet

from erasekit.artifacts import Erasure
from erasekit.baselines import erase, method_config
from erasekit.evaluation.attack_success import untouched
from erasekit.evaluation.attacks import (
    Attack,
    AttackImages,
    add_tokens,
    hard_prompt_search,
    optimize_key,
    placeholder_tokens,
    textual_inversion,
)
from erasekit.pipelines import files, peers
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
    if name == "a checkpoint with another text encoder":
        edited = make_pipe("1")
        edited.text_encoder.final_layer_norm.bias.data += 1
        files.to_single_file(edited, path)
        return path, "another text encoder than the base.*save that as a folder"
    if name == "the base's text encoder":
        pipe.text_encoder.save_pretrained(folder / "te")
        return folder / "te", "changes nothing"
    states = {
        "another base": ({n: torch.zeros(3, 3) for n in delta}, "does not fit this base"),
        "another model": ({"transformer_blocks.0.attn.weight": torch.zeros(2)}, "does not fit this base"),
        "nothing changed": ({n: unet.state_dict()[n] for n in delta}, "changes nothing"),
        "NaN": (delta | {first: delta[first] * torch.nan}, "not finite"),
        "another model's text encoder": (
            {"text_model.final_layer_norm.bias": torch.zeros(2)},
            "does not fit this base",
        ),
        "XL's second text encoder": ({"text_encoder_2.final_layer_norm.bias": torch.zeros(2)}, "has no text_encoder_2"),
        "a LoRA of a text encoder": ({"lora_te_text_model_mlp.lora_up.weight": torch.zeros(2, 2)}, "text encoder"),
        "diffusers' LoRA of a text encoder": (
            {"text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(2, 2)},
            "LoRA of a text encoder",
        ),
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
    "a pickle|a renamed pickle|a folder of pickles|a checkpoint with another text encoder|the base's text encoder|another base|"
    "another model|nothing changed|NaN|another model's text encoder|XL's second text encoder|a LoRA of a text encoder|"
    "diffusers' LoRA of a text encoder|a LoHa|a LoRA of other layers|half a LoRA|a textual inversion|"
    "empty|cut short|cut in its header|a damaged header|a pointer|a web page|a picture"
)


@pytest.mark.parametrize("name", BAD.split("|"))
def test_what_is_no_erasure_is_called_what_it_is(name, tmp_path, sentence):
    pipe = make_pipe("1")
    path, word = bad_file(name, pipe, tmp_path)
    with pytest.raises(ValueError, match=word) as error:
        peers.read(path, pipe)
    named = str(path) in sentence(error).replace("\\\\", "\\") or "text_encoder_2" in str(error.value)
    assert named and "truncated" not in str(error.value)


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
    pipe.text_encoder.save_pretrained(tmp_path / "te")
    for path in (write_theirs("mace", pipe, delta, tmp_path), tmp_path / "te"):
        with pytest.raises(ValueError, match="give the base as a pipeline") as error:
            peers.read(path, pipe.unet)
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


# -------------------------------------------------------------------------------------- text encoders, as AdvUnlearn's


def advunlearn(kind: str, part: str, pipe, folder):
    """The artefact of a changed text encoder, and a pipeline that has it."""
    edited = with_unet(pipe, {})
    encoder = copy.deepcopy(getattr(pipe, part))
    for n, p in enumerate(encoder.parameters()):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
    setattr(edited, part, encoder)
    path, state = folder / "theirs.safetensors", {n: p.detach() for n, p in encoder.named_parameters()}
    if kind == "folder":
        encoder.save_pretrained(folder / part)
        return folder / part, edited
    if kind == "pipeline":
        edited.save_pretrained(folder / "pipe")
        return folder / "pipe", edited
    if kind == "pipeline's part":
        encoder.save_pretrained(folder / "pipe" / part)
        return folder / "pipe", edited
    prefix = {"file of transformers 5": f"{part}.", "file of transformers 4": f"{part}.text_model."}[kind]
    own = {prefix + name: tensor for name, tensor in state.items()}
    ids = {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}
    save_file(own | ids if "4" in kind else {n.removeprefix("text_encoder."): t for n, t in own.items()}, path)
    return path, edited


ENCODERS = [("1", "text_encoder", kind) for kind in ("folder", "pipeline", "pipeline's part", "file of transformers 4")]
ENCODERS += [
    ("2", "text_encoder", "file of transformers 5"),
    ("XL", "text_encoder_2", "folder"),
    ("XL", "text_encoder", "folder"),
]


@pytest.mark.parametrize("family, part, kind", ENCODERS)
def test_a_text_encoder_is_an_erasure(family, part, kind, tmp_path, sentence):
    pipe = make_pipe(family)
    path, edited = advunlearn(kind, part, pipe, tmp_path)
    world, before = World(pipe, name="toy"), {n: t.clone() for n, t in getattr(pipe, part).state_dict().items()}
    plain = sample(pipe, *REQUEST, **STEPS)
    theirs = peers.read(path, world, "advunlearn", ["church"])
    assert (
        all(name.startswith(f"{part}.") for name in theirs.delta)
        and theirs.info["source"]["kind"] in kind + "text encoder"
    )
    expected = sample(edited, *REQUEST, **STEPS)
    assert torch.equal(sample(pipe, *REQUEST, erasure=theirs, **STEPS), expected) and not torch.equal(plain, expected)
    with theirs.applied(pipe):
        assert torch.equal(sample(pipe, *REQUEST, **STEPS), expected)
        with pytest.raises(ValueError, match=f"was made for another {part}: .*remove the erasure") as error:
            theirs.apply(pipe)
        sentence(error)
    after = getattr(pipe, part).state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items()), "bit for bit"
    with pytest.raises(ValueError, match=f"has no {part}, which this erasure changes") as error:
        theirs.apply(pipe.unet)
    sentence(error)


def test_a_text_encoder_goes_wherever_a_delta_does(tmp_path, sentence):
    pipe = make_pipe("1")
    path, edited = advunlearn("folder", "text_encoder", pipe, tmp_path)
    world = World(pipe, name="toy")
    theirs, expected = peers.read(path, world, "advunlearn", ["church"]), sample(edited, *REQUEST, **STEPS)
    theirs.save(tmp_path / "saved")
    loaded = Erasure.load(tmp_path / "saved", world)
    assert loaded.digest() == theirs.digest() and "erasekit to act" in str(hub.card(loaded, "a/b", "base"))
    with pytest.raises(ValueError, match="was made for another text_encoder") as error:
        Erasure.load(tmp_path / "saved", edited)
    sentence(error)
    effect = loaded.effect(world, num_inference_steps=2)
    assert 0 < effect["moved"] < 1 and not torch.equal(*effect["images"])
    base = loaded.scaled(pipe, 0.0).delta
    assert all(
        torch.equal(t, pipe.text_encoder.get_parameter(n.removeprefix("text_encoder."))) for n, t in base.items()
    )
    later = world.with_erasure(loaded)
    assert torch.equal(sample(later, *REQUEST, **STEPS), expected) and later.pipe.text_encoder is not pipe.text_encoder
    hub.export(pipe, loaded, tmp_path / "out")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert torch.equal(sample(again, *REQUEST, **STEPS), expected)
    hub.export(pipe, loaded, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="text_encoder is changed") as error:
        files.to_lora(loaded, pipe, tmp_path / "lora.safetensors", 4)
    sentence(error)
    rounded = pipe.to(torch.bfloat16)
    assert not torch.equal(sample(rounded, *REQUEST, erasure=loaded, **STEPS), sample(rounded, *REQUEST, **STEPS))


def test_both_networks_at_once(tmp_path):
    pipe = make_pipe("1")
    _, edited = advunlearn("pipeline", "text_encoder", pipe, tmp_path)
    delta = changed(pipe.unet, cross_attention(pipe.unet))
    both = with_unet(edited, delta)
    both.save_pretrained(tmp_path / "both")
    theirs = peers.read(tmp_path / "both", pipe)
    assert set(delta) < set(theirs.delta) and any(name.startswith("text_encoder.") for name in theirs.delta)
    assert torch.equal(sample(pipe, *REQUEST, erasure=theirs, **STEPS), sample(both, *REQUEST, **STEPS))


@pytest.mark.parametrize("search", [optimize_key, textual_inversion, hard_prompt_search])
def test_attacks_see_the_public_text_encoder(toy, search, tmp_path):
    """An attack on the erasure finds what it finds on a pipeline with the same text encoder."""
    path, edited = advunlearn("folder", "text_encoder", toy.pipe, tmp_path)
    theirs = peers.read(path, toy.pipe, concepts=["church"])
    images = AttackImages(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), ["a church"] * 2)
    attack = Attack(budgets=(1,), m=2, batch_size=2)
    other = World(edited, "toy")
    pairs = (toy, theirs), (other, untouched(other))
    found, expected = (search(world, erasure, "church", images, attack)[1] for world, erasure in pairs)
    if search is optimize_key:
        assert torch.equal(found.k, expected.k) and torch.equal(found.v, expected.v)
    else:
        assert torch.equal(found, expected)
        with add_tokens(toy.pipe, found):
            drawn = sample(toy.pipe, [placeholder_tokens(2)], [0], erasure=theirs, **STEPS)
        with add_tokens(edited, found):
            assert torch.equal(drawn, sample(edited, [placeholder_tokens(2)], [0], **STEPS))
