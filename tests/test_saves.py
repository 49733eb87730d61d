"""A save is whole or nothing, and destroys nobody's files; what is damaged is refused."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import SHORT
from safetensors.torch import load_file, save_file

from erasekit import checkpoints
from erasekit.artifacts import Erasure, key_path
from erasekit.baselines import erase
from erasekit.checkpoints import read_tensors
from erasekit.kpop import KPOP, kpop
from erasekit.sampling import sample


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_key_of_another_training_is_not_overwritten(erasure, tmp_path, refused):
    erasure.save(tmp_path)
    erasure.save(tmp_path)
    before = contents(tmp_path)
    other = Erasure({n: t + 1 for n, t in erasure.delta.items()}, dict(erasure.keys), erasure.info)
    refused(ValueError, r"has a key of another erasure, church\.key", lambda: other.save(tmp_path))
    assert contents(tmp_path) == before
    other.save(tmp_path, replace=True)
    assert Erasure.load(tmp_path).digest() == other.digest()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_save_that_fails_changes_nothing(erasure, tmp_path, monkeypatch, failing):
    erasure.save(tmp_path)
    before, written = contents(tmp_path), []

    def full(tensors, path, metadata):
        written.append(path)
        if len(written) > failing:
            raise OSError("disk full")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoints, "save_file", full)
    other = Erasure({n: t + 1 for n, t in erasure.delta.items()}, dict(erasure.keys), erasure.info)
    with pytest.raises(OSError, match="disk full"):
        other.save(tmp_path, replace=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["delta.safetensors", "keys/dog.key.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "swap", "drop"])
def test_damaged_tensors_are_refused(erasure, tmp_path, name, damage, refused):
    erasure.keys["dog"] = replace(erasure.keys["dog"], v=erasure.keys["dog"].v + 1)
    erasure.save(tmp_path)
    path = tmp_path / name
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    else:
        with checkpoints.safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        alike = [n for n in tensors if tensors[n].shape == tensors[next(iter(tensors))].shape]
        first, second = alike[0], next(n for n in alike[1:] if not torch.equal(tensors[n], tensors[alike[0]]))
        tensors[first], tensors[second] = tensors[second], tensors[first]
        if damage == "drop":
            del tensors[first]
        save_file(tensors, path, metadata)
    refused(ValueError, "is damaged", lambda: Erasure.load(tmp_path))


def test_older_files_without_a_checksum_are_read(erasure, tmp_path):
    erasure.save(tmp_path)
    path = tmp_path / "delta.safetensors"
    tensors, meta = read_tensors(path)
    checkpoints.write_tensors(path, tensors, meta)
    assert Erasure.load(tmp_path).digest() == erasure.digest()


def test_a_long_name_is_saved_and_a_renamed_key_found(erasure, tmp_path):
    long = "church " * 33
    erasure.keys = {long: erasure.keys["church"], "dog": erasure.keys["dog"]}
    erasure.save(tmp_path)
    key_path(tmp_path, "dog").rename(tmp_path / "keys" / "my pet.safetensors")
    loaded = Erasure.load(tmp_path)
    assert set(loaded.keys) == {long, "dog"}
    erasure.save(tmp_path)
    assert len(list((tmp_path / "keys").iterdir())) == 2
    loaded.wipe("dog", tmp_path)
    assert set(Erasure.load(tmp_path).keys) == {long}


@pytest.mark.parametrize("replaced", ["another erasure", "somebody's file"])
def test_a_public_file_that_is_there_is_not_overwritten(toy, erasure, tmp_path, replaced, refused):
    """A delta without keys beside it is somebody's training too."""
    if replaced == "another erasure":
        erase(toy, ["dog"], "uce").save(tmp_path)
    else:
        save_file({"x": torch.zeros(2)}, tmp_path / "delta.safetensors")
    before = contents(tmp_path)
    refused(ValueError, r"delta\.safetensors is (of another erasure|not a complete)", lambda: erasure.save(tmp_path))
    assert contents(tmp_path) == before
    erasure.save(tmp_path, replace=True)
    assert Erasure.load(tmp_path).digest() == erasure.digest()


def test_no_file_takes_its_place_where_one_cannot(erasure, tmp_path, refused):
    (tmp_path / "delta.safetensors").mkdir()
    refused(ValueError, "is a folder", lambda: erasure.save(tmp_path))
    refused(OSError, "is a folder", lambda: erasure.save(tmp_path, replace=True))
    assert not contents(tmp_path)


def test_numbers_of_other_libraries_are_saved(toy, erasure, tmp_path):
    """A training whose settings no file can hold would be lost when it is saved."""
    numbers = {
        "steps": np.int64(1),
        "lr": np.float32(0.01),
        "m": np.int32(2),
        "lam": Fraction(1, 2),
        "seed": np.int64(3),
    }
    config = KPOP(**SHORT | numbers, retain=np.array(["fish"]))
    trained = kpop(toy, np.array(["dog"]), config, tmp_path / "run.part", progress=False)
    trained.scaled(toy, np.float32(0.5)).save(tmp_path)
    assert Erasure.load(tmp_path, toy).info["config"]["seed"] == 3
    assert sample(toy, ["a dog"], np.array([0]), num_inference_steps=np.int64(1)).shape == (1, 3, 16, 16)
