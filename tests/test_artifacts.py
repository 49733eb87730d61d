"""Public delta and private keys: exact to apply and remove, safe on disk, refused where they do not belong."""

import errno
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from erasekit import artifacts, checkpoints, paths
from erasekit.artifacts import Erasure, fingerprint, key_path, load_key
from erasekit.checkpoints import read_tensors, write_tensors
from erasekit.kpop import KPOP, kpop
from erasekit.sampling import sample


@pytest.fixture(scope="module")
def trained(toy):
    return kpop(toy, ["church", "dog"], KPOP(steps=2, batch=2, m=3, lr=1e-2, place="mid+up"), progress=False)


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


def draw(toy, **kwargs):
    return sample(toy.pipe, ["a picture of a church"] * 2, [0, 1], steps=3, **kwargs)


def truncate(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


# ------------------------------------------------------------------------------------------------------------ apply, remove


def test_apply_puts_the_delta_in_and_remove_gives_the_base_back(unet, erasure):
    before, places = weights(unet), {name: p.data_ptr() for name, p in unet.named_parameters()}
    erasure.apply(unet)
    assert same(weights(unet), before | erasure.delta)
    assert not same(weights(unet), before)
    erasure.remove(unet)
    assert same(weights(unet), before)
    assert {name: p.data_ptr() for name, p in unet.named_parameters()} == places


def test_the_base_comes_back_after_an_exception(unet, erasure):
    before = weights(unet)
    with pytest.raises(KeyboardInterrupt), erasure.applied(unet):
        raise KeyboardInterrupt
    assert same(weights(unet), before)


def test_applying_leaves_the_delta_alone(unet, erasure):
    before = {name: tensor.clone() for name, tensor in erasure.delta.items()}
    with erasure.applied(unet):
        for p in unet.parameters():
            p.data.add_(1)
    assert same(erasure.delta, before)


def test_a_half_precision_base_is_the_same_base(unet, erasure):
    unet.half()
    before = weights(unet)
    with erasure.applied(unet):
        assert {p.dtype for p in unet.parameters()} == {torch.float16}
    assert same(weights(unet), before)


def test_applying_twice_is_refused(unet, erasure, sentence):
    before = weights(unet)
    erasure.apply(unet)
    with pytest.raises(ValueError, match="already applied") as error:
        erasure.apply(unet)
    sentence(error)
    erasure.remove(unet)
    assert same(weights(unet), before)


def test_two_erasures_at_once_are_refused(unet, erasure, trained, sentence):
    with erasure.applied(unet), pytest.raises(ValueError, match="remove the erasure that is applied") as error:
        Erasure(trained.delta, {}, trained.info).apply(unet)
    sentence(error)


def test_applying_a_tiny_change_twice_does_not_lose_the_base(unet, erasure):
    before = weights(unet)
    erasure.delta = {name: before[name] + 1e-9 for name in erasure.delta}  # too small for the fingerprint
    erasure.apply(unet)
    with pytest.raises(ValueError, match="already applied"):
        erasure.apply(unet)
    erasure.remove(unet)
    assert same(weights(unet), before)


def test_removing_what_is_not_applied_is_refused(unet, erasure, sentence):
    with pytest.raises(RuntimeError, match="not applied") as error:
        erasure.remove(unet)
    sentence(error)


def test_a_delta_of_another_base_is_refused(other_toy, erasure, sentence):
    before = weights(other_toy.pipe.unet)
    with pytest.raises(ValueError, match="delta was made for the base model") as error:
        erasure.apply(other_toy.pipe.unet)
    sentence(error)
    assert same(weights(other_toy.pipe.unet), before)


@pytest.mark.parametrize("name, tensor", [("nowhere.weight", torch.ones(2)), ("conv_out.bias", torch.ones(3))])
def test_an_unknown_tensor_or_shape_is_refused(unet, erasure, name, tensor, sentence):
    before = weights(unet)
    erasure.delta[name] = tensor
    with pytest.raises(ValueError, match=f"does not fit this model: 1 tensors differ, the first is {name}") as error:
        erasure.apply(unet)
    sentence(error)
    assert same(weights(unet), before)


def test_the_fingerprint_sees_one_changed_weight(unet):
    before = fingerprint(unet)
    unet.conv_out.bias.data[0] += 0.01
    assert fingerprint(unet) != before


# -------------------------------------------------------------------------------------------------------------- save, load


def test_what_is_loaded_is_what_was_saved(erasure, folder, toy):
    loaded = Erasure.load(folder, toy.pipe.unet)
    assert same(loaded.delta, erasure.delta)
    assert loaded.keys.keys() == erasure.keys.keys()
    for concept, prompt in loaded.keys.items():
        expected = erasure.keys[concept]
        assert torch.equal(prompt.k, expected.k) and torch.equal(prompt.v, expected.v)
        assert prompt.place == expected.place == "mid+up"
    assert loaded.info == erasure.info | {"kind": "delta"}


def test_another_concepts_key_is_not_left_beside_a_new_delta(erasure, folder, sentence):
    other = Erasure(erasure.delta, {"dog": erasure.keys["church"]}, erasure.info)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"a key of another erasure, church\.key") as error:
        other.save(folder)
    sentence(error)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_key_of_another_training_is_refused(erasure, folder, tmp_path, sentence):
    Erasure({name: tensor + 1 for name, tensor in erasure.delta.items()}, {}, erasure.info).save(tmp_path / "new")
    (folder / "delta.safetensors").write_bytes((tmp_path / "new" / "delta.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"church\.key\.safetensors is the key of another training") as error:
        Erasure.load(folder)
    sentence(error)


def test_where_a_delta_lies_its_keys_do(erasure, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(artifacts, "write_tensors", lambda path, *_, **__: written.append(path.name))
    erasure.save(tmp_path)
    assert len(written) == 1 + len(erasure.keys) and written[-1] == "delta.safetensors"


def test_loaded_it_draws_the_same_images(erasure, folder, toy):
    unet, loaded = toy.pipe.unet, Erasure.load(folder, toy.pipe.unet)
    with erasure.applied(unet):
        hidden, opened = draw(toy), draw(toy, key=erasure.key("church"))
    with loaded.applied(unet):
        assert torch.equal(draw(toy), hidden)
        assert torch.equal(draw(toy, key=loaded.key("church")), opened)
    assert not torch.equal(hidden, opened)


def test_files_say_what_they_are(folder, toy):
    for path, kind in ((folder / "delta.safetensors", "delta"), (key_path(folder, "dog"), "key")):
        _, meta = read_tensors(path)
        assert meta["kind"] == kind and meta["world"] == "toy" and meta["base"] == toy.fingerprint
        assert meta["config"]["m"] == 3 and meta["seed"] == 0 and "torch" in meta["provenance"]["versions"]
    assert meta["concept"] == "dog"


def test_the_delta_holds_no_key(erasure, folder):
    tensors = load_file(folder / "delta.safetensors")
    assert tensors.keys() == erasure.delta.keys()
    shapes = {tuple(t.shape) for t in tensors.values()}
    assert not shapes & {tuple(p.k.shape) for p in erasure.keys.values()}


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_keys_are_readable_by_their_owner_only(erasure, tmp_path, umask):
    before = os.umask(umask)
    try:
        erasure.save(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()}
    assert modes == {"church.key.safetensors": 0o600, "dog.key.safetensors": 0o600}


def test_a_key_is_private_while_it_is_written(tmp_path, monkeypatch):
    seen, save_file = [], checkpoints.save_file

    def look(tensors, path, metadata):
        seen.append(path.stat().st_mode & 0o777)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoints, "save_file", look)
    write_tensors(tmp_path / "a.key.safetensors", {"p_k": torch.ones(2)}, {}, private=True)
    assert seen == [0o600]


def test_the_public_delta_is_readable_by_others(erasure, tmp_path):
    before = os.umask(0o022)
    try:
        erasure.save(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "delta.safetensors").stat().st_mode & 0o777 == 0o644


def test_git_ignores_keys():
    path = "figures/church.key.safetensors"  # a folder that is committed
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=paths.ROOT, check=False).returncode == 0
    assert subprocess.run(["git", "check-ignore", "-q", "figures/a.png"], cwd=paths.ROOT, check=False).returncode == 1


def test_concepts_in_any_script_keep_their_own_key(erasure, tmp_path):
    church, dog = erasure.keys.values()
    erasure.keys = {"猫": church, "犬": dog, "Van Gogh": dog, "van-gogh": church}
    erasure.save(tmp_path)
    loaded = Erasure.load(tmp_path)
    assert loaded.keys.keys() == erasure.keys.keys()
    assert torch.equal(loaded.key("猫").k, church.k) and torch.equal(loaded.key("犬").k, dog.k)
    assert all(path.name.endswith(".key.safetensors") for path in (tmp_path / "keys").iterdir())


# --------------------------------------------------------------------------------------------------------- without the key


def test_a_wiped_key_is_gone_and_the_public_model_works(erasure, folder, toy):
    with erasure.applied(toy.pipe.unet):
        hidden = draw(toy)
    erasure.wipe("church", folder)
    assert not key_path(folder, "church").exists() and key_path(folder, "dog").exists()
    loaded = Erasure.load(folder, toy.pipe.unet)
    assert list(erasure.keys) == list(loaded.keys) == ["dog"]
    with loaded.applied(toy.pipe.unet):
        assert torch.equal(draw(toy), hidden)


def test_a_folder_without_keys_loads(erasure, folder, toy):
    for concept in ("church", "dog"):
        key_path(folder, concept).unlink()
    (folder / "keys").rmdir()
    loaded = Erasure.load(folder, toy.pipe.unet)
    assert loaded.keys == {} and same(loaded.delta, erasure.delta)


def test_a_key_there_is_not_is_named(erasure, sentence):
    with pytest.raises(KeyError, match="no key for 'fish': there are keys for church, dog") as error:
        erasure.key("fish")
    sentence(error)


# ---------------------------------------------------------------------------------------------------------------- refusals


def test_a_key_of_another_base_is_refused_by_name(folder, toy, other_toy, sentence):
    path, other = key_path(folder, "church"), other_toy.pipe.unet
    with pytest.raises(ValueError, match="was made for the base model") as error:
        load_key(path, other)
    text = sentence(error)
    assert str(path) in text and toy.fingerprint[:12] in text and fingerprint(other)[:12] in text


def test_a_folder_of_another_base_is_refused_by_name(folder, other_toy, sentence):
    with pytest.raises(ValueError, match="was made for the base model") as error:
        Erasure.load(folder, other_toy.pipe.unet)
    assert str(folder / "delta.safetensors") in sentence(error)


def test_a_foreign_key_among_the_others_is_refused(folder, other_toy, toy, sentence):
    foreign = kpop(other_toy, ["fish"], KPOP(steps=1, batch=1), progress=False)
    foreign.save(folder.parent / "foreign")
    key_path(folder.parent / "foreign", "fish").rename(key_path(folder, "fish"))
    with pytest.raises(ValueError, match=r"fish\.key\.safetensors was made for the base model") as error:
        Erasure.load(folder, toy.pipe.unet)
    sentence(error)


def test_a_delta_is_not_a_key(folder, sentence):
    with pytest.raises(ValueError, match="is not a key but a delta file") as error:
        load_key(folder / "delta.safetensors")
    sentence(error)


def test_a_key_is_not_a_delta(folder, sentence):
    key_path(folder, "church").rename(folder / "delta.safetensors")
    with pytest.raises(ValueError, match="is not a delta but a key file") as error:
        Erasure.load(folder)
    sentence(error)


@pytest.mark.parametrize("name", ["delta.safetensors", "keys/church.key.safetensors"])
def test_a_truncated_file_is_refused_by_name(folder, name, sentence):
    truncate(folder / name)
    with pytest.raises(ValueError, match="truncated") as error:
        Erasure.load(folder)
    assert str(folder / name) in sentence(error)


@pytest.mark.parametrize("content", [b"", b"not tensors", b"\xff" * 200])
def test_a_file_of_something_else_is_refused_by_name(tmp_path, content, sentence):
    path = tmp_path / "a.key.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a complete erasekit file") as error:
        load_key(path)
    assert str(path) in sentence(error)


def test_a_safetensors_file_of_somebody_else_is_refused_by_name(tmp_path, sentence):
    path = tmp_path / "a.key.safetensors"
    checkpoints.save_file({"p_k": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a complete erasekit file") as error:
        load_key(path)
    assert str(path) in sentence(error)


def test_a_missing_file_is_named(tmp_path, sentence):
    with pytest.raises(FileNotFoundError, match=r"no file .*delta\.safetensors") as error:
        Erasure.load(tmp_path)
    sentence(error)


def test_a_full_disk_leaves_the_old_file_and_no_part(erasure, folder, monkeypatch, sentence):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"could not write .*No space left on device.*free some space") as error:
        erasure.save(folder)
    sentence(error)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
