"""Public delta and private keys: exact to apply and remove, safe on disk, refused where they do not belong."""

import errno
import hashlib
import os
import subprocess

import pytest
import torch
from conftest import make_toy
from safetensors.torch import load_file

from erasekit import artifacts, checkpoints, paths
from erasekit.artifacts import Erasure, key_path, load_key
from erasekit.baselines import erase
from erasekit.checkpoints import read_tensors, write_tensors
from erasekit.kpop import KPOP, kpop
from erasekit.pipelines.unlocked import unlocked
from erasekit.provenance import fingerprint
from erasekit.sampling import sample
from erasekit.world import World

SHORT = {"steps": 2, "batch_size": 2, "m": 3, "lr": 1e-2, "num_trajectories": 1, "trajectory_steps": 5}


@pytest.fixture(scope="module")
def trained(toy):
    return kpop(toy, ["church", "dog"], KPOP(layers="mid+up", **SHORT), progress=False)


@pytest.fixture
def erasure(trained):
    """One that the test may change."""
    return Erasure(dict(trained.delta), dict(trained.keys), dict(trained.info))


@pytest.fixture
def folder(erasure, tmp_path):
    erasure.save(tmp_path / "out")
    return tmp_path / "out"


def weights(unet):
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def images(model, **kwargs):
    return sample(model, ["a picture of a church"] * 2, [0, 1], num_inference_steps=3, **kwargs)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------- apply, remove


def test_apply_and_remove_are_exact(unet, erasure):
    before, storage = weights(unet), {name: p.data_ptr() for name, p in unet.named_parameters()}
    applied = erasure.apply(unet)
    assert same(weights(unet), before | erasure.delta) and not same(weights(unet), before)
    applied.remove()
    assert same(weights(unet), before)
    assert {name: p.data_ptr() for name, p in unet.named_parameters()} == storage
    with pytest.raises(RuntimeError, match="not applied any more"):
        applied.remove()


def test_a_world_a_pipeline_and_a_unet_are_all_accepted(toy, erasure):
    before = fingerprint(toy.pipe.unet)
    found = set()
    for model in (toy, toy.pipe, toy.pipe.unet):
        with erasure.applied(model):
            found.add(toy.fingerprint)
    assert len(found) == 1 and before not in found and toy.fingerprint == before


def test_the_base_is_restored_after_an_exception_and_the_delta_kept(unet, erasure):
    before, delta = weights(unet), {name: tensor.clone() for name, tensor in erasure.delta.items()}
    with pytest.raises(KeyboardInterrupt), erasure.applied(unet):
        for name in erasure.delta:
            unet.get_parameter(name).data.add_(1)
        raise KeyboardInterrupt
    assert same(weights(unet), before)
    assert same(erasure.delta, delta)


def test_a_half_precision_base_is_the_same_base(unet, erasure):
    unet.half()
    before = weights(unet)
    with erasure.applied(unet):
        assert {p.dtype for p in unet.parameters()} == {torch.float16}
    assert same(weights(unet), before)


def test_a_second_erasure_is_refused_while_one_is_applied(unet, erasure, trained, sentence):
    before = weights(unet)
    for second in (erasure, Erasure(trained.delta, {}, trained.info)):
        with erasure.applied(unet), pytest.raises(ValueError, match="remove the erasure that is applied") as error:
            second.apply(unet)
        sentence(error)
    assert same(weights(unet), before)


def test_a_change_too_small_for_the_fingerprint_does_not_lose_the_base(unet, erasure):
    before = weights(unet)
    erasure.delta = {name: before[name] + 1e-9 for name in erasure.delta}
    with erasure.applied(unet), erasure.applied(unet):
        pass
    assert same(weights(unet), before)


@pytest.mark.parametrize("name, tensor", [("nowhere.weight", torch.ones(2)), ("conv_out.bias", torch.ones(3))])
def test_an_unknown_tensor_or_shape_is_refused(unet, erasure, name, tensor, sentence):
    before = weights(unet)
    erasure.delta[name] = tensor
    with pytest.raises(ValueError, match=f"does not fit this model: 1 tensors differ, first {name}") as error:
        erasure.apply(unet)
    sentence(error)
    assert same(weights(unet), before)


def test_the_fingerprint_depends_on_every_weight_but_not_on_precision(unet):
    before = fingerprint(unet)
    assert fingerprint(unet.half()) == before
    unet.conv_out.bias.data[0] += 0.01
    assert fingerprint(unet) != before


def test_fingerprints_are_those_of_early_files():
    """Deltas and keys name their base by these."""
    network = torch.nn.ParameterDict({"a": torch.tensor([1.0, 1 / 3]), "b": torch.tensor(2.0)})
    assert fingerprint(network) == hashlib.sha256(b"a\x00<U5b\x00@").hexdigest()
    coarse = fingerprint(network, torch.bfloat16)
    assert coarse != fingerprint(network) and coarse == fingerprint(network.bfloat16())


# ---------------------------------------------------------------------------------------------------------- bases in bf16


@pytest.fixture(params=["fp32", "fp16"])
def rounded(request, toy):
    """A pipeline of the toy's networks in bf16, by way of fp16 or not, and a world of the networks as they were before."""
    other = {"fp32": torch.float32, "fp16": torch.float16}[request.param]
    pipes = [make_toy(seed=0).pipe.to(other) for _ in range(2)]
    return pipes[0].to(torch.bfloat16), World(pipes[1].to(torch.float32), "toy")


def test_files_are_those_of_their_base_in_bf16(rounded, tmp_path, recwarn):
    """All networks are rounded: nothing is warned of."""
    pipe, base = rounded
    erasure = kpop(base, ["church", "dog"], KPOP(**SHORT), progress=False)
    erasure.save(tmp_path)
    recwarn.clear()
    loaded, before = Erasure.load(tmp_path, pipe), weights(pipe.unet)
    key, _ = load_key(key_path(tmp_path, "church"), pipe)
    plain = images(pipe)
    with loaded.applied(pipe):
        assert all(
            torch.equal(p, loaded.delta[n].bfloat16()) for n, p in pipe.unet.named_parameters() if n in loaded.delta
        )
        with pytest.raises(ValueError, match="remove the erasure"):
            loaded.apply(pipe)
        with unlocked(pipe, key):
            pipe("a picture of a church", num_inference_steps=1)
    assert same(weights(pipe.unet), before) and torch.equal(images(pipe), plain)
    assert not torch.equal(images(pipe, erasure=loaded), images(pipe, erasure=loaded, key=key))
    assert loaded.scaled(pipe, 0.5).delta.keys() == erasure.delta.keys() and 0 < loaded.moved(pipe) < 1
    assert not [w for w in recwarn if "beside another" in str(w.message)]


def test_an_erasure_of_a_bf16_base_is_one_of_the_base(rounded, tmp_path):
    pipe, base = rounded
    erasure = erase(pipe, ["church"], "uce")
    erasure.save(tmp_path)
    with Erasure.load(tmp_path, base).applied(base) as public:
        assert public.originals.keys() == erasure.delta.keys()
    with pytest.raises(ValueError, match="was made for the base model"):
        erasure.apply(make_toy(seed=1))


@pytest.mark.parametrize("of", ["another base", "an early version"])
def test_another_base_in_bf16_is_refused(of, folder, erasure, sentence):
    pipe = make_toy(seed=1 if of == "another base" else 0).pipe.to(torch.bfloat16)
    if of == "an early version":
        del erasure.info["bf16"]
    with pytest.raises(ValueError, match=r"\.to\(torch.bfloat16\)" if "bf16" in erasure.info else "older") as error:
        erasure.apply(pipe)
    sentence(error)


def test_another_text_encoder_in_bf16_is_warned_of(erasure):
    pipe = make_toy(seed=0).pipe.to(torch.bfloat16)
    pipe.text_encoder.get_input_embeddings().weight.data[0, 0] += 1
    with pytest.warns(UserWarning, match="beside another text_encoder:"), erasure.applied(pipe):
        pass


# -------------------------------------------------------------------------------------------------------------- save, load


def test_what_is_loaded_is_what_was_saved(erasure, folder, toy):
    loaded = Erasure.load(folder, toy)
    assert same(loaded.delta, erasure.delta)
    assert loaded.keys.keys() == erasure.keys.keys()
    for concept, prompt in loaded.keys.items():
        expected = erasure.keys[concept]
        assert torch.equal(prompt.k, expected.k) and torch.equal(prompt.v, expected.v)
        assert prompt.layers == expected.layers == "mid+up"
    assert loaded.info == erasure.info | {"kind": "delta"} and loaded.digest() == erasure.digest()
    key = erasure.key("church")
    with erasure.applied(toy):
        expected = images(toy), images(toy, key=key)
    with loaded.applied(toy):
        found = images(toy), images(toy, key=loaded.key("church"))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not torch.equal(*expected)


def test_a_key_of_the_first_format_is_read(toy, tmp_path):
    meta = {"kind": "key", "concept": "church", "base": toy.fingerprint, "world": "toy", "config": {"place": "mid"}}
    write_tensors(tmp_path / "old.key.safetensors", {"p_k": torch.ones(2, 32), "p_v": torch.zeros(2, 32)}, meta)
    prompt, _ = load_key(tmp_path / "old.key.safetensors", toy)
    assert (prompt.layers, prompt.mechanism, prompt.log_weight) == ("mid", "shared", 0.0)


def test_another_erasures_key_is_not_left_beside_a_new_delta(erasure, folder, sentence):
    before = contents(folder)
    with pytest.raises(ValueError, match=r"a key of another erasure, church\.key") as error:
        Erasure(erasure.delta, {"dog": erasure.keys["church"]}, erasure.info).save(folder)
    sentence(error)
    assert contents(folder) == before


def test_a_key_of_another_training_is_refused(erasure, folder, tmp_path, sentence):
    Erasure({name: tensor + 1 for name, tensor in erasure.delta.items()}, {}, erasure.info).save(tmp_path / "new")
    (folder / "delta.safetensors").write_bytes((tmp_path / "new" / "delta.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"church\.key\.safetensors is the key of another training") as error:
        Erasure.load(folder)
    sentence(error)


def test_the_delta_is_written_last(erasure, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(artifacts, "write_tensors", lambda path, *_, **__: written.append(path.name))
    erasure.save(tmp_path)
    assert len(written) == 1 + len(erasure.keys) and written[-1] == "delta.safetensors"


def test_files_describe_themselves(folder, toy):
    for path, kind in ((folder / "delta.safetensors", "delta"), (key_path(folder, "dog"), "key")):
        _, meta = read_tensors(path)
        assert meta["kind"] == kind and meta["world"] == "toy" and meta["base"] == toy.fingerprint
        assert meta["config"]["m"] == 3 and meta["seed"] == 0 and "torch" in meta["provenance"]["versions"]
    assert meta["concept"] == "dog" and meta["layers"] == "mid+up"


def test_the_delta_contains_no_key(erasure, folder):
    tensors = load_file(folder / "delta.safetensors")
    assert tensors.keys() == erasure.delta.keys()
    assert not {tuple(t.shape) for t in tensors.values()} & {tuple(p.k.shape) for p in erasure.keys.values()}


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_only_the_owner_may_read_keys_and_everybody_the_delta(erasure, tmp_path, umask):
    before = os.umask(umask)
    try:
        erasure.save(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors")}
    private = dict.fromkeys(["church.key.safetensors", "dog.key.safetensors"], 0o600)
    assert modes == private | {"delta.safetensors": 0o666 & ~umask}


def test_a_key_is_private_while_it_is_written(tmp_path, monkeypatch):
    seen, save_file = [], checkpoints.save_file

    def look(tensors, path, metadata):
        seen.append(path.stat().st_mode & 0o777)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoints, "save_file", look)
    write_tensors(tmp_path / "a.key.safetensors", {"p_k": torch.ones(2)}, {}, private=True)
    assert seen == [0o600]


@pytest.mark.parametrize("path, code", [("figures/church.key.safetensors", 0), ("figures/a.png", 1)])
def test_git_ignores_keys(path, code):
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=paths.ROOT, check=False).returncode == code


def test_concepts_in_any_script_have_their_own_key(erasure, tmp_path):
    church, dog = erasure.keys.values()
    erasure.keys = {"猫": church, "犬": dog, "Van Gogh": dog, "van-gogh": church}
    erasure.save(tmp_path)
    loaded = Erasure.load(tmp_path)
    assert loaded.keys.keys() == erasure.keys.keys()
    assert torch.equal(loaded.key("猫").k, church.k) and torch.equal(loaded.key("犬").k, dog.k)
    assert all(path.name.endswith(".key.safetensors") for path in (tmp_path / "keys").iterdir())


# --------------------------------------------------------------------------------------------------------- without the key


def test_without_its_key_the_public_model_works(erasure, folder, toy, sentence):
    public = images(toy, erasure=erasure)
    erasure.wipe("church", folder)
    assert not key_path(folder, "church").exists() and key_path(folder, "dog").exists()
    assert list(erasure.keys) == list(Erasure.load(folder, toy).keys) == ["dog"]
    with pytest.raises(KeyError, match="no key for 'church': there are keys for dog") as error:
        erasure.key("church")
    sentence(error)
    key_path(folder, "dog").unlink()
    (folder / "keys").rmdir()
    loaded = Erasure.load(folder, toy)
    assert loaded.keys == {} and torch.equal(images(toy, erasure=loaded), public)


# ---------------------------------------------------------------------------------------------------------------- refusals


def test_files_of_another_base_are_refused_by_name(folder, erasure, toy, other_toy, sentence):
    key, before = key_path(folder, "church"), weights(other_toy.pipe.unet)
    calls = {
        str(key): lambda: load_key(key, other_toy),
        str(folder / "delta.safetensors"): lambda: Erasure.load(folder, other_toy),
        "delta": lambda: erasure.apply(other_toy),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="was made for the base model") as error:
            call()
        text = sentence(error)
        assert name in text and toy.fingerprint[:12] in text and other_toy.fingerprint[:12] in text
    assert same(weights(other_toy.pipe.unet), before)


def test_another_bases_key_among_the_others_is_refused(folder, other_toy, toy, sentence):
    foreign = kpop(other_toy, ["fish"], KPOP(**SHORT), progress=False)
    foreign.save(folder.parent / "foreign")
    key_path(folder.parent / "foreign", "fish").rename(key_path(folder, "fish"))
    with pytest.raises(ValueError, match=r"fish\.key\.safetensors was made for the base model") as error:
        Erasure.load(folder, toy)
    sentence(error)


def test_a_delta_is_not_a_key_and_a_key_is_not_a_delta(folder, sentence):
    with pytest.raises(ValueError, match="is not a key but a delta file") as error:
        load_key(folder / "delta.safetensors")
    sentence(error)
    key_path(folder, "church").rename(folder / "delta.safetensors")
    with pytest.raises(ValueError, match="is not a delta but a key file") as error:
        Erasure.load(folder)
    sentence(error)


@pytest.mark.parametrize("name", ["delta.safetensors", "keys/church.key.safetensors"])
def test_a_truncated_file_is_refused_by_name(folder, name, sentence):
    os.truncate(folder / name, (folder / name).stat().st_size * 2 // 3)
    with pytest.raises(ValueError, match="truncated") as error:
        Erasure.load(folder)
    assert str(folder / name) in sentence(error)


@pytest.mark.parametrize("content", [b"", b"\xff" * 200, "safetensors of another program", None])
def test_a_file_of_something_else_or_a_missing_one_is_refused_by_name(tmp_path, content, sentence):
    path = tmp_path / "a.key.safetensors"
    if isinstance(content, str):
        checkpoints.save_file({"p_k": torch.ones(2)}, path)
    elif content is not None:
        path.write_bytes(content)
    expected = "there is no file" if content is None else "not a complete erasekit file"
    with pytest.raises(FileNotFoundError if content is None else ValueError, match=expected) as error:
        load_key(path)
    assert str(path) in sentence(error)


def test_a_full_disk_leaves_the_old_files_and_no_part(erasure, folder, monkeypatch, sentence):
    before = contents(folder)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"could not write .*No space left on device.*free some space") as error:
        erasure.save(folder)
    sentence(error)
    assert contents(folder) == before
